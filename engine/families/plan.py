"""Which tensors of a checkpoint a network is made of, as its family says by the config: names and shapes, no torch."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import NamedTuple

from tetrion.engine.families.files import fault

Shape = tuple[int, ...]
TIME_CHANNELS = 256
"""Of the sinusoidal embedding of a timestep."""
MAX_NAMED = 3


class Rearranged(NamedTuple):
    """A tensor seen as `split`, its dimensions put in `order`, then seen as `shape`. A convolution whose stride is its
    kernel's size becomes a GEMM's weight this way, a patch's pixels change places with its channels."""

    split: Shape
    order: tuple[int, ...]
    shape: Shape


class Part(NamedTuple):
    """One tensor of a model: the named checkpoint tensors, concatenated along dimension 0.

    `shape`, where the architecture knows it, is that in the checkpoint and is checked. `rearranged`: how it lies in a
    worker's memory, if otherwise; of a single source. `rows`: from where to where in the only source, if not all of it.
    `is_last_frame`: of the only source, a convolution over frames, the last of them alone.
    """

    sources: tuple[str, ...]
    shape: Shape | None = None
    rearranged: Rearranged | None = None
    rows: tuple[int, int] | None = None
    is_last_frame: bool = False

    def in_memory(self, shape: Shape) -> Shape:
        """Of what has `shape` in the checkpoint."""
        if self.rows is not None:
            return self.rows[1] - self.rows[0], *shape[1:]
        if self.is_last_frame:
            return *shape[:2], *shape[3:]
        return shape if self.rearranged is None else self.rearranged.shape


Plan = Mapping[str, Part]


class WeightsPlan(dict[str, Part]):
    """Name in a worker's memory -> tensors of a diffusers checkpoint, concatenated."""

    def linear(self, name: str, sources: Sequence[str], num_out: int, num_in: int, has_bias: bool = True) -> None:
        """Fused along the output: weight [num_out, num_in] and perhaps bias [num_out]."""
        self[f"{name}.weight"] = Part(tuple(f"{source}.weight" for source in sources), (num_out, num_in))
        if has_bias:
            self[f"{name}.bias"] = Part(tuple(f"{source}.bias" for source in sources), (num_out,))

    def slices(self, names: Mapping[str, int], source: str, num_in: int) -> None:
        """A layer without a bias that does the work of several, one below the other. `names`: of each, with the number
        of its outputs."""
        shape, first = (sum(names.values()), num_in), 0
        for name, count in names.items():
            self[f"{name}.weight"] = Part((f"{source}.weight",), shape, rows=(first, first + count))
            first += count

    def embedder(self, name: str, source: str, num_in: int, hidden_size: int, has_bias: bool = True) -> None:
        self.linear(f"{name}.in_layer", [f"{source}.linear_1"], hidden_size, num_in, has_bias)
        self.linear(f"{name}.out_layer", [f"{source}.linear_2"], hidden_size, hidden_size, has_bias)

    def vector(self, name: str, source: str, size: int) -> None:
        self[name] = Part((source,), (size,))

    def matrix(self, name: str, source: str, num_rows: int, width: int) -> None:
        self[name] = Part((source,), (num_rows, width))

    def patches_in(self, name: str, source: str, num_out: int, channels: int, side: int) -> None:
        """A convolution over patches of side × side pixels, as a linear layer of tokens (c, p, q)."""
        shape, num_in = (num_out, channels, side, side), channels * side * side
        keep = Rearranged(shape, (0, 1, 2, 3), (num_out, num_in))
        self[f"{name}.weight"] = Part((f"{source}.weight",), shape, keep)
        self[f"{name}.bias"] = Part((f"{source}.bias",), (num_out,))

    def pixels_in(self, name: str, source: str, num_out: int, channels: int, side: int) -> None:
        """A linear layer whose inputs are a patch's (p, q, c), as one of tokens (c, p, q)."""
        num_in = side * side * channels
        weight = Rearranged((num_out, side, side, channels), (0, 3, 1, 2), (num_out, num_in))
        self[f"{name}.weight"] = Part((f"{source}.weight",), (num_out, num_in), weight)
        self[f"{name}.bias"] = Part((f"{source}.bias",), (num_out,))

    def patches_out(self, name: str, source: str, channels: int, side: int, num_in: int) -> None:
        """A linear layer whose outputs are a patch's (p, q, c), as one of tokens (c, p, q)."""
        num_out = side * side * channels
        split, order = (side, side, channels), (2, 0, 1)
        weight = Rearranged((*split, num_in), (*order, 3), (num_out, num_in))
        self[f"{name}.weight"] = Part((f"{source}.weight",), (num_out, num_in), weight)
        self[f"{name}.bias"] = Part((f"{source}.bias",), (num_out,), Rearranged(split, order, (num_out,)))


def planned_shape(part: Part, shape_of: Callable[[str], Shape], folder: Path) -> Shape:
    """In a worker's memory. `shape_of`: of a tensor in the checkpoint's component `folder`. Raises CheckpointError if
    the tensors are not as the plan has them."""
    shapes = [shape_of(source) for source in part.sources]
    if len({shape[1:] for shape in shapes}) != 1 or (len(shapes) > 1 and () in shapes):
        raise fault(folder, f": {', '.join(part.sources)} do not fit together: {shapes}")
    shape = (sum(shape[0] for shape in shapes), *shapes[0][1:]) if shapes[0] else ()
    if part.shape is not None and shape != part.shape:
        sources = part.sources[0] if len(part.sources) == 1 else f"{part.sources[0]} … {part.sources[-1]}"
        raise fault(folder, f": {sources} has shape {list(shape)}, config.json means {list(part.shape)}")
    return part.in_memory(shape)


def num_weights(shapes: Iterable[Shape]) -> int:
    """Numbers in tensors of these shapes."""
    return sum(map(math.prod, shapes))


def num_planned(plan: Plan) -> int:
    """Numbers in all tensors whose shape the plan knows."""
    return num_weights(part.in_memory(part.shape) for part in plan.values() if part.shape is not None)


def check_plan(plan: Plan, shapes: Mapping[str, Shape], folder: Path) -> None:
    """Raises CheckpointError unless the component has exactly the tensors that the plan names, in these shapes."""
    check_names({source for part in plan.values() for source in part.sources}, shapes.keys(), folder)
    for part in plan.values():
        planned_shape(part, shapes.__getitem__, folder)


def check_names(meant: Set[str], found: Set[str], folder: Path, beside: tuple[str, ...] = ()) -> None:
    """Raises CheckpointError unless they are the same, but for names that begin with one of `beside`. What a config
    does not mean would be left out without a word, and another picture drawn."""
    if missing := meant - found:
        raise fault(folder, f" has no tensor {some_of(missing)}, which config.json means")
    if others := [name for name in found - meant if not name.startswith(beside)]:
        raise fault(folder, f" has tensors that config.json does not mean: {some_of(others)}")


def some_of(names: Iterable[str]) -> str:
    """The first of them, and how many more there are."""
    names = sorted(names)
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more
