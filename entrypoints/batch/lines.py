"""The input of `tetrion batch`: one JSON object a line, each a picture to draw.

    {"prompt": "a red circle", "size": "256x256", "seed": 7, "num_steps": 12, "guidance": 3.5, "slo_ms": 900, "id": "a"}

Only `prompt` is required. `model` is for engines that serve several (default: the first); `negative_prompt`,
`true_cfg_scale`, `image`, `mask` and `strength` are for models that take them. `image` is a picture's file or a list of
them, `mask` one, relative to the folder of the file of lines and in it. `id` names the picture (`<id>.png`; default:
the line's number, from 1). `priority` and `energy` (`{"mode": "least-energy", "budget_j": 500}`, both or either) may be
given too. Without `seed` a line gets one made from its id, so that every run draws the same picture. Blank lines are
skipped. What a value may be is the engine's to say: a table's `3.0` is 3, and its `null` is "not given".
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from tetrion.engine.errors import DeadlineUnmeetable, RequestError, shown
from tetrion.engine.pictures import read_file
from tetrion.engine.request import ImageRequest
from tetrion.engine.resolve import whole_within
from tetrion.entrypoints.arguments import parse_wished_size
from tetrion.entrypoints.errors import InputError
from tetrion.entrypoints.unicode import as_utf8, inflated

ID_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
MAX_NUMBER_ID = 10**18 - 1

Resolve = Callable[[ImageRequest], ImageRequest]


class RequestLine(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Any values: the engine settles what they mean."""

    prompt: Any
    model: Any = None
    size: Any = None
    seed: Any = None
    num_steps: Any = None
    guidance: Any = None
    negative_prompt: Any = None
    true_cfg_scale: Any = None
    image: str | list[str] | None = None
    mask: str | None = None
    strength: Any = None
    slo_ms: Any = None
    priority: Any = None
    energy: Any = None
    id: Any = None


class BatchItem(msgspec.Struct, frozen=True, kw_only=True):
    """A good line: a picture that can be drawn. `digest` identifies everything its pixels depend on."""

    line: int
    id: str
    request: ImageRequest
    digest: str

    @property
    def file(self) -> str:
        """The picture's name in the output folder."""
        return f"{self.id}.png"


class BadLine(msgspec.Struct, frozen=True, kw_only=True):
    """A line that names no drawable picture, and why. `id` is None where it could not be read."""

    line: int
    id: str | None
    error: str


def read_lines(path: Path) -> list[tuple[int, bytes]]:
    """The lines of `path` that are not blank, with their numbers from 1; it may be UTF-16 or UTF-32, or compressed
    with gzip. Raises InputError."""
    try:
        data = as_utf8(inflated(path.read_bytes()))
    except OSError as error:
        raise InputError(f"requests: cannot read {str(path)!r}: {error.strerror or error}") from None
    except ValueError as error:
        raise InputError(f"requests: cannot read {str(path)!r}: {error}") from None
    return [(number, line) for number, line in enumerate(data.split(b"\n"), start=1) if line.strip()]


def parse_lines(
    lines: list[tuple[int, bytes]], resolve: Resolve, checkpoints: Mapping[str, str], folder: Path = Path()
) -> Iterator[BatchItem | BadLine]:
    """Each line as a picture to draw or as a complaint. `resolve` fills in defaults; it raises RequestError,
    DeadlineUnmeetable. `folder`: what files that a line names are relative to.

    `checkpoints`: by model, the identity of what draws, for the digest. Two ids that differ only in case count as one:
    file systems may say so.
    """
    decoder = msgspec.json.Decoder(RequestLine)
    line_of: dict[str, int] = {}
    for number, text in lines:
        identifier = None
        try:
            parsed = decoder.decode(text)
            identifier = _identifier(parsed.id, number)
            first = line_of.setdefault(identifier.casefold(), number)
            if first != number:
                raise InputError(f"id: {identifier!r} is taken by line {first}")
            asked = _to_request(parsed, identifier, folder)
            digests = _digests(asked)
            request = resolve(asked)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            yield BadLine(line=number, id=identifier, error=_readable(error))
        except (RequestError, DeadlineUnmeetable, InputError) as error:
            yield BadLine(line=number, id=identifier, error=_in_words_of_lines(error))
        else:
            digest = _digest(request, checkpoints[request.model or ""], digests)
            # Read again when it is drawn: all lines' pictures at once may be more than memory holds.
            request = msgspec.structs.replace(request, pictures=asked.pictures, mask=asked.mask)
            yield BatchItem(line=number, id=identifier, request=request, digest=digest)


def seed_of_id(identifier: str) -> int:
    """The seed of a line that gives none: the first 32 bits of SHA-256 of its id."""
    return int.from_bytes(hashlib.sha256(identifier.encode()).digest()[:4], "big")


def _identifier(given: object, number: int) -> str:
    """Of line `number`. Raises RequestError, InputError."""
    if given is None:
        return str(number)
    if not isinstance(given, str):
        return str(whole_within("id", given, 0, MAX_NUMBER_ID))
    if not ID_PATTERN.fullmatch(given):
        allowed = "1 to 100 letters, digits, dots, dashes or underscores, starting with a letter or digit"
        raise InputError(f"id: expected {allowed}, got {shown(given)}")
    return given


def _to_request(line: RequestLine, identifier: str, folder: Path) -> ImageRequest:
    width, height = parse_wished_size(line.size)
    images = [line.image] if isinstance(line.image, str) else line.image or []
    pictures = tuple(_below(folder, "image", image) for image in images)
    return ImageRequest(
        prompt=line.prompt,
        model=line.model,
        width=width,
        height=height,
        num_steps=line.num_steps,
        guidance=line.guidance,
        negative_prompt=line.negative_prompt,
        true_cfg_scale=line.true_cfg_scale,
        pictures=pictures,
        mask=None if line.mask is None else _below(folder, "mask", line.mask),
        strength=line.strength,
        seed=seed_of_id(identifier) if line.seed is None else line.seed,
        slo_ms=line.slo_ms,
        priority=line.priority,
        energy=line.energy,
        delivery="png",
    )


def _below(folder: Path, field: str, name: str) -> Path:
    """A file that a line names: nowhere but in its folder, wherever links lead. Raises InputError."""
    path = folder / name
    try:
        is_below = path.resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError, RuntimeError):
        is_below = False
    if not is_below or Path(name).is_absolute():
        raise InputError(f"{field}: must be a path in the folder of the file of lines, got {shown(name)}")
    return path


def _in_words_of_lines(error: Exception) -> str:
    if isinstance(error, RequestError) and error.field == "pictures":
        return f"image: {str(error).removeprefix('pictures: ')}"
    return str(error)


def _readable(error: Exception) -> str:
    if not isinstance(error, msgspec.ValidationError):
        return f"not valid JSON: {error}"
    message = str(error)
    if missing := re.search(r"missing required field `(\w+)`", message):
        return f"{missing[1]}: is required"
    if unknown := re.search(r"unknown field `(.*)`", message, re.DOTALL):
        return f"{shown(unknown[1])} is no field of a line, which are {', '.join(RequestLine.__struct_fields__)}"
    return message


def _digests(request: ImageRequest) -> list[str]:
    """Of the files that it names. Raises RequestError."""
    return [
        hashlib.sha256(read_file(field, path)).hexdigest()
        for field, paths in (("pictures", request.pictures), ("mask", [request.mask]))
        for path in paths
        if path is not None
    ]


def _digest(request: ImageRequest, checkpoint: str, files: list[str]) -> str:
    size = (request.width, request.height)
    pixels: list[Any] = [request.prompt, *size, request.num_steps, request.guidance, request.seed, checkpoint]
    if request.negative_prompt is not None:  # others keep the digest that they had before there were any
        pixels += [request.negative_prompt, request.true_cfg_scale]
    if files:
        pixels += [files, request.strength, request.mask is not None]
    return hashlib.sha256(msgspec.json.encode(pixels)).hexdigest()[:32]
