"""`tetrion profile`: measure the cost table that the planner reads, on this machine's devices.

Owns what is measured and the file's form. Commands and their times are the engine's own (`engine/measure/probe.py`).
"""

import math
import statistics
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from tetrion.engine.config import EngineConfig, parse_devices
from tetrion.engine.energy.metering import open_meter
from tetrion.engine.energy.meters.base import EnergyMeter
from tetrion.engine.energy.meters.nvml import canonical_uuid
from tetrion.engine.executors.processes import ProcessExecutor
from tetrion.engine.families.served import read_model
from tetrion.engine.hardware.host import cpu_name
from tetrion.engine.measure.calibration import decode_s_of, encode_s_of
from tetrion.engine.measure.probe import PROMPT, Probe, Size
from tetrion.engine.measure.profile_files import cache_folder, profile_file_name, single_gpu_name
from tetrion.engine.model_spec import ModelSpec
from tetrion.engine.planning.cost.profile import ClassCost, Profile
from tetrion.engine.request import ImageRequest
from tetrion.engine.resolve import resolve_request
from tetrion.engine.stages import AUX_STAGES
from tetrion.entrypoints.arguments import parse_degrees, parse_size
from tetrion.entrypoints.errors import InputError
from tetrion.entrypoints.options import only_model, refuse_roles
from tetrion.entrypoints.profile_energy import StageMeter
from tetrion.entrypoints.record import commit, host_facts
from tetrion.entrypoints.session import run_async

DEFAULT_SIZES = ((256, 256), (512, 512), (1024, 1024), (1536, 1024), (2048, 2048))
REPEATS = 3
"""Chunks of each size and degree; the median counts."""
Row = dict[str, Any]


class ProfileOptions(msgspec.Struct, frozen=True, kw_only=True):
    """`num_steps`: of each measured chunk."""

    sizes: tuple[Size, ...]
    degrees: tuple[int, ...]
    num_steps: int = 8


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """One size. `key`: the text of its `CostKey`, with the guidance branches that the model draws in unless told
    otherwise. `self_test`: whether each degree's latents are the first degree's, bit for bit."""

    key: str
    cost: ClassCost
    self_test: tuple[Row, ...]


def checked_sizes(spec: ModelSpec, text: str | None, usual: Sequence[Size]) -> tuple[Size, ...]:
    """`256x256,512x256` as sizes; without it those of `usual` that the model draws, or its own. Raises InputError."""
    if not text:
        fitting = [size for size in usual if spec.sizes.min <= min(size) and max(size) <= spec.sizes.max]
        return tuple(fitting) or (spec.sizes.default,)
    sizes = tuple(parse_size(part) for part in text.split(","))
    for size in sizes:
        if any(side % spec.sizes.multiple or not spec.sizes.min <= side <= spec.sizes.max for side in size):
            raise InputError(
                f"sizes: sides must be multiples of {spec.sizes.multiple} from {spec.sizes.min} to {spec.sizes.max}"
                f" for model {spec.name!r}, got {size_name(size)}"
            )
    return sizes


def checked_degrees(spec: ModelSpec, num_devices: int, text: str | None) -> tuple[int, ...]:
    """`1,2` as degrees, ascending; without it all that the devices allow. Raises InputError."""
    usual = resolve_request(ImageRequest(prompt=PROMPT), spec, num_devices).params.shape
    legal = spec.legal_degrees(num_devices, usual.num_branches)
    wanted = parse_degrees(text, "degrees") if text else legal
    if unknown := sorted(set(wanted) - set(legal)):
        raise InputError(f"degrees: {unknown[0]} is not one of {', '.join(map(str, legal))}")
    return tuple(sorted(set(wanted)))


def size_name(size: Size) -> str:
    return f"{size[0]}x{size[1]}"


async def measure(probe: Probe, options: ProfileOptions, meter: StageMeter) -> AsyncIterator[Measured]:
    """Each size in turn: encode, every degree's steps, decode; seconds, and joules where there is a meter."""
    for size in options.sizes:
        encode_s = await encode_s_of(probe, size, REPEATS)
        step_ms: dict[int, float] = {}
        step_j: dict[int, float] = {}
        reference, self_test = None, []
        for degree in options.degrees:
            request = probe.request(size, 1 + REPEATS * options.num_steps)
            await probe.encode(request)
            members = tuple(range(degree))
            await probe.denoise(request, [(members, 1)])  # records the step's graph, loads kernels
            chunks = await probe.denoise(request, [(members, options.num_steps)] * REPEATS)
            step_ms[degree] = 1e3 * statistics.median(chunk.step_s for chunk in chunks)
            latents = await probe.latents(request)
            reference = latents if reference is None else reference
            self_test.append(
                {
                    "size": request.cost_key,
                    "degree": degree,
                    "bit_identical": bool(np.array_equal(latents, reference)),
                    "max_difference": float(np.abs(latents - reference).max()),
                }
            )
        decode_s = await decode_s_of(probe, request, REPEATS)
        decode_j = await meter.repeated_j(lambda request=request: probe.decode(request), 0, decode_s)  # type: ignore[misc]
        for degree in options.degrees:  # these take the slot of the request that was decoded
            joules = await meter.step_j(size, tuple(range(degree)), options.num_steps, step_ms[degree] / 1e3)
            step_j |= {} if joules is None else {degree: joules}
        cost = ClassCost(
            step_ms=step_ms,
            encode_ms=1e3 * encode_s,
            decode_ms=1e3 * decode_s,
            step_j=step_j,
            encode_j=await meter.repeated_j(lambda size=size: _encode_anew(probe, size), 0, encode_s),  # type: ignore[misc]
            decode_j=decode_j,
        )
        yield Measured(key=request.cost_key, cost=cost, self_test=tuple(self_test))


async def _encode_anew(probe: Probe, size: Size) -> None:
    await probe.encode(probe.request(size, 1, probe.new_prompt()))


def assemble(
    spec: ModelSpec,
    device_name: str,
    measured: list[Measured],
    command_line: str,
    meter: StageMeter,
    facts: dict[str, Any],
) -> Profile:
    """The file's contents. `facts`: host and memory."""
    tests = [row for size in measured for row in size.self_test]
    return Profile(
        heads=spec.num_key_heads,
        classes={size.key: size.cost for size in measured},
        gpu=device_name,
        model=spec.name,
        commit=commit() or "",
        command=command_line,
        meta={
            "batch": 1,
            "step_j_source": None if meter.reason else f"measured with {meter.source}, on the GPUs at work",
            "step_j_reason": meter.reason or None,
            "inexact_degrees": sorted({row["degree"] for row in tests if not row["bit_identical"]}),
            "self_test": tests,
            **facts,
        },
    )


def memory_facts(spec: ModelSpec, config: EngineConfig, kind: str, num_devices: int) -> dict[str, Any]:
    """The memory budget of one device, in bytes and in words."""
    from tetrion.engine.executors.fleet.segments import ITEMSIZE
    from tetrion.engine.models.memory_budget import memory_budget  # these import torch
    from tetrion.engine.models.registry import all_components
    from tetrion.engine.parallel.layout import slab_layout

    layout = slab_layout([spec], num_devices, config.max_inflight, ITEMSIZE[kind])
    budget = memory_budget([spec], all_components([spec], config.load_format), layout)
    return msgspec.to_builtins(budget) | {"num_bytes": budget.num_bytes, "text": budget.describe()}


def table(profile: Profile) -> str:
    """The costs as text for people."""
    degrees = sorted({degree for cost in profile.classes.values() for degree in cost.step_ms})
    head = "".join(f"{f'step at {degree}':>12}" for degree in degrees)
    head += "".join(f"{stage:>10}" for stage in AUX_STAGES)
    lines = [f"{'ms':<12}{head}"]
    for size, cost in profile.classes.items():
        steps = "".join(
            f"{cost.step_ms[degree]:>12.2f}" if degree in cost.step_ms else f"{'–':>12}" for degree in degrees
        )
        aux = "".join(f"{cost.aux_ms[stage]:>10.2f}" for stage in AUX_STAGES)
        lines.append(f"{size:<12}{steps}{aux}")
    inexact = [row for row in profile.meta["self_test"] if not row["bit_identical"]]
    for row in inexact:
        lines.append(f"inexact: {row['size']} at degree {row['degree']} differs by {row['max_difference']:.3g}")
    if not inexact:
        lines.append("self-test: every degree gives the first one's latents, bit for bit")
    lines += _joules_table(profile, degrees)
    lines.append(f"memory of one device: {profile.meta['memory']['text']}")
    return "\n".join(lines)


def _joules_table(profile: Profile, degrees: Sequence[int]) -> list[str]:
    lines = []
    for size, cost in profile.classes.items():
        if cost.step_j:
            steps = "".join(f"{cost.step_j.get(degree, math.nan):>12.2f}" for degree in degrees)
            aux = "".join(f"{cost.aux_j.get(stage, math.nan):>10.2f}" for stage in AUX_STAGES)
            lines.append(f"{size:<12}{steps}{aux}")
    if profile.meta["step_j_reason"]:
        return [*lines, f"joules: not metered: {profile.meta['step_j_reason']}"]
    return [f"joules, {profile.meta['step_j_source']}", *lines]


def command(
    config: EngineConfig,
    *,
    sizes: str | None = None,
    degrees: str | None = None,
    num_steps: int = 8,
    output: Path | None = None,
    command_line: str = "tetrion profile",
) -> int:
    """What `tetrion profile` does: measure, write the file (after every size, so that it is never lost), print it."""
    refuse_roles(config)
    spec = read_model(only_model(config), config.load_format)
    try:
        devices = parse_devices(config.devices)
    except ValueError as error:
        raise InputError(str(error)) from error
    options = ProfileOptions(
        sizes=checked_sizes(spec, sizes, DEFAULT_SIZES),
        degrees=checked_degrees(spec, len(devices), degrees),
        num_steps=num_steps,
    )
    device_name = single_gpu_name(devices) or (cpu_name() if devices[0].kind == "cpu" else "mixed")
    path = output or _in_cache(profile_file_name(device_name, spec.name))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"output: cannot make {str(path.parent)!r}: {error.strerror}; name a file") from None
    memory = memory_facts(spec, config, devices[0].kind, len(devices))
    report = _to_stderr

    async def run() -> int:
        executor = ProcessExecutor(devices, [spec], config)
        report(f"starting {len(devices)} workers with {spec.name!r}")
        await executor.start()
        measured: list[Measured] = []
        try:
            uuids = {device_id: canonical_uuid(uuid) for device_id, uuid in executor.device_uuids.items()}
            probe = Probe(executor, spec)
            meter = StageMeter(probe, _open_meter(config, tuple(dict.fromkeys(uuids.values()))), uuids)
            async for size in measure(probe, options, meter):
                measured.append(size)
                facts = {
                    "num_devices": len(devices),
                    "exchange": executor.exchange,
                    "load_format": config.load_format,
                    "host": host_facts(),
                    "memory": memory,
                }
                profile = assemble(spec, device_name, measured, command_line, meter, facts)
                path.write_bytes(msgspec.json.format(msgspec.json.encode(profile), indent=1) + b"\n")
                report(f"{size.key} done")
        finally:
            await executor.close()
        print(table(profile))
        print(f"written to {path}")
        return 0

    return run_async(run())


def _in_cache(name: str) -> Path:
    folder = cache_folder()
    if folder is None:
        raise InputError("output: name a file; the user has no home where a cache could be")
    return folder / name


def _open_meter(config: EngineConfig, uuids: tuple[str, ...]) -> EnergyMeter:
    try:
        return open_meter(config.metering.meter, uuids)
    except ValueError as error:
        raise InputError(str(error)) from None


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
