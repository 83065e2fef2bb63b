"""Start-up measurement: the cost table the planner starts from, and whether the degree shows in the latents.

Runs ordinary commands on the workers before the loop does: at two sizes, every legal degree, a few steps. Both results
are kept in the user's cache, keyed by everything that may change them. The table is a start: the loop corrects it
from every step it sees.
"""

import hashlib
import logging
import os
import platform
from importlib.metadata import version
from itertools import product
from pathlib import Path

import msgspec
import numpy as np

from tetrion.engine.config import EngineConfig, threads_per_worker
from tetrion.engine.executors.processes import ProcessExecutor
from tetrion.engine.hardware.gpus import visible_gpus
from tetrion.engine.hardware.host import cpu_name
from tetrion.engine.loop.requests import Request
from tetrion.engine.measure.checkpoint_identity import checkpoint_identity
from tetrion.engine.measure.probe import Probe, Size
from tetrion.engine.measure.profile_files import cache_folder
from tetrion.engine.model_spec import ModelSpec
from tetrion.engine.planning.cost.profile import Profile
from tetrion.engine.shape import parse_cost_key

logger = logging.getLogger(__name__)
NUM_STEPS = 2
NUM_STEPS_ON_GPU = 4
"""Steps per measurement, of which the quickest counts: other load only adds. A GPU's first one records the step."""
LONG_ON_CPU = 128
"""Above this square, in pixels, a CPU takes one step: it lasts long enough to be a measurement."""
LARGEST_ON_CPU = 256
SIZES_ON_GPU = (512, 1024)
"""Squares, in pixels, measured besides the model's smallest and largest."""
ODD_SIDES_ON_GPU = (17, 23, 29, 37, 43, 53, 65)
"""Further squares, in rows a side: which kernel a library takes depends on the number of rows, and each is loaded at
its first use, which takes milliseconds."""
BUSY_LOAD = 1.5
"""Load average per core above which a measurement only serves until the machine is less busy."""


class Calibration(msgspec.Struct, frozen=True, kw_only=True):
    """`inexact_degrees`: those whose latents differed from degree 1's by a single bit. `was_busy`: with other load on
    the machine, so that the times are too long."""

    profile: Profile
    inexact_degrees: tuple[int, ...]
    was_busy: bool


async def calibrate(
    executor: ProcessExecutor, spec: ModelSpec, config: EngineConfig, table: Profile | None = None
) -> Calibration:
    """The cached calibration for this model and machine, else a fresh one (about a second per degree on a CPU).
    `table`: the cost table that is used in its place; its sizes are warmed up, too."""
    path = _cache_path(executor, spec, config) if config.profile_cache else None
    calibrator, is_busy = Calibrator(executor, spec), _machine_is_busy()
    if path is not None:
        cached = _read(path)
        if cached is not None and (is_busy or not cached.was_busy):
            await calibrator.warm_up(table)
            return cached
    calibration = await calibrator.run(was_busy=is_busy)
    await calibrator.warm_up(table)
    if path is not None:
        _write(path, calibration)
    if calibration.inexact_degrees:
        logger.warning("degrees %s do not reproduce degree 1 bit for bit here", calibration.inexact_degrees)
    return calibration


class Calibrator:
    """Measures on an executor that nobody else uses meanwhile."""

    def __init__(self, executor: ProcessExecutor, spec: ModelSpec) -> None:
        self._executor = executor
        self._spec = spec
        self._probe = Probe(executor, spec)

    async def run(self, was_busy: bool) -> Calibration:
        probe, classes, inexact = self._probe, {}, set()
        for size in ((pixels, pixels) for pixels in self._sizes()):
            num_steps = self._num_steps(size)
            encode_s = await encode_s_of(probe, size, self._num_repeats)
            reference, step_ms = None, {}
            for degree in self._legal_degrees(probe.request(size, num_steps)):
                request = probe.request(size, num_steps)
                await probe.encode(request)
                chunks = [await probe.denoise(request, [(probe.able("denoise")[:degree], 1)]) for _ in range(num_steps)]
                step_ms[degree] = 1e3 * min(times.step_s for (times,) in chunks)
                latents = await probe.latents(request)
                reference = latents if reference is None else reference
                if not np.array_equal(latents, reference):
                    inexact.add(degree)
            decode_s = await decode_s_of(probe, request, self._num_repeats)
            classes[request.cost_key] = {
                "step_ms": step_ms,
                "encode_ms": encode_s * 1e3,
                "decode_ms": decode_s * 1e3,
            }
        profile = msgspec.convert({"heads": self._spec.num_key_heads, "classes": classes}, Profile)
        return Calibration(profile=profile, inexact_degrees=tuple(sorted(inexact)), was_busy=was_busy)

    async def warm_up(self, table: Profile | None = None) -> None:
        """One step at every usual size (those measured here, the model's default and those of `table`) and degree on
        every GPU, so that its worker has recorded them and loaded all kernels before the first request comes: what is
        recorded later holds up the group that wants it. Where pictures are references, also with one. CPUs have nothing
        to load."""
        devices, pictures = self._probe.able("denoise"), (False, True)[: 1 + self._spec.takes_references]
        for size, with_picture in product(self._usual_sizes(table) if self._on_gpu else [], pictures):
            for degree in self._legal_degrees(self._probe.request(size, 1)):
                groups = [
                    tuple(devices[(first + rank) % len(devices)] for rank in range(degree))
                    for first in range(0, len(devices), degree)
                ]
                await self._probe.rehearse(
                    size, groups, decoding=degree == 1 and not with_picture, with_picture=with_picture
                )

    def _legal_degrees(self, request: Request) -> tuple[int, ...]:
        return self._spec.legal_degrees(len(self._probe.able("denoise")), request.params.shape.num_branches)

    @property
    def _on_gpu(self) -> bool:
        return self._executor.devices[0].kind == "cuda"

    def _sizes(self) -> list[int]:
        """Squares, in pixels: the smallest and the largest; on a CPU nothing above 256, which would take long."""
        spec = self._spec
        if not self._on_gpu:
            return sorted({spec.sizes.min, max(spec.sizes.min, min(spec.sizes.max, LARGEST_ON_CPU))})
        return sorted(
            {spec.sizes.min, spec.sizes.max, *(s for s in SIZES_ON_GPU if spec.sizes.min < s < spec.sizes.max)}
        )

    def _usual_sizes(self, table: Profile | None) -> list[Size]:
        """Smallest first."""
        spec = self._spec
        odd = (rows * spec.sizes.multiple for rows in ODD_SIDES_ON_GPU)
        sides = {*self._sizes(), *(pixels for pixels in odd if spec.sizes.accept(pixels))}
        sizes = {(pixels, pixels) for pixels in sides} | {spec.sizes.default}
        keys = map(parse_cost_key, table.classes if table else ())
        sizes |= {
            (key.width, key.height) for key in keys if spec.sizes.accept(key.width) and spec.sizes.accept(key.height)
        }
        return sorted(sizes, key=lambda size: (size[0] * size[1], size))

    def _num_steps(self, size: Size) -> int:
        if self._on_gpu:
            return NUM_STEPS_ON_GPU
        return 1 if size[0] > LONG_ON_CPU else NUM_STEPS

    @property
    def _num_repeats(self) -> int:
        """A GPU's first time at something includes loading its kernels."""
        return 2 if self._on_gpu else 1


async def encode_s_of(probe: Probe, size: Size, num_repeats: int) -> float:
    """The quickest of some encodes of new prompts."""
    events = [await probe.encode(probe.request(size, 1, probe.new_prompt())) for _ in range(num_repeats)]
    return min(event.ended_s - event.started_s for event in events)


async def decode_s_of(probe: Probe, request: Request, num_repeats: int) -> float:
    """The quickest of some decodes of a finished request."""
    events = [await probe.decode(request) for _ in range(num_repeats)]
    return min(event.ended_s - event.started_s for event in events)


def _cache_path(executor: ProcessExecutor, spec: ModelSpec, config: EngineConfig) -> Path | None:
    """One file per model contents, machine, worker count, threads and library versions; None without a cache."""
    folder = cache_folder()
    if folder is None:
        logger.info("calibration not cached: the user has no home, and XDG_CACHE_HOME is not set")
        return None
    num_workers = len(executor.device_ids)
    gpus = visible_gpus() if executor.devices[0].kind == "cuda" else ()
    facts = (
        msgspec.json.encode(spec, order="deterministic"),
        checkpoint_identity(Path(spec.path), config.load_format),
        (config.peer_access, [(device.name, device.stages, *gpus[device.index :][:1]) for device in executor.devices]),
        threads_per_worker(config, num_workers),
        (platform.machine(), platform.node(), cpu_name(), os.cpu_count()),
        (version("torch"), version("tetrion")),
    )
    return folder / f"{hashlib.sha256(repr(facts).encode()).hexdigest()[:32]}.json"


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
