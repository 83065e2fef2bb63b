"""Whether models fit into memory, by arithmetic alone, and roles with which they do: told before a worker starts, in
place of after it.

What is counted here is a lower bound, so nothing is refused that would fit; workers look again with all they know.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence

import msgspec

from tetrion.engine.config import DeviceSpec, EngineConfig
from tetrion.engine.hardware.nvml import largest_gpu_bytes
from tetrion.engine.model_spec import ModelSpec, ModelTooLarge
from tetrion.engine.parallel.layout import slab_layout
from tetrion.engine.roles import ALL, AUTO, Stages, parse_roles, roles_text, stages_of
from tetrion.engine.stages import AFTER_STEPS, BEFORE_STEPS, STAGES
from tetrion.engine.transport.available_memory import available_memory_bytes

logger = logging.getLogger(__name__)
FP32_BYTES, BF16_BYTES = 4, 2


def with_roles(
    devices: tuple[DeviceSpec, ...], specs: Sequence[ModelSpec], config: EngineConfig
) -> tuple[DeviceSpec, ...]:
    """The devices with the stages that each serves, as `config.roles` says. Raises ValueError."""
    if config.roles != AUTO:
        roles = parse_roles(config.roles, len(devices))
    elif devices[0].kind == "cpu" or (available := largest_gpu_bytes()) is None:
        roles = parse_roles(ALL, len(devices))
    else:
        layout = slab_layout(specs, len(devices), config.max_inflight, BF16_BYTES)
        roles = roles_that_fit(specs, len(devices), layout.num_bytes, available) or parse_roles(ALL, len(devices))
        if roles_text(roles) != ALL:
            logger.warning("models do not fit on every device: roles %s", roles_text(roles))
    return tuple(msgspec.structs.replace(device, stages=stages) for device, stages in zip(devices, roles, strict=True))


def roles_that_fit(
    specs: Sequence[ModelSpec], num_devices: int, slab_bytes: int, available: int
) -> tuple[Stages, ...] | None:
    """Of GPUs with so much memory each: all stages on all, else encoding on the first and, if need be, decoding, too;
    None if that is too much as well."""
    for roles in _candidates(num_devices):
        if all(_num_bytes(specs, stages) + slab_bytes <= available for stages in set(roles)):
            return roles
    return None


def _candidates(num_devices: int) -> Iterator[tuple[Stages, ...]]:
    yield (STAGES,) * num_devices
    if num_devices > 1:
        yield (BEFORE_STEPS, *((("denoise", *AFTER_STEPS),) * (num_devices - 1)))
        yield ((*BEFORE_STEPS, *AFTER_STEPS), *((("denoise",),) * (num_devices - 1)))


def check_room_on_cpu(specs: Sequence[ModelSpec], slabs_bytes: int) -> None:
    """Weights are in memory once, as fp32, beside all workers' slabs. Raises ModelTooLarge with the numbers."""
    _check(weights_bytes(specs, FP32_BYTES), slabs_bytes, available_memory_bytes(), "are available")


def check_room_on_gpus(specs: Sequence[ModelSpec], slab_bytes: int, devices: Sequence[DeviceSpec]) -> None:
    """Each GPU has the weights of its stages, as bf16, beside its slab. Raises ModelTooLarge with the numbers, and
    with roles that would fit if there are any."""
    available = largest_gpu_bytes()
    if available is None:
        return
    fitting = roles_that_fit(specs, len(devices), slab_bytes, available)
    hint = "" if fitting is None else f"; they fit with roles {roles_text(fitting)}"
    for device in devices:
        weights = weights_bytes(specs, BF16_BYTES, device.stages)
        what = "" if device.stages == STAGES else f" on {device.name} to {', '.join(device.stages)}"
        _check(weights, slab_bytes, available, "is what the largest GPU has", what, hint)


def weights_bytes(specs: Sequence[ModelSpec], itemsize: int, stages: Stages = STAGES) -> dict[str, int]:
    """By component, of those that these stages need. What two models may have in common is counted once."""
    counted: dict[tuple[str, int], str] = {}
    for spec in specs:
        for component, num in spec.weights:
            if set(stages) & set(stages_of(component, pictures_in=spec.max_pictures > 0)):
                counted.setdefault((component, num), component if len(specs) == 1 else f"{spec.name}/{component}")
    return {name: num * itemsize for (_, num), name in counted.items()}


def _num_bytes(specs: Sequence[ModelSpec], stages: Stages) -> int:
    return sum(weights_bytes(specs, BF16_BYTES, stages).values())


def _check(
    weights: Mapping[str, int], slabs_bytes: int, available: int | None, whose: str, what: str = "", hint: str = ""
) -> None:
    wanted = sum(weights.values())
    if available is not None and wanted + slabs_bytes > available:
        parts = ", ".join(f"{name} {_gb(size)}" for name, size in weights.items())
        raise ModelTooLarge(
            f"model: does not fit into memory{what}: weights take {_gb(wanted)} ({parts}), workers' slabs"
            f" {_gb(slabs_bytes)}, {_gb(available)} {whose}{hint}"
        )


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB"
