"""`tetrion batch`: a file of requests in, a folder of pictures and a manifest out; may be stopped and run again.

A picture is skipped if the manifest says it is finished, its file is there and its digest (prompt, size, steps,
guidance, seed, pictures, checkpoint) is the same. One run at a time owns the output folder.

A file is replaced only if it is a batch's picture of that id: the manifest names it, or it says so itself, as one does
whose run was stopped before its manifest line. A line whose picture's name is taken by another file fails.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBar
from rich.text import Text

from tetrion.engine.errors import EngineOverloaded, GenerationError, RequestCancelled, RequestError, one_line
from tetrion.engine.families.words import unknown_words
from tetrion.engine.measure.checkpoint_identity import checkpoint_identity
from tetrion.engine.request import Delivered, ImageRequest, ImageResult
from tetrion.entrypoints import drawing, pictures
from tetrion.entrypoints.batch.lines import BadLine, BatchItem, parse_lines, read_lines
from tetrion.entrypoints.batch.manifest import FILE_NAME, Entry, Manifest
from tetrion.entrypoints.encoders import Encoders
from tetrion.entrypoints.errors import EXIT_FAILED, InputError
from tetrion.entrypoints.png import Each
from tetrion.entrypoints.session import freeze_gc
from tetrion.entrypoints.terminal import progress_console, say

if TYPE_CHECKING:
    from tetrion.engine.api import AsyncEngine

ID_KEY = "batch-id"
"""In a PNG's text: the id of the line that it was drawn for."""


async def batch(requests_file: Path, output: Path, engine: AsyncEngine) -> int:
    """Draw what is not there yet. Returns the exit code: 0 if every line has its picture, else 1."""
    lines = read_lines(requests_file)
    load_format = engine.config.load_format
    checkpoints = {
        name: checkpoint_identity(Path(spec.path), load_format) for name, spec in engine.models.specs.items()
    }
    parsed = list(parse_lines(lines, engine.check, checkpoints, requests_file.parent))
    items = [entry for entry in parsed if isinstance(entry, BatchItem)]
    bad_lines = [entry for entry in parsed if isinstance(entry, BadLine)]
    _say_unknown_words(items, engine)
    pictures.prepare_folder(output)
    with _locked(output):
        manifest = Manifest(output)
        taken = {item.id: item for item in items if _is_taken(item, manifest, output)}
        bad_lines += [BadLine(line=item.line, id=item.id, error=_complaint(item, output)) for item in taken.values()]
        items = [item for item in items if item.id not in taken]
        to_draw = [item for item in items if not _is_done(item, manifest, output)]
        manifest.open(drop={item.id for item in to_draw})
        try:
            for bad in bad_lines:
                say(f"{requests_file}:{bad.line}: {bad.error}")
                manifest.append(Entry(id=bad.id, line=bad.line, status="failed", error=bad.error))
            num_failed = await _draw(to_draw, output, manifest, engine) if to_draw else 0
        finally:
            manifest.close()
    num_drawn, num_skipped = len(to_draw) - num_failed, len(items) - len(to_draw)
    click.echo(f"{num_drawn} drawn, {num_skipped} already there, {num_failed + len(bad_lines)} failed")
    click.echo(f"manifest: {output / FILE_NAME}")
    return EXIT_FAILED if num_failed or bad_lines else 0


def _say_unknown_words(items: list[BatchItem], engine: AsyncEngine) -> None:
    unknown: dict[str, list[str]] = {}
    for item in items:
        model = item.request.model or ""
        unknown.setdefault(model, []).extend(unknown_words(engine.models.specs[model], item.request.prompt))
    for model, words in unknown.items():
        if words:
            say(f"tetrion: {model} does not know: {one_line(', '.join(dict.fromkeys(words)))}")


async def _draw(items: list[BatchItem], output: Path, manifest: Manifest, engine: AsyncEngine) -> int:
    """Draw `items`; returns how many failed."""
    with _progress_bar() as bar:
        task = bar.add_task("starting engine", total=len(items))
        try:
            async with engine:
                freeze_gc()
                bar.reset(task, description="drawing")
                run = _Run(items, output, manifest, engine, bar, task)
                await drawing.for_each((item.request for item in items), run.draw_one)
        except asyncio.CancelledError:
            done = round(bar.tasks[0].completed)
            bar.console.print(f"interrupted after {done} of {len(items)}; the same command goes on from here")
            raise
    return run.num_failed


class _Run:
    """Draws single items, writing each picture and its manifest line as soon as it is finished."""

    def __init__(
        self,
        items: list[BatchItem],
        output: Path,
        manifest: Manifest,
        engine: AsyncEngine,
        bar: ProgressBar,
        task: TaskID,
    ) -> None:
        self._items, self._output, self._manifest = items, output, manifest
        self._engine, self._bar, self._task = engine, bar, task
        self._encoders = Encoders()
        self.num_failed = 0

    async def draw_one(self, index: int, request: ImageRequest) -> None:
        item = self._items[index]
        try:
            result = await drawing.draw(self._engine, request, lambda progress: None)
        except (GenerationError, RequestError, EngineOverloaded, RequestCancelled) as error:
            self._fail(item, str(error))
        else:
            await drawing.uninterrupted(self._keep(item, result))

    async def _keep(self, item: BatchItem, result: ImageResult) -> None:
        try:
            writing = self._encoders.run(lambda each: self._write_picture(item, result, each))
            _, delivered = await drawing.deliver(self._engine, result, writing)
        except InputError as error:
            self._fail(item, str(error))
        else:
            self._record(_finished(item, result, delivered))

    def _fail(self, item: BatchItem, error: str) -> None:
        self.num_failed += 1
        complaint = f"line {item.line} ({item.id}): {error}"
        self._bar.console.print(complaint, markup=False, highlight=False, soft_wrap=True)
        self._record(Entry(id=item.id, line=item.line, status="failed", digest=item.digest, error=error))

    def _record(self, entry: Entry) -> None:
        self._manifest.append(entry)
        self._bar.advance(self._task)

    def _write_picture(self, item: BatchItem, result: ImageResult, each: Each) -> None:
        """Raises InputError if another file has come to have the picture's name since the start."""
        data = pictures.encode(result.image, text=pictures.metadata(result) | {ID_KEY: item.id}, each=each)
        if _is_taken(item, self._manifest, self._output):
            raise InputError(_complaint(item, self._output))
        pictures.replace_file(self._output / item.file, data)


def _finished(item: BatchItem, result: ImageResult, delivered: Delivered) -> Entry:
    return Entry(
        id=item.id,
        line=item.line,
        status="finished",
        file=item.file,
        digest=item.digest,
        model=result.model,
        prompt=result.prompt,
        seed=result.seed,
        width=result.width,
        height=result.height,
        num_steps=result.num_steps,
        latency_s=round(delivered.latency_s, 4),
        deliver_s=round(delivered.deliver_s, 4),
        degrees=result.degrees,
        slo_met=delivered.slo_met,
        energy=result.energy,
    )


def _is_done(item: BatchItem, manifest: Manifest, output: Path) -> bool:
    entry = manifest.finished.get(item.id)
    return entry is not None and entry.digest == item.digest and (output / item.file).is_file()


def _is_taken(item: BatchItem, manifest: Manifest, output: Path) -> bool:
    """Whether a file that no batch drew for this id has its picture's name."""
    path = output / item.file
    if item.id in manifest.finished or not os.path.lexists(path):
        return False
    return pictures.read_text(path).get(ID_KEY) != item.id


def _complaint(item: BatchItem, output: Path) -> str:
    path = str(output / item.file)
    return f"id: {path!r} exists and is not of this batch; move it away or give the line another id"


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Own `folder` until the end, or until this process dies. What a killed run left half-written is removed."""
    fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"output: another batch is writing to {str(folder)!r}") from None
        for leftover in folder.glob(f"{pictures.TEMPORARY_PREFIX}*.tmp"):
            leftover.unlink(missing_ok=True)
        yield
    finally:
        os.close(fd)


class _RateColumn(ProgressColumn):
    """Mean since the start: pictures finish in bursts, so that a rate over the last few says nothing."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.completed / task.elapsed:.2f} pictures/s" if task.completed and task.elapsed else "")


def _progress_bar() -> ProgressBar:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _RateColumn(), TextColumn("ETA"))
    return ProgressBar(*columns, TimeRemainingColumn(), console=progress_console())
