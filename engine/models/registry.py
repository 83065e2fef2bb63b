"""Family name -> how its models are loaded on a worker.

Owns the way from checkpoint folders to `Model`s, over weights that all CPU workers share or over a device's own.
Worker-only: importing it takes seconds. A new family is one line of `engine/families/registry.py`.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tetrion.engine.config import LoadFormat
from tetrion.engine.families.registry import FAMILIES, worker_module
from tetrion.engine.model_spec import ModelSpec
from tetrion.engine.models.family import FamilyModule, Model
from tetrion.engine.models.loading import Component, attach, component_tensors, load_to_device, publish
from tetrion.engine.models.ops import Ops


def load_shared(
    specs: Sequence[ModelSpec], fd: int, publish_weights: bool, load_format: LoadFormat, ops: Ops
) -> list[Model]:
    """The models of `specs` over the shared weights segment `fd`, fp32, for a CPU worker.

    The one worker with `publish_weights` reads the checkpoints and fills the segment (which may be empty: it is sized
    here); the others map what it wrote. Raises CheckpointError, or SharedMemoryError if the segment cannot be filled.
    """
    if publish_weights:
        components = {(spec, name): part for spec in specs for name, part in components_of(spec, load_format).items()}
        publish(fd, {f"{spec.name}/{name}": part for (spec, name), part in components.items()})
    tensors = attach(fd)
    return [family_module(spec).build(spec, load_format, component_tensors(tensors, spec.name), ops) for spec in specs]


def load_on_device(
    spec: ModelSpec,
    load_format: LoadFormat,
    components: Mapping[str, Component],
    device: torch.device,
    dtype: torch.dtype,
    ops: Ops,
) -> Model:
    """Load the `components_of` a spec into the memory of `device`.

    Raises CheckpointError, or the device's out-of-memory.
    """
    tensors: dict[str, Tensor] = load_to_device(components, device, dtype)
    return family_module(spec).build(spec, load_format, tensors, ops)


def components_of(spec: ModelSpec, load_format: LoadFormat) -> Mapping[str, Component]:
    """All that would be loaded, by component. Raises CheckpointError."""
    return family_module(spec).components(spec, load_format)


def import_families() -> None:
    """All of them, so that workers that are forked later have them."""
    for name in FAMILIES.values():
        worker_module(name)


def family_module(spec: ModelSpec) -> FamilyModule:
    module: FamilyModule = worker_module(spec.family)
    return module
