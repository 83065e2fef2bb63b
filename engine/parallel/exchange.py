"""What the members of a sequence-parallel group tell each other: attention's heads, velocities, a request's state.

Owns the order of pushes and barriers, and the reasons why it is safe; knows no model and no commands. Ulysses
(arXiv:2309.14509): each member projects its own rows, attends over all rows for its own heads. CPU workers do it in
parallel/cpu/exchange.py, where every call has done its work when it returns; gpu workers enqueue it in
parallel/gpu/exchange.py.

A chunk of steps on one member, in this order:

    bind(chunk)
    pull_constants(); pull_state()          a newcomer only (a member that holds the state just waits)
    enter()                                 entry barrier of all members; the end buffer is invalid from here on
    load_state(rows)                        from the start buffer
    for each step:
        for each branch of this part, for each layer:
            attend(...)                     push q, k, v → barrier A → attention → push output → barrier B
        swap(velocity) … done()             branches apart: push velocity → barrier C → guide and step → barrier D
    share_state(rows)                       push the rows into the end buffers → barrier of the part
    finish()                                the end buffer has the chunk's end version

A group whose branches are apart (BranchLayout) has parts; barriers A, B and that of `share_state` are of a part alone,
C and D of partners, who hold the same rows, and the entry barrier of all members.

Why no region is overwritten while somebody still reads it. P is the writer, R the owner and reader:

* q, k, v of R. R reads them between A and B of a layer. P writes the next layer's only after it has passed B, hence
  after R has arrived at B, hence after R has read.
* output of R. R reads it from B on until it calls `attend` again (so that the result needs no copy). P writes the next
  layer's only after it has passed the next A, hence after R has called `attend` again and pushed.
* velocity of R. R reads it between C and D; P, its partner, writes the next one after it has passed D.
* the state in R's end buffer, P's rows. P writes it after its last B, hence after R has entered the chunk and made its
  version invalid; in a part of one only R does. Whoever read what was there before (the state that a chunk three before
  this one left, see layout.py) pulled it for the chunk after that one, which has ended: its end is this one's start, or
  comes before it.
* Across groups. R arrives at the entry barrier of a group after it has finished its previous chunk, whose last barriers
  every member of that group passed into after its last push. So no member of the new group pushes while R still reads,
  and nobody from the old group pushes any more. Degree 1 pushes to nobody.
* A pull. Nothing is written into the buffer that is pulled from before the chunk that pulls it has ended. A buffer's
  version is invalid while it is written, so a pull can never see a state that is half shared, nor that of a chunk that
  was aborted half-way. Fields that never change may be pulled as soon as the source has the request at all. A device
  that held the request before may get them while another still pulls its older state: it writes the bytes that are
  there.
After an abort none of this holds for regions: see parallel/cpu/barrier.py about the reset. A start buffer is as it was.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from tetrion.engine.parallel.group import BranchLayout, GroupPlan, GroupShape
from tetrion.engine.parallel.layout import NUM_BUFFERS
from tetrion.engine.shape import StepShape
from tetrion.kernels.reference import EPS

Rope = tuple[Tensor, Tensor]
"""cos, sin of a whole sequence in canonical order: fp32 [rows, D / 2], one value for each pair (2i, 2i + 1)."""


Prefix = tuple[Tensor, Tensor]
"""Keys and values of rows that are attended to and have no queries: [rows, own heads of keys, D] each."""


class Stream(NamedTuple):
    """Local rows with one set of weights.

    `qkv`: [n, (H + 2 · K) · D], the padded local rows of `segments`, in canonical order; K of the H heads are those of
    keys and values (`ModelSpec.num_key_heads`). `q_norm`, `k_norm`: weights of RMSNorm over a head, [D]; None: not
    normed. `prefix`: what all rows of the call attend to beside themselves, in one of its streams; it follows them in
    the order of keys.
    """

    qkv: Tensor
    segments: tuple[int, ...]
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    has_rope: bool = True
    epsilon: float = EPS
    prefix: Prefix | None = None


def prefix_of(streams: Sequence[Stream]) -> Prefix | None:
    """What the rows of a call attend to beside themselves."""
    return next((stream.prefix for stream in streams if stream.prefix is not None), None)


class Chunk(NamedTuple):
    """One device's part in a chunk of steps on the state in `slot`.

    `plans`: of its part of `layout`, one for each branch that the part evaluates. `chunk_index`: chunks of the request
    before it. `start_version`: what the state in the start buffer must have, to be pulled from `source` (this device's
    own number: it is here); `end_version`: what `finish` gives to the end buffer.
    """

    shape: StepShape
    layout: BranchLayout
    plans: tuple[GroupPlan, ...]
    slot: int
    chunk_index: int
    source: int
    start_version: int
    end_version: int

    @property
    def start_buffer(self) -> int:
        return self.chunk_index % NUM_BUFFERS

    @property
    def end_buffer(self) -> int:
        return (self.chunk_index + 1) % NUM_BUFFERS


class Group(Protocol):
    """What all groups of one shape have in common on this device: attention within one pass over a sequence."""

    shape: GroupShape

    def load_rope(self, rope: Rope) -> None:
        """From now on `attend` turns q and k by these; costs nothing if it does so already."""

    def attend(self, streams: Sequence[Stream]) -> Tensor:
        """Attention of the streams' rows over all rows of their segments. Streams cover each segment once, in canonical
        order; segments may be left out.

        Returns [padded local rows of those segments, H · D] in the same order, valid until the next call.
        """


class Swap(Protocol):
    """Partners' velocities of one number of rows."""

    def push(self, velocity: Tensor) -> Tensor:
        """Give the partner this member's velocity, [rows, width]; returns the partner's, valid until `done`."""

    def done(self) -> None:
        """What `push` returned has been read."""


class Exchange(Protocol):
    """One worker's end of all groups, for one model. See the module's docstring for the order of calls.

    On a CPU all waits raise Aborted when the engine gives the group up; a GPU's outcome is known at the end.
    """

    device_id: int

    def group(self, shape: GroupShape) -> Group: ...

    def swap(self, num_rows: int, width: int) -> Swap: ...

    def bind(self, chunk: Chunk) -> None: ...

    def pull_constants(self) -> None:
        """Copy the fields that never change as soon as the source has the request, be it in the midst of a chunk."""

    def pull_state(self) -> None:
        """Wait until the source has the start version, copy the state, check that it still has it."""

    def enter(self) -> None: ...

    def load_state(self, rows: Tensor) -> None:
        """This member's rows of the state from its start buffer to the first of `rows`, fp32 [padded rows, width]."""

    def share_state(self, rows: Tensor) -> None:
        """Give every member of this part this one's rows of the state, in their end buffers."""

    def finish(self) -> None: ...

    def constants(self, slot: int, branch: int) -> Mapping[str, Tensor]:
        """The fields that steps do not change in this device's own slot, whole: [max rows, width]."""

    def state(self, slot: int, buffer: int) -> Tensor:
        """What steps change, in a buffer of this device's own slot, whole: [max rows, width]."""

    def publish(self, slot: int, buffer: int, version: int) -> None:
        """Behind the writes of a state that no chunk has made: this buffer of this device's slot holds `version`."""

    def outcome(self) -> Callable[[], None]:
        """To be called behind a command's work; what it returns raises Aborted or RuntimeError if that went wrong, once
        the queue has come so far."""

    def warm_up(self) -> None:
        """Load whatever around a chunk's steps could hold up a peer if it were loaded later."""

    def reset(self) -> None:
        """Forget all barriers and the abort. Waits for the device. On every device while all are idle."""
