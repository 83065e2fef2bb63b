"""Random weights at a model's real shapes, for measuring without a checkpoint (`load_format: dummy`).

Owns what stands in for weights files. A tensor's values follow from its name, shape and device
kind, so all workers of a machine draw the same; they are no model, and pictures made with them show nothing.
"""

from collections.abc import Callable, Hashable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from tetrion.engine.families.hash_tokens import hashed
from tetrion.engine.model_spec import CheckpointError

STANDARD_DEVIATION = 0.02


class DummyFiles:
    """Like `ComponentFiles`: names, shapes and tensors of one component."""

    def __init__(self, folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.folder = folder
        self._shapes = shapes

    @property
    def names(self) -> Iterable[str]:
        return self._shapes.keys()

    @property
    def identity(self) -> Hashable:
        return self.folder.name, frozenset(self._shapes.items())

    def path(self, name: str) -> Path:
        return self.folder

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self._shapes:
            raise CheckpointError(f"model: {str(self.folder)!r} has no tensor {name}")
        return self._shapes[name]

    def read(self, name: str, device: torch.device) -> Tensor:
        """bf16, normal with deviation 0.02 around 0, for weights of norms and variances around 1."""
        generator = torch.Generator(device).manual_seed(hashed(f"{self.folder.name}/{name}"))
        shape = self.shape(name)
        values = torch.empty(shape, dtype=torch.bfloat16, device=device)
        values.normal_(0.0, STANDARD_DEVIATION, generator=generator)
        is_factor = name.endswith("running_var") or (len(shape) == 1 and "norm" in name and name.endswith("weight"))
        return values + 1 if is_factor else values


def module_shapes(build: Callable[[], nn.Module]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a library module's parameters, built on the meta device; tied ones under one name."""
    with torch.device("meta"):
        parameters = build().state_dict(keep_vars=True)
    first_name = {id(parameter): name for name, parameter in reversed(parameters.items())}
    return {name: tuple(parameters[name].shape) for name in parameters if first_name[id(parameters[name])] == name}
