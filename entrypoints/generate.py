"""`tetrion generate`: prompts in, picture files and a contact sheet out.

Seeds: picture i of a prompt has seed `seed + i`; without `--seed` one is drawn at random and reported.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as ProgressBar

from tetrion.engine.errors import one_line
from tetrion.engine.families.words import unknown_words
from tetrion.engine.pictures import read_picture
from tetrion.engine.request import Delivered, EnergyOptions, ImageRequest, ImageResult, Progress, Receipt
from tetrion.engine.resolve import skipped_steps
from tetrion.entrypoints import contact_sheet, drawing, pictures
from tetrion.entrypoints.arguments import parse_wished_size
from tetrion.entrypoints.encoders import Encoders
from tetrion.entrypoints.errors import InputError
from tetrion.entrypoints.png import Each
from tetrion.entrypoints.terminal import progress_console, say
from tetrion.entrypoints.unicode import as_utf8

if TYPE_CHECKING:
    from tetrion.engine.api import AsyncEngine

MAX_PER_PROMPT = 100
RANDOM_SEEDS = 2**32


class GenerateOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The command line of `tetrion generate` without what concerns the engine."""

    prompts: tuple[str, ...]
    size: str | None = None
    seed: int | None = None
    num_steps: int | None = None
    num_per_prompt: int = 1
    guidance: float | None = None
    negative_prompt: str | None = None
    true_cfg_scale: float | None = None
    images: tuple[Path, ...] = ()
    mask: Path | None = None
    strength: float | None = None
    slo_ms: float | None = None
    force_degrees: tuple[int, ...] = ()
    energy: EnergyOptions = EnergyOptions()
    output: Path = Path("out")
    as_json: bool = False


class Drawn(msgspec.Struct, frozen=True, kw_only=True):
    """One finished picture as `--json` reports it (times in seconds); `file` is relative as the output folder was.
    `latency_s`, `deliver_s` of it and `slo_met` are until the file was written."""

    prompt: str
    file: str
    model: str
    seed: int
    width: int
    height: int
    num_steps: int
    latency_s: float
    queue_s: float
    encode_s: float
    denoise_s: float
    decode_s: float
    deliver_s: float
    degrees: tuple[int, ...]
    degrees_compact: str
    slo_met: bool | None
    energy: Receipt


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """The object that `--json` prints. `start_s`: the engine's start; `total_s`: from then to the last file. `sheet` is
    None for a single picture."""

    models: tuple[str, ...]
    devices: tuple[str, ...]
    start_s: float
    total_s: float
    images: tuple[Drawn, ...]
    sheet: str | None


def read_prompts(path: Path) -> tuple[str, ...]:
    """The prompts in a text file, one a line; blank lines are skipped. Raises InputError."""
    try:
        lines = as_utf8(path.read_bytes()).decode().splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"prompts: {str(path)!r} is not UTF-8 text: {error}") from None
    except OSError as error:
        raise InputError(f"prompts: cannot read {str(path)!r}: {error.strerror or error}") from None
    return tuple(line.strip() for line in lines if line.strip())


def build_requests(options: GenerateOptions, engine: AsyncEngine) -> list[ImageRequest]:
    """Every picture to draw, by every model, resolved and checked against it. Raises InputError, RequestError, and
    DeadlineUnmeetable."""
    if not options.prompts:
        raise InputError("prompt: give at least one, or a file with --prompts")
    if not 1 <= options.num_per_prompt <= MAX_PER_PROMPT:
        raise InputError(f"n: must be from 1 to {MAX_PER_PROMPT}, got {options.num_per_prompt}")
    width, height = parse_wished_size(options.size or None)
    seed = options.seed
    if seed is None:
        seed = secrets.randbelow(RANDOM_SEEDS - options.num_per_prompt)
    given = tuple(read_picture("image", path) for path in options.images)
    requests = (
        ImageRequest(
            prompt=prompt,
            model=model,
            width=width,
            height=height,
            num_steps=options.num_steps,
            guidance=options.guidance,
            negative_prompt=options.negative_prompt,
            true_cfg_scale=options.true_cfg_scale,
            pictures=given,
            mask=options.mask,
            strength=options.strength,
            seed=seed + i,
            slo_ms=options.slo_ms,
            force_degrees=options.force_degrees,
            energy=options.energy,
            delivery="png",
        )
        for prompt in options.prompts
        for i in range(options.num_per_prompt)
        for model in engine.models.specs
    )
    return _checked(requests, engine)


def _checked(requests: Iterable[ImageRequest], engine: AsyncEngine) -> list[ImageRequest]:
    """All those of a model have the same pictures, which are resized once."""
    checked: list[ImageRequest] = []
    resized: dict[str | None, dict[str, Any]] = {}
    for request in requests:
        settled = engine.check(msgspec.structs.replace(request, **resized.get(request.model, {})))
        resized[request.model] = {"pictures": settled.pictures, "mask": settled.mask}
        checked.append(settled)
    return checked


async def generate(options: GenerateOptions, engine: AsyncEngine) -> int:
    """Check everything, start the engine, draw, write, report. Returns the exit code."""
    requests = build_requests(options, engine)
    _say_unknown_words(options.prompts, engine)
    pictures.prepare_folder(options.output)
    started = time.monotonic()
    with _progress_bar() as bar:
        task = bar.add_task("starting engine", total=None)
        async with engine:
            ready = time.monotonic()
            bar.update(task, description="drawing", total=sum(map(steps_of, requests)))
            job = _Job(options, engine, requests, lambda steps: bar.update(task, completed=steps))
            await drawing.for_each(requests, job.draw_one)
            finished = time.monotonic()
    report = Report(
        models=tuple(engine.models.specs),
        devices=tuple(device.name for device in engine.devices),
        start_s=round(ready - started, 4),
        total_s=round(finished - ready, 4),
        images=tuple(drawn for drawn in job.drawn if drawn is not None),
        sheet=await asyncio.to_thread(job.write_sheet),
    )
    print_report(report, options.as_json)
    return 0


def steps_of(request: ImageRequest) -> int:
    """So many a settled request has."""
    return (request.num_steps or 0) - skipped_steps(request)


def _say_unknown_words(prompts: tuple[str, ...], engine: AsyncEngine) -> None:
    for name, spec in engine.models.specs.items():
        unknown = dict.fromkeys(word for prompt in prompts for word in unknown_words(spec, prompt))
        if unknown:
            say(f"tetrion: {name} does not know: {one_line(', '.join(unknown))}")


class _Job:
    """The pictures of one command, as far as they are finished. Each file is written as soon as its picture is."""

    def __init__(self, options: GenerateOptions, engine: AsyncEngine, requests: list[ImageRequest], show: Any) -> None:
        self._options = options
        self._engine = engine
        self._show = show
        self._encoders = Encoders()
        self._steps = [0] * len(requests)
        longest_side_px = max(max(request.width or 0, request.height or 0) for request in requests)
        self._cell = contact_sheet.cell_px(len(requests), longest_side_px)
        self._thumbnails: list[contact_sheet.Thumbnail | None] = [None] * len(requests)
        self.drawn: list[Drawn | None] = [None] * len(requests)

    async def draw_one(self, index: int, request: ImageRequest) -> None:
        def on_progress(progress: Progress) -> None:
            self._steps[index] = progress.step_index
            self._show(sum(self._steps))

        result = await drawing.draw(self._engine, request, on_progress)
        self._steps[index] = result.num_steps
        self._show(sum(self._steps))
        writing = self._encoders.run(lambda each: self._write(result, each))
        path, delivered = await drawing.deliver(self._engine, result, writing)
        self.drawn[index] = _describe(result, path, delivered)
        await asyncio.to_thread(self._keep_thumbnail, index, result)

    def _write(self, result: ImageResult, each: Each) -> Path:
        data = pictures.encode(result.image, text=pictures.metadata(result), each=each)
        by = f"-{pictures.slug(result.model)}" if len(self._engine.models.specs) > 1 else ""
        stem = f"{pictures.slug(result.prompt)}-{result.seed}{by}"
        return pictures.write_new_file(self._options.output, stem, ".png", data)

    def _keep_thumbnail(self, index: int, result: ImageResult) -> None:
        self._thumbnails[index] = contact_sheet.thumbnail(result.image, result.prompt, result.seed, self._cell)

    def write_sheet(self) -> str | None:
        if len(self._thumbnails) < 2:
            return None
        thumbnails = [item for item in self._thumbnails if item is not None]
        data = pictures.encode(contact_sheet.contact_sheet(thumbnails, self._cell))
        return str(pictures.write_new_file(self._options.output, "sheet", ".png", data))


def _describe(result: ImageResult, path: Path, delivered: Delivered) -> Drawn:
    return Drawn(
        prompt=result.prompt,
        file=str(path),
        model=result.model,
        seed=result.seed,
        width=result.width,
        height=result.height,
        num_steps=result.num_steps,
        latency_s=round(delivered.latency_s, 4),
        queue_s=round(result.queue_s, 4),
        encode_s=round(result.encode_s, 4),
        denoise_s=round(result.denoise_s, 4),
        decode_s=round(result.decode_s, 4),
        deliver_s=round(delivered.deliver_s, 4),
        degrees=result.degrees,
        degrees_compact=pictures.compact_degrees(result.degrees),
        slo_met=delivered.slo_met,
        energy=result.energy,
    )


def print_report(report: Report, as_json: bool) -> None:
    """Write the report to stdout: one JSON object, or lines for people."""
    if as_json:
        click.echo(msgspec.json.encode(report).decode())
        return
    for drawn in report.images:
        late = "  SLO missed" if drawn.slo_met is False else ""
        click.echo(f"{drawn.file}")
        click.echo(f"  {drawn.prompt}")
        click.echo(
            f"  seed {drawn.seed}  {drawn.width}x{drawn.height}  {drawn.num_steps} steps"
            f"  latency {drawn.latency_s:.3f} s, {drawn.queue_s:.3f} s of it in the queue"
            f"  degrees {drawn.degrees_compact}{late}"
        )
        if drawn.energy.active_j is not None:
            click.echo(
                f"  energy {drawn.energy.active_j:.0f} ± {drawn.energy.uncertainty_j:.0f} J ({drawn.energy.method})"
            )
    if report.sheet is not None:
        click.echo(f"sheet: {report.sheet}")


def _progress_bar() -> ProgressBar:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("steps"))
    return ProgressBar(*columns, TimeElapsedColumn(), console=progress_console())
