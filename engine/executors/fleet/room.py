"""Whether models fit into memory, by arithmetic alone: told before a worker starts, in place of after it.

What is counted here is a lower bound, so nothing is refused that would fit; workers look again with all they know.
"""

from collections.abc import Mapping, Sequence

from tetrion.engine.hardware.nvml import largest_gpu_bytes
from tetrion.engine.model_spec import ModelSpec, ModelTooLarge
from tetrion.engine.transport.available_memory import available_memory_bytes

FP32_BYTES, BF16_BYTES = 4, 2


def check_room_on_cpu(specs: Sequence[ModelSpec], slabs_bytes: int) -> None:
    """Weights are in memory once, as fp32, beside all workers' slabs. Raises ModelTooLarge with the numbers."""
    _check(weights_bytes(specs, FP32_BYTES), slabs_bytes, available_memory_bytes(), "are available")


def check_room_on_gpus(specs: Sequence[ModelSpec], slab_bytes: int) -> None:
    """Each GPU has the weights, as bf16, beside its slab. Raises ModelTooLarge with the numbers."""
    _check(weights_bytes(specs, BF16_BYTES), slab_bytes, largest_gpu_bytes(), "is what the largest GPU has")


def weights_bytes(specs: Sequence[ModelSpec], itemsize: int) -> dict[str, int]:
    """By component. What two models may have in common is counted once."""
    counted: dict[tuple[str, int], str] = {}
    for spec in specs:
        for component, num in spec.weights:
            counted.setdefault((component, num), component if len(specs) == 1 else f"{spec.name}/{component}")
    return {name: num * itemsize for (_, num), name in counted.items()}


def _check(weights: Mapping[str, int], slabs_bytes: int, available: int | None, what: str) -> None:
    wanted = sum(weights.values())
    if available is not None and wanted + slabs_bytes > available:
        parts = ", ".join(f"{name} {_gb(size)}" for name, size in weights.items())
        raise ModelTooLarge(
            f"model: does not fit into memory: weights take {_gb(wanted)} ({parts}), workers' slabs {_gb(slabs_bytes)},"
            f" {_gb(available)} {what}"
        )


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB"
