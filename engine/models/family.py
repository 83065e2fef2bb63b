"""What a family of models gives a worker: its network, text encoders, latents' codec and schedule, behind one protocol.

Owns the words between families and the worker: nothing here knows an architecture, and nothing in a family knows
devices, groups or graphs. A family's module has `components` and `build` (see `FamilyModule`); `engine/families/` has
what the engine must know of it.

Shapes: n rows of this member; S steps; V modulation vectors of width C; K rows of state behind each image token.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from tetrion.engine.config import LoadFormat
from tetrion.engine.model_spec import ModelSpec
from tetrion.engine.models.loading import Component
from tetrion.engine.models.ops import Ops
from tetrion.engine.parallel.exchange import Rope, Stream
from tetrion.engine.params import Params
from tetrion.engine.sampling.flow_match import Schedule
from tetrion.engine.shape import StepShape

Attend = Callable[[Sequence[Stream]], Tensor]
"""See `parallel.exchange.Group.attend`."""


class Constant(NamedTuple):
    """What steps read besides latents and vectors, the same in all of them. `segment`: the tensor has its rows, of
    which a member takes its own; None: every member takes all of it."""

    tensor: Tensor
    segment: int | None = None


class Network(Protocol):
    """One evaluation knows one guidance branch, and one member's rows."""

    num_vectors: int
    hidden_size: int
    out_channels: int
    """Width of a velocity."""

    def vectors(self, fields: Mapping[str, Tensor], times: Tensor, params: Params) -> Tensor:
        """Modulation vectors of a branch's steps: [S, V, C]. `fields`: of the slot, whole; `times`: fp32 [S]."""

    def constants(self, fields: Mapping[str, Tensor], shape: StepShape, branch: int) -> Mapping[str, Constant]:
        """By name, of a branch."""

    def rope(self, shape: StepShape, branch: int) -> Rope | None:
        """On the host; None if positions are told otherwise."""

    def step(self, latents: Tensor, constants: Mapping[str, Tensor], vectors: Tensor, attend: Attend) -> Tensor:
        """Velocity of the member's image rows, [n, out_channels].

        latents: [n, channels]; constants: the member's rows; vectors: [S, V, C] of all steps, `ops` knows which.
        """


class Tokens(NamedTuple):
    """A prompt's ids on the host, of shapes that are the same for every prompt. `num_tokens`: the prompt's own, before
    padding or truncation."""

    ids: tuple[Tensor, ...]
    num_tokens: int


class TextEncoding(Protocol):
    def tokens(self, prompt: str) -> Tokens: ...

    def embed(self, ids: Sequence[Tensor]) -> dict[str, Tensor]:
        """The slot's fields that depend on text, as steps read them. `ids`: on the encoders' device."""


class Picture(NamedTuple):
    """`pixels`: uint8 RGB [height, width, 3]. `is_finite`: bool [], False if they were made of anything but numbers.
    Both on the weights' device."""

    pixels: Tensor
    is_finite: Tensor


class Beginning(NamedTuple):
    """What a request begins with. `state`: fp32 [image rows, K · channels], on the host or on the device. `fields`: of
    the slot, those that its pictures make."""

    state: Tensor
    fields: Mapping[str, Tensor] = {}


ToDevice = Callable[[Tensor], Tensor]
"""Enqueues a copy of a host tensor."""
Begin = Callable[[Params, Sequence[Tensor], ToDevice], Beginning]
"""A request's beginning, from its parameters and pictures (uint8 [height, width, channels], as `shape.inputs` says, on
the device). Without waiting for the device."""


class LatentCodec(Protocol):
    whole_pixels: float
    """Larger pictures are encoded and decoded in overlapping tiles, which takes less memory and more time."""

    def noise(self, seed: int, shape: StepShape) -> Tensor:
        """Starting state: fp32 [image rows, K · channels], on the host, by a CPU generator, so that a seed means the
        same picture everywhere."""

    def decode(self, latents: Tensor, shape: StepShape) -> Picture:
        """Of the state after the last step."""

    def fuse(self) -> None:
        """Make the decoder fast on a GPU."""


@dataclass(frozen=True)
class Model:
    """A loaded model."""

    spec: ModelSpec
    network: Network
    text: TextEncoding
    codec: LatentCodec
    begin: Begin
    schedule: Callable[[int, StepShape], Schedule]
    """Of so many steps, with those that are skipped."""
    guidance_factor: Callable[[Params], float]
    """How far a step goes from the negative prompt's velocity towards the prompt's: 1 is the prompt's own."""
    keeps_norm: bool = False
    """Whether guidance keeps the length of the prompt's velocity, row by row."""
    weights_bytes: int = 0
    """Of what is loaded for it alone, or for it first: models may have components in common."""


class FamilyModule(Protocol):
    """What `engine/models/NAME.py` has."""

    ENCODING: tuple[str, ...]
    """What the names of those of the transformer's tensors begin with that text encoding and `begin` read, which a
    device needs that encodes and does not denoise."""

    def components(self, spec: ModelSpec, load_format: LoadFormat) -> Mapping[str, Component]:
        """All that is to be loaded. Raises CheckpointError."""

    def network(self, spec: ModelSpec, tensors: Mapping[str, Tensor], ops: Ops) -> Network:
        """Over the loaded tensors of the component `transformer`, or over meta tensors of their shapes."""

    def build(self, spec: ModelSpec, load_format: LoadFormat, tensors: Mapping[str, Tensor], ops: Ops) -> Model:
        """A model over loaded `component/name` tensors. No copies."""
