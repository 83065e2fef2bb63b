"""What a model takes of a GPU's memory, as arithmetic: weights exactly, working memory as upper estimates.

Owns the figures and the refusal; allocates nothing and asks no device.
"""

import math
from collections.abc import Mapping, Sequence

import msgspec

from tetrion.engine.model_spec import ModelSpec, ModelTooLarge
from tetrion.engine.models.loading import Component, planned_shapes, same_components
from tetrion.engine.models.recording import Gemm, step_operators
from tetrion.engine.parallel.layout import SlabLayout, scratch_elements
from tetrion.engine.roles import EXAMPLE, Stages
from tetrion.engine.stages import STAGES

STEP_GEMMS = 3
"""What is alive at a step's widest point, in inputs and outputs of its widest GEMM (a block's MLP at degree 1)."""
DECODE_CHANNELS = 5 * 256
"""Channels of full-size feature maps alive at the decoder's widest point."""
TILED_PIXELS = 1536 * 1024
"""Larger pictures are decoded in overlapping tiles where there is no memory to decode them whole."""


class MemoryBudget(msgspec.Struct, frozen=True, kw_only=True):
    """`weights_bytes` by component; `slab_bytes`: what a worker takes at its start, for requests' states and the
    exchange; `step_bytes`: activations of the largest picture's step; `decode_bytes`: likewise of its decoding. The two
    never run at once, but memory once taken is kept. `whole_pixels`: larger pictures are decoded in tiles."""

    model: str
    weights_bytes: Mapping[str, int]
    slab_bytes: int
    step_bytes: int
    decode_bytes: int
    whole_pixels: int
    stages: Stages = STAGES

    @property
    def num_bytes(self) -> int:
        return sum(self.weights_bytes.values()) + self.slab_bytes + self.step_bytes + self.decode_bytes

    def fitted(self, free_bytes: int, device: str) -> "MemoryBudget":
        """This one, or with large pictures decoded in tiles if it takes that. Raises ModelTooLarge with the numbers if
        that is still more than is free."""
        if self.num_bytes <= free_bytes:
            return self
        if self.whole_pixels > TILED_PIXELS:
            tiled_bytes = self.decode_bytes * TILED_PIXELS // self.whole_pixels
            tiled = msgspec.structs.replace(self, decode_bytes=tiled_bytes, whole_pixels=TILED_PIXELS)
            return tiled.fitted(free_bytes, device)
        raise ModelTooLarge(f"devices: {device} has {_gb(free_bytes)} of memory free, {self.describe()}{self._hint}")

    @property
    def _hint(self) -> str:
        """Told who has not tried it."""
        others = "several devices" if self.stages == STAGES else "other devices"
        return f"; with roles ({EXAMPLE}) stages, and the weights of each, can be parted among {others}"

    def describe(self) -> str:
        weights = ", ".join(f"{name} {_gb(count)}" for name, count in self.weights_bytes.items())
        what = "" if self.stages == STAGES else f" to {', '.join(self.stages)}"
        return (
            f"model {self.model} takes{what} {_gb(self.num_bytes)}: weights {_gb(sum(self.weights_bytes.values()))}"
            f" ({weights}), slab {_gb(self.slab_bytes)}, a step's activations {_gb(self.step_bytes)},"
            f" decoding {_gb(self.decode_bytes)}"
        )


def memory_budget(
    specs: Sequence[ModelSpec], components: Mapping[str, Component], layout: SlabLayout, stages: Stages = STAGES
) -> MemoryBudget:
    """Of a device that serves `stages` and decodes all pictures whole. `components`: those that it needs, by
    "model/component"; what is the same in two models is there once. Weights and activations have the slab's element
    size. Raises CheckpointError for missing tensors."""
    itemsize = layout.itemsize
    same = same_components(components)
    weights = {
        name if len(specs) > 1 else name.rpartition("/")[2]: sum(
            math.prod(shape) * itemsize for shape in planned_shapes({name: component}).values()
        )
        for name, component in components.items()
        if name not in same
    }
    queries, keys = scratch_elements(specs)
    whole_pixels = max(spec.sizes.max for spec in specs) ** 2
    return MemoryBudget(
        model=", ".join(spec.name for spec in specs),
        weights_bytes=weights,
        slab_bytes=layout.num_bytes + (queries + 2 * keys) * itemsize,
        step_bytes=max(map(_step_elements, specs)) * itemsize if "denoise" in stages else 0,
        decode_bytes=decode_bytes(whole_pixels, itemsize) if "decode" in stages else 0,
        stages=stages,
        whole_pixels=whole_pixels,
    )


def decode_bytes(num_pixels: float, itemsize: int = 2) -> int:
    """What decoding a picture takes at its widest point."""
    return math.ceil(DECODE_CHANNELS * num_pixels * itemsize)


def _step_elements(spec: ModelSpec) -> int:
    """Activations of the largest picture's step at degree 1."""
    operators = step_operators(spec, spec.largest_shape, degree=1)
    gemms = [operator for operator in operators if isinstance(operator, Gemm)]
    return STEP_GEMMS * max(gemm.rows * (gemm.inputs + gemm.outputs) for gemm in gemms)


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB"
