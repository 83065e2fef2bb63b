"""Where commands go and events come from, as the loop sees it: the `Executor` protocol."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol

import msgspec

from tetrion.engine.messages import Command, Decode, Event
from tetrion.engine.params import Params
from tetrion.engine.request import NOT_METERED, Receipt
from tetrion.engine.roles import Stages


class WorkerLost(msgspec.Struct, frozen=True, kw_only=True):
    """A worker process has ended. Not a message: the executor itself says so, after the worker's last events."""

    device_id: int
    reason: str


class WorkerReady(msgspec.Struct, frozen=True, kw_only=True):
    """Another worker is in a lost one's place, loaded and idle. It knows nothing of what the others have counted."""

    device_id: int


class PictureReady(msgspec.Struct, frozen=True, kw_only=True):
    """What `take_image` of a `Decode` command has come to. `ready_s`: when, on the engine's clock. `image`: uint8
    [height, width, 3]. `error`: what went wrong; then there is neither image nor receipt."""

    command_id: int
    ready_s: float
    image: Any = None
    receipt: Receipt = NOT_METERED
    error: Exception | None = None


Happening = Event | WorkerLost | WorkerReady | PictureReady
"""What an executor reports."""


class Executor(Protocol):
    """Devices that execute commands in FIFO order. `device_ids` never changes; each is alive, or its worker is on its
    way: nobody is given up."""

    device_ids: tuple[int, ...]
    stages: Mapping[int, Stages]
    """What each device serves; it is given nothing else."""
    first_time_s: float
    """So much longer a device may take for what it has not done before, in seconds."""

    @property
    def alive(self) -> frozenset[int]: ...

    @property
    def occupied(self) -> frozenset[int]:
        """Devices that do something beside their commands, which may take seconds: their commands wait for it."""

    def now_s(self) -> float:
        """The engine's clock, in seconds."""

    def submit(self, command: Command, members: tuple[int, ...]) -> bool:
        """Give a command to all members, or to none and return False if one of them cannot take it now."""

    def poll(self) -> list[Happening]:
        """All that has happened since the last call; never blocks."""

    async def wait(self, until_s: float | None) -> None:
        """Return at the next event, at `wake`, or at `until_s`."""

    def wake(self) -> None:
        """Make the current or next `wait` return at once."""

    def abort(self, device_ids: Collection[int]) -> None:
        """Make these devices give up waiting for peers, until they have executed `ResetBarriers`."""

    def kill(self, device_id: int, reason: str) -> None:
        """End a worker that does not answer; `poll` will report it lost. One that has ended already will be all the
        same."""

    def revive(self) -> None:
        """All workers are idle, and all that were reported lost may be replaced; `poll` will report them ready."""

    def read_saved(self, params: Params, slot: int, chunk_index: int) -> Any:
        """A copy of a request's state that a chunk has saved in host memory (messages.Denoise)."""

    def write_saved(self, params: Params, slot: int, chunk_index: int, state: Any) -> None:
        """Put it where another slot's would be."""

    def put_pictures(self, pictures: Sequence[Any]) -> int | None:
        """Lay a request's pictures (uint8 arrays) one behind the other into a free slot of the input slab, for the
        worker that encodes them. None if there is no free slot now."""

    def release_input_slot(self, input_slot: int) -> None:
        """Give a slot back."""

    def acquire_image_slot(self) -> int | None:
        """A free slot of the image slab, None if there is none now."""

    def release_image_slot(self, image_slot: int) -> None:
        """Give a slot back."""

    def take_image(self, decode: Decode, receipt: Callable[[], Receipt]) -> None:
        """Copy the picture that the command has left in its image slot, give the slot back, and report PictureReady
        with `receipt()`. Neither blocks the caller: the copy and `receipt` may be another thread's."""
