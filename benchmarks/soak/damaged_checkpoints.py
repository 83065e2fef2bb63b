"""Damaged checkpoints, as `tetrion generate` meets them before a worker starts: taken, or refused in one line with exit
code 2; no traceback, nothing above two seconds.

    python -m benchmarks.soak.damaged_checkpoints --count 500 --seed 1

Each is a copy of an embedded model with one damage or two: fields and numbers of configs, bytes, lengths, headers,
indices, tokenizers, and files that are pipes, links, folders, devices or without end. `--load` also loads what was
taken, as a worker would, and counts what comes of that.
"""

import json
import os
import random
import shutil
import socket
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from benchmarks.soak.cases import case_options, finish, run_cases
from tetrion.engine.families.checkpoint import component_folder, embedded_folder

MODELS = ("shapes", "shapes-sd3")
NUMBERS = (
    *(0, -1, 1, 2, 3, 77, 999, 1001, 20_000, 10**6, 10**7, 10**9, 2**31, 2**62, 2**63, 10**400),
    *(0.5, 1e308, -1e-320),
)
TEXTS = (
    *("", " ", "..", "/", "\0", "\ud800", "\x1b[31m", "a\nb", "../../etc/passwd"),
    *("x" * 100_000, "null", "12", "é" * 300),
)
OTHERS = (None, True, [], {}, [[]], {"a": None}, [1] * 100_000, [["x"]] * 1000)
STRANGE = (
    *("model.safetensors", "model.fp16.safetensors", "x.safetensors.index.json", "model.safetensors.index.json"),
    *("evil.py", "\udcff.json", "a\nb.safetensors", "._model.safetensors", "config.json~", "tokenizer.json"),
)
"""Names of files that should not be there."""
Damage = Callable[[random.Random, Path], str]
"""Does something to a checkpoint folder, whose files are links that must be replaced, not written to; says what."""


def rewritten(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


def files_of(folder: Path, *suffixes: str) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix in suffixes and path.is_file())


def some_file(chance: random.Random, folder: Path) -> Path:
    return chance.choice(files_of(folder, ".json", ".safetensors"))


def odd_value(chance: random.Random) -> Any:
    if chance.random() < 0.05:
        return deep(chance.choice((100, 5000)))
    return chance.choice(chance.choice((NUMBERS, NUMBERS, TEXTS, OTHERS)))


def deep(levels: int) -> Any:
    value: Any = 0
    for _ in range(levels):
        value = [value]
    return value


def changed(chance: random.Random, value: Any) -> tuple[Any, str]:
    """`value` with one part of it another, left out or twice, and where that is."""
    if isinstance(value, dict) and value and chance.random() < 0.9:
        key = chance.choice(sorted(value))
        how = chance.random()
        if how < 0.15:
            return {k: v for k, v in value.items() if k != key}, f"without {key[:60]}"
        if how < 0.2:
            return value | {f"{key}x": value[key]}, f"{key[:60]}x"
        inner, where = changed(chance, value[key])
        return value | {key: inner}, f"{key[:60]}.{where}"
    if isinstance(value, list) and 0 < len(value) < 50 and chance.random() < 0.5:
        index = chance.randrange(len(value))
        inner, where = changed(chance, value[index])
        return [*value[:index], inner, *value[index + 1 :]], f"{index}.{where}"
    return (odd := odd_value(chance)), f"= {str(odd)[:40]!r}" if not isinstance(odd, list) else "= a list"


def dumped(value: Any) -> bytes:
    try:
        return json.dumps(value).encode()
    except RecursionError:
        return b"[" * 100_000


def field(chance: random.Random, folder: Path) -> str:
    """Of a config, an index, a preset or a tokenizer."""
    small = [path for path in files_of(folder, ".json") if path.name != "tokenizer.json"]
    path = chance.choice(small if chance.random() < 0.85 else files_of(folder, ".json"))
    value, where = changed(chance, json.loads(path.read_bytes()))
    rewritten(path, dumped(value))
    return f"{path.relative_to(folder)}: {where}"


def header(chance: random.Random, folder: Path) -> str:
    path = chance.choice(files_of(folder, ".safetensors"))
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    value, where = changed(chance, json.loads(content[8 : 8 + length]))
    text = dumped(value)
    rewritten(path, len(text).to_bytes(8, "little") + text + content[8 + length :])
    return f"{path.relative_to(folder)}: header: {where}"


def header_length(chance: random.Random, folder: Path) -> str:
    path = chance.choice(files_of(folder, ".safetensors"))
    length = chance.choice((0, 1, 7, 10**6, 10**8, 10**9, 2**40, 2**63, 2**64 - 1))
    rewritten(path, length.to_bytes(8, "little") + path.read_bytes()[8:])
    return f"{path.relative_to(folder)}: a header of {length} bytes"


def flipped(chance: random.Random, folder: Path) -> str:
    path = some_file(chance, folder)
    content = bytearray(path.read_bytes())
    end = 8 + int.from_bytes(content[:8], "little") if path.suffix == ".safetensors" else len(content)
    for _ in range(chance.randint(1, 8)):
        content[chance.randrange(end if chance.random() < 0.8 else len(content))] = chance.randrange(256)
    rewritten(path, bytes(content))
    return f"{path.relative_to(folder)}: bytes"


def cut_or_grown(chance: random.Random, folder: Path) -> str:
    path = some_file(chance, folder)
    content = path.read_bytes()
    if chance.random() < 0.7:
        content = content[: chance.choice((0, 1, 7, 8, 9, len(content) - 1, chance.randrange(len(content))))]
    else:
        content += bytes(chance.randrange(1, 10_000))
    rewritten(path, content)
    return f"{path.relative_to(folder)}: {len(content)} bytes"


def another_kind(chance: random.Random, folder: Path) -> str:
    """A file, or a component's folder, that is a pipe, a link, a device, …"""
    path = chance.choice([some_file(chance, folder), *(p for p in sorted(folder.iterdir()) if p.is_dir())])
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    kind = chance.choice(
        ("pipe", "folder", "socket", "sparse", "nothing", "itself", "zero", "random", "stdin", "root", "up")
    )
    targets = {"itself": path.name, "zero": "/dev/zero", "random": "/dev/urandom", "stdin": "/dev/stdin", "root": "/"}
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "socket":
            with socket.socket(socket.AF_UNIX) as one, _inside(path.parent):
                one.bind(path.name)
        case "sparse":
            path.touch()
            os.truncate(path, chance.choice((2**31, 2**40)))
        case "up":
            path.symlink_to("..", target_is_directory=True)
        case "nothing":
            pass
        case _:
            path.symlink_to(targets[kind])
    return f"{path.relative_to(folder)}: {kind}"


def exchanged(chance: random.Random, folder: Path) -> str:
    """Two files take each other's place."""
    suffix = chance.choice((".json", ".safetensors"))
    one, other = chance.sample(files_of(folder, suffix), 2)
    contents = one.read_bytes(), other.read_bytes()
    rewritten(one, contents[1])
    rewritten(other, contents[0])
    return f"{one.relative_to(folder)} and {other.relative_to(folder)} exchanged"


def strange_beside(chance: random.Random, folder: Path) -> str:
    """Files that should not be there: a second index, other shards, code."""
    path = chance.choice([path for path in sorted(folder.rglob("*")) if path.is_dir()])
    name = chance.choice(STRANGE)
    if not os.path.lexists(path / name):
        (path / name).write_bytes(chance.choice((b"", b"{}", b'{"weight_map": {"a": "../x"}}', b"\xff" * 100)))
    return f"{str((path / name).relative_to(folder))!r} beside the others"


class _inside:
    """A socket's path may have 107 bytes: it is bound from its folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __enter__(self) -> None:
        self._before = Path.cwd()
        os.chdir(self._folder)

    def __exit__(self, *_: object) -> None:
        os.chdir(self._before)


DAMAGES: tuple[tuple[int, Damage], ...] = (
    (10, field),
    (4, header),
    (1, header_length),
    (4, flipped),
    (3, cut_or_grown),
    (4, another_kind),
    (1, exchanged),
    (1, strange_beside),
)


class Checkpoints:
    """Copies of the embedded models below `folder`, one at a time. `taken`: what to do with one that was accepted."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        for model in MODELS:
            copy_whole(model, folder / f"whole-{model}")

    def draw(self, chance: random.Random) -> tuple[str, Sequence[str]]:
        """A damaged one, and the command line that meets it."""
        model, damaged = chance.choice(MODELS), self._folder / "damaged"
        shutil.rmtree(damaged, ignore_errors=True)
        shutil.copytree(self._folder / f"whole-{model}", damaged, copy_function=os.link)
        weights, damages = zip(*DAMAGES, strict=True)
        done = [
            self._damage(chance, damaged, how) for how in chance.choices(damages, weights, k=chance.choice((1, 1, 2)))
        ]
        arguments = ["generate", "a red circle", "--model", str(damaged), "--output", str(self._folder / "out")]
        dummy = ["--load-format", "dummy"] if chance.random() < 0.2 else []
        return f"{model}: {'; '.join(done)}{' (dummy)' * bool(dummy)}", [*arguments, "--devices", "cpu:1", *dummy]

    def _damage(self, chance: random.Random, folder: Path, how: Damage) -> str:
        """A second damage may find the file of the first one in its way."""
        try:
            return how(chance, folder)
        except (OSError, ValueError, IndexError):
            return "nothing more"


def copy_whole(model: str, folder: Path) -> None:
    """With all components its own."""
    source = embedded_folder() / model
    shutil.copytree(source, folder)
    preset = json.loads((folder / "preset.json").read_bytes())
    for component in preset.pop("components_from", {}):
        shutil.copytree(component_folder(source, component), folder / component)
    (folder / "preset.json").write_bytes(json.dumps(preset).encode())


def loaded(folder: Path) -> str:
    """What a worker makes of a folder that was taken."""
    from tetrion.engine.families.registry import read_model_spec
    from tetrion.engine.model_spec import CheckpointError
    from tetrion.engine.models.ops import ReferenceOps
    from tetrion.engine.models.registry import load_shared

    fd = os.memfd_create("weights")
    try:
        load_shared([read_model_spec(folder)], fd, True, "safetensors", ReferenceOps(None))  # type: ignore[arg-type]
    except CheckpointError:
        return "refused by a worker, exit 2"
    except Exception as error:
        return f"{type(error).__name__} in a worker: {error}"
    finally:
        os.close(fd)
    return "loaded"


@click.command(help=__doc__)
@case_options
@click.option("--load", is_flag=True, help="Load what was taken, which takes a fifth of a second each.")
def main(count: int, seed: int, first: int, load: bool) -> None:
    with tempfile.TemporaryDirectory() as name:
        checkpoints = Checkpoints(Path(name))
        result = run_cases(checkpoints.draw, count, seed, first, allowed=("accepted", "exit 2"))
        if load:
            result["loading"] = _load_taken(checkpoints, Path(name) / "damaged", count, seed, first)
    finish(result)


def _load_taken(checkpoints: Checkpoints, folder: Path, count: int, seed: int, first: int) -> dict[str, int]:
    from benchmarks.soak.cases import outcome_of

    found: Counter[str] = Counter()
    for number in range(first, first + count):
        _, arguments = checkpoints.draw(random.Random(f"{seed}/{number}"))
        if "dummy" not in arguments and outcome_of(arguments)[0] == "accepted":
            found[loaded(folder)] += 1
    return dict(found.most_common())


if __name__ == "__main__":
    main()
