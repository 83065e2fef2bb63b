"""Family name -> how its models are loaded on a worker.

Owns the way from checkpoint folders to `Model`s, over weights that all CPU workers share or over a device's own. What a
device's stages do not need it has as meta tensors: shapes without values, which nothing can be computed from.
Worker-only: importing it takes seconds. A new family is one line of `engine/families/registry.py`.
"""

import contextlib
import dataclasses
import logging
import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from tetrion.engine.config import LoadFormat
from tetrion.engine.families.registry import FAMILIES, worker_module
from tetrion.engine.model_spec import CheckpointError, ModelSpec, ModelTooLarge
from tetrion.engine.models.family import FamilyModule, Model
from tetrion.engine.models.loading import (
    Component,
    attach,
    component_tensors,
    load_to_device,
    planned_shapes,
    publish,
    same_components,
)
from tetrion.engine.models.ops import Ops
from tetrion.engine.roles import TRANSFORMER, Stages, stages_of
from tetrion.engine.stages import STAGES
from tetrion.engine.transport.segment import SharedMemoryError

logger = logging.getLogger(__name__)


def load_shared(
    specs: Sequence[ModelSpec],
    fd: int,
    publish_weights: bool,
    load_format: LoadFormat,
    ops: Ops,
    stages: Stages = STAGES,
) -> list[Model]:
    """The models of `specs` over the shared weights segment `fd`, fp32, for a CPU worker that serves `stages`.

    The one worker with `publish_weights` reads the checkpoints and fills the segment (which may be empty: it is sized
    here) with all that any worker needs; the others map what it wrote. Raises CheckpointError (ModelTooLarge if the
    segment cannot be filled).
    """
    if publish_weights:
        _publish(fd, all_components(specs, load_format))
    tensors = attach(fd)
    for spec in specs:
        for name in [name for name in tensors if name.startswith(f"{spec.name}/")]:
            component, _, tensor = name.removeprefix(f"{spec.name}/").partition("/")
            if not is_needed(spec, component, tensor, stages):
                tensors[name] = tensors[name].to("meta")
    return _build_all(specs, load_format, tensors, ops)


def load_on_device(
    specs: Sequence[ModelSpec],
    load_format: LoadFormat,
    components: Mapping[str, Component],
    device: torch.device,
    dtype: torch.dtype,
    ops: Ops,
    stages: Stages = STAGES,
) -> list[Model]:
    """The models of `specs`, whose components (`all_components`) are given, in the memory of `device`, as far as
    `stages` need them.

    Raises CheckpointError, or the device's out-of-memory.
    """
    shapes = planned_shapes(components)
    absent = {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in shapes.items()}
    loaded = load_to_device(needed_components(specs, components, stages), device, dtype)
    return _build_all(specs, load_format, absent | loaded, ops)


def needed_components(
    specs: Sequence[ModelSpec], components: Mapping[str, Component], stages: Stages
) -> dict[str, Component]:
    """What of `components` (`all_components`) a device needs that serves these stages; none that are empty."""
    needed: dict[str, Component] = {}
    for spec in specs:
        for name, (files, plan) in components.items():
            model, _, component = name.rpartition("/")
            if model == spec.name:
                own = {tensor: part for tensor, part in plan.items() if is_needed(spec, component, tensor, stages)}
                if own:
                    needed[name] = Component(files, own)
    return needed


def is_needed(spec: ModelSpec, component: str, tensor: str, stages: Stages) -> bool:
    """Whether a device that serves these stages needs a tensor of a component."""
    if component == TRANSFORMER and "encode" in stages and tensor.startswith(family_module(spec).ENCODING):
        return True
    return any(stage in stages for stage in stages_of(component, pictures_in=spec.max_pictures > 0))


def _publish(fd: int, components: Mapping[str, Component]) -> None:
    """Raises ModelTooLarge with what each component takes, as fp32."""
    try:
        publish(fd, components)
    except SharedMemoryError as error:
        same = same_components(components)
        sizes = {
            name: 4 * sum(map(math.prod, planned_shapes({name: part}).values())) for name, part in components.items()
        }
        parts = ", ".join(f"{name} {size / 1e9:.1f} GB" for name, size in sizes.items() if name not in same)
        raise ModelTooLarge(f"model: weights do not fit into memory: {error}: {parts}") from error


def components_of(spec: ModelSpec, load_format: LoadFormat) -> Mapping[str, Component]:
    """All of a model that would be loaded, by component. Raises CheckpointError."""
    with _blaming(spec):
        return family_module(spec).components(spec, load_format)


def all_components(specs: Sequence[ModelSpec], load_format: LoadFormat) -> dict[str, Component]:
    """Those of all models, by "model/component"."""
    return {
        f"{spec.name}/{name}": component
        for spec in specs
        for name, component in components_of(spec, load_format).items()
    }


def _build_all(
    specs: Sequence[ModelSpec], load_format: LoadFormat, tensors: Mapping[str, Tensor], ops: Ops
) -> list[Model]:
    models: list[Model] = []
    counted: set[int] = set()
    for spec in specs:
        own = component_tensors(tensors, spec.name)
        present = [tensor for tensor in own.values() if not tensor.is_meta]
        new = {tensor.data_ptr(): tensor.nbytes for tensor in present if tensor.data_ptr() not in counted}
        counted |= new.keys()
        with _blaming(spec):
            model = family_module(spec).build(spec, load_format, own, ops)
        models.append(dataclasses.replace(model, weights_bytes=sum(new.values())))
    return models


@contextlib.contextmanager
def _blaming(spec: ModelSpec) -> Iterator[None]:
    """What a library finds while it makes a model of a checkpoint's files, in whatever way it says so, is those files'
    fault; running out of memory is not, nor what a GPU does."""
    try:
        yield
    except (CheckpointError, MemoryError, torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except Exception as error:
        logger.debug("%s cannot be loaded", spec.name, exc_info=True)
        raise CheckpointError(f"model: {spec.path!r} cannot be loaded: {type(error).__name__}: {error}") from error


def import_families() -> None:
    """All of them, so that workers that are forked later have them."""
    for name in FAMILIES.values():
        worker_module(name)


def family_module(spec: ModelSpec) -> FamilyModule:
    module: FamilyModule = worker_module(spec.family)
    return module
