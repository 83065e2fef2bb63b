"""Start-up measurement: the cost table the planner starts from, and whether the degree shows in the latents.

Runs ordinary commands on the workers before the loop does: at two sizes, every legal degree, a few steps. Both results
are kept in the user's cache, keyed by everything that may change them. The table is a start: the loop corrects it
from every step it sees.
"""

import contextlib
import hashlib
import itertools
import logging
import os
import platform
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from tetrion.engine.commands import decode_command, denoise_command, encode_command
from tetrion.engine.config import EngineConfig, threads_per_worker
from tetrion.engine.executor import WorkerLost
from tetrion.engine.machine import cpu_name
from tetrion.engine.messages import CopyLatents, Decoded, Denoised, Encoded, Event, Failed, GroupCommand, LatentsCopied
from tetrion.engine.model_spec import ModelSpec
from tetrion.engine.planning.profile import Profile
from tetrion.engine.planning.snapshot import Assignment
from tetrion.engine.process_executor import ProcessExecutor
from tetrion.engine.request import GenerationError, ImageRequest
from tetrion.engine.request_table import Request

logger = logging.getLogger(__name__)
PROMPT = "a red circle left of a large blue star"
SEED = 1
NUM_STEPS = 4
"""Steps per measurement. The quickest counts: noise on a shared machine only ever adds."""
BUSY_LOAD = 1.5
"""Load average per core above which a measurement is not worth keeping."""


class Calibration(msgspec.Struct, frozen=True, kw_only=True):
    """`inexact_degrees`: those whose latents differed from degree 1's by a single bit."""

    profile: Profile
    inexact_degrees: tuple[int, ...]


async def calibrate(executor: ProcessExecutor, spec: ModelSpec, config: EngineConfig) -> Calibration:
    """The cached calibration for this model and machine, else a fresh one (about a second per degree on a CPU)."""
    path = _cache_path(executor, spec, config)
    if config.profile_cache:
        cached = _read(path)
        if cached is not None:
            return cached
    calibration = await Calibrator(executor, spec).run()
    if config.profile_cache and not _machine_is_busy():
        _write(path, calibration)
    if calibration.inexact_degrees:
        logger.warning("degrees %s do not reproduce degree 1 bit for bit here", calibration.inexact_degrees)
    return calibration


class Calibrator:
    """Measures on an executor that nobody else uses meanwhile."""

    def __init__(self, executor: ProcessExecutor, spec: ModelSpec) -> None:
        self._executor = executor
        self._spec = spec
        self._ids = itertools.count(1000)

    async def run(self) -> Calibration:
        classes, inexact = {}, set()
        for size in self._sizes():
            reference, step_ms = None, {}
            for degree in self._spec.legal_degrees(len(self._executor.device_ids)):
                request = self._request(size)
                encode_s = await self._encode_s(request)
                step_ms[degree] = 1e3 * await self._step_s(request, degree)
                latents = await self._latents(request)
                reference = latents if reference is None else reference
                if not np.array_equal(latents, reference):
                    inexact.add(degree)
            decode_s = await self._decode_s(request)
            classes[f"{size}x{size}"] = {"step_ms": step_ms, "encode_ms": encode_s * 1e3, "decode_ms": decode_s * 1e3}
        profile = msgspec.convert({"heads": self._spec.num_heads, "classes": classes}, Profile)
        return Calibration(profile=profile, inexact_degrees=tuple(sorted(inexact)))

    def _sizes(self) -> list[int]:
        """The smallest and the largest square, in pixels; nothing above 512, where a CPU would take minutes."""
        spec = self._spec
        return sorted({spec.min_size, max(spec.min_size, min(spec.max_size, 512))})

    def _request(self, size: int) -> Request:
        """A fresh request in slot 0, which starts on device 0."""
        params = ImageRequest(
            prompt=PROMPT,
            width=size,
            height=size,
            num_steps=NUM_STEPS,
            guidance=self._spec.guidance,
            seed=SEED,
            request_id="calibration",
        )
        request = Request(params, self._executor.now_s())
        request.slot, request.state_id, request.planned_holders = 0, next(self._ids), (0,)
        return request

    async def _encode_s(self, request: Request) -> float:
        (encoded,) = await self._run(encode_command(request, next(self._ids)), (0,))
        assert isinstance(encoded, Encoded)
        return encoded.ended_s - encoded.started_s

    async def _step_s(self, request: Request, degree: int) -> float:
        """Seconds per step of an encoded request, all steps of which are run on devices 0 … degree - 1."""
        members, times = tuple(range(degree)), []
        for step_index in range(NUM_STEPS):
            request.planned_step_index = step_index
            step = Assignment(request_id=request.request_id, stage="denoise", members=members, chunk_steps=1)
            events = await self._run(denoise_command(request, next(self._ids), 0, step), members)
            request.planned_holders = members
            times.append(max(e.ended_s - e.started_s - e.waited_s for e in events if isinstance(e, Denoised)))
        return min(times)

    async def _latents(self, request: Request) -> npt.NDArray[np.float32]:
        width, height = request.size
        with self._image_slot() as image_slot:
            copy = CopyLatents(
                command_id=next(self._ids),
                request_id=request.request_id,
                state_id=request.state_id,
                slot=request.slot,
                width=width,
                height=height,
                image_slot=image_slot,
            )
            (copied,) = await self._run(copy, (0,))
            assert isinstance(copied, LatentsCopied)
            return self._executor.read_latents(image_slot, copied.num_tokens, copied.num_channels)

    async def _decode_s(self, request: Request) -> float:
        with self._image_slot() as image_slot:
            (decoded,) = await self._run(decode_command(request, next(self._ids), 0, image_slot), (0,))
        assert isinstance(decoded, Decoded)
        return decoded.ended_s - decoded.started_s

    @contextlib.contextmanager
    def _image_slot(self) -> Iterator[int]:
        image_slot = self._executor.acquire_image_slot()
        assert image_slot is not None, "an idle engine has free image slots"
        try:
            yield image_slot
        finally:
            self._executor.release_image_slot(image_slot)

    async def _run(self, command: GroupCommand, members: tuple[int, ...]) -> list[Event]:
        """Give a command and wait for every member's answer. Raises GenerationError if one fails."""
        assert self._executor.submit(command, members), "the rings of an idle engine have room"
        answers: list[Event] = []
        while len(answers) < len(members):
            for event in self._executor.poll():
                if isinstance(event, WorkerLost):
                    raise GenerationError(f"worker {event.device_id} ended while measuring: {event.reason}")
                if isinstance(event, Failed):
                    raise GenerationError(f"worker {event.device_id} failed while measuring: {event.message}")
                answers.append(event)
            if len(answers) < len(members):
                await self._executor.wait(None)
        return answers


def _cache_path(executor: ProcessExecutor, spec: ModelSpec, config: EngineConfig) -> Path:
    """One file per model contents, machine, worker count, threads and library versions."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(spec.path)
    files = [(str(p.relative_to(folder)), p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(folder.rglob("*.*"))]
    num_workers = len(executor.device_ids)
    facts = (
        msgspec.json.encode(spec),
        files,
        num_workers,
        threads_per_worker(config, num_workers),
        (platform.machine(), platform.node(), cpu_name(), os.cpu_count()),
        (version("torch"), version("tetrion")),
    )
    return base / "tetrion" / "profiles" / f"{hashlib.sha256(repr(facts).encode()).hexdigest()[:32]}.json"


def _machine_is_busy() -> bool:
    return os.getloadavg()[0] > BUSY_LOAD * (os.cpu_count() or 1)


def _read(path: Path) -> Calibration | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=Calibration)
    except (OSError, msgspec.DecodeError):
        return None


def _write(path: Path, calibration: Calibration) -> None:
    """Best effort: a cache that cannot be written costs the next start a second."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_bytes(msgspec.json.encode(calibration))
        temporary.replace(path)
    except OSError as error:
        logger.info("calibration not cached: %s", error)
