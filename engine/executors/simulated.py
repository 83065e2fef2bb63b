"""The executor in virtual time: the same commands and events, durations from cost tables, no process and no picture.

`EngineLoop` runs unchanged on it. Time moves only in `wait`, straight to the next thing that happens. A simulated
device executes commands in FIFO order; a group command starts when all its members have come to it and the state that
newcomers pull is there. Pictures are black.
"""

import functools
import heapq
import itertools
import math
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tetrion.engine.executors.base import Happening, PictureReady, WorkerLost, WorkerReady
from tetrion.engine.messages import (
    BarriersReset,
    Command,
    Decode,
    Denoise,
    EncodePrompt,
    Event,
    ResetBarriers,
    StageCommand,
    failed,
)
from tetrion.engine.params import Params
from tetrion.engine.planning.cost.predict import predict_s
from tetrion.engine.planning.cost.tables import CostTables
from tetrion.engine.request import Receipt
from tetrion.engine.roles import Stages
from tetrion.engine.stages import STAGES


class Disturbance:
    """How simulated durations differ from the profile: a `duration` for `SimulatedExecutor`. Same seed, same durations.

    `bias`: 0.05 makes everything 5 % slower than the profile says; `noise`: standard deviation of the logarithm of a
    random factor with mean 1, drawn for each command; `step_overhead_s` is added to each denoising step, `regroup_s` to
    each chunk whose members are not those of the one before.
    """

    def __init__(
        self,
        *,
        seed: int = 0,
        bias: float = 0.0,
        noise: float = 0.0,
        step_overhead_s: float = 0.0,
        regroup_s: float = 0.0,
    ) -> None:
        if not -1 < bias < math.inf:
            raise ValueError(f"bias: must be above -1, got {bias}")
        for name, value in (("noise", noise), ("step_overhead_s", step_overhead_s), ("regroup_s", regroup_s)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name}: must be at least 0, got {value}")
        self._draw = random.Random(seed)
        self._scale = 1 + bias
        self._noise = noise
        self._step_overhead_s = step_overhead_s
        self._regroup_s = regroup_s

    def __call__(self, command: Command, seconds: float) -> float:
        seconds *= self._scale
        if self._noise:
            seconds *= math.exp(self._draw.gauss(-(self._noise**2) / 2, self._noise))
        if isinstance(command, Denoise):
            seconds += command.chunk_steps * self._step_overhead_s
            seconds += self._regroup_s * (command.members != command.holders)
        return seconds


class SimulatedExecutor:
    """`num_devices` devices that cost what `costs` says. `duration(command, seconds)` may change it (noise, bias).

    A lost device is back `respawn_s` after its death (but not before the loop has recovered); None: not within the
    simulation. The answers of a command's members come `answer_gap_s` apart, as those of processes do.
    """

    first_time_s = 0.0

    def __init__(
        self,
        costs: CostTables,
        num_devices: int,
        duration: Callable[[Command, float], float] = lambda _, seconds: seconds,
        respawn_s: float | None = None,
        answer_gap_s: float = 0.0,
        stages: Sequence[Stages] = (),
    ) -> None:
        """`stages`: of each device; all of all by default."""
        self.device_ids = tuple(range(num_devices))
        self.stages: Mapping[int, Stages] = dict(enumerate(stages or (STAGES,) * num_devices))
        self.alive: frozenset[int] = frozenset(self.device_ids)
        self.occupied: frozenset[int] = frozenset()
        self._respawn_s = respawn_s
        self._answer_gap_s = answer_gap_s
        self._lost_s: dict[int, float] = {}
        self._costs = costs
        self._duration = duration
        self._now_s = 0.0
        self._order = itertools.count()
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []
        self._events: list[Happening] = []
        self._free_s = dict.fromkeys(self.device_ids, 0.0)
        self._state_s: dict[tuple[int, int], float] = {}
        """When a state is there that has so many chunks behind it."""
        self._unanswered: dict[int, dict[int, StageCommand]] = {d: {} for d in self.device_ids}
        self._woken = False

    def at(self, time_s: float, action: Callable[[], None]) -> None:
        """Do something at a point in virtual time: let a request arrive, lose a worker."""
        heapq.heappush(self._agenda, (time_s, next(self._order), action))

    def lose(self, device_id: int) -> None:
        """The device dies now; its commands are never answered."""
        self.alive -= {device_id}
        self._lost_s[device_id] = self._now_s
        self._unanswered[device_id].clear()
        self._events.append(WorkerLost(device_id=device_id, reason="simulated loss"))

    def _return(self, device_id: int) -> None:
        self.alive |= {device_id}
        self._free_s[device_id] = self._now_s
        self._events.append(WorkerReady(device_id=device_id))

    # Executor ----------------------------------------------------------------------------------------------------

    def now_s(self) -> float:
        return self._now_s

    def submit(self, command: Command, members: tuple[int, ...]) -> bool:
        if isinstance(command, ResetBarriers):
            (device_id,) = members
            self._events.append(BarriersReset(command_id=command.command_id, device_id=device_id))
            return True
        if not isinstance(command, StageCommand):
            raise ValueError(f"a simulated device does not execute {type(command).__name__}")
        if others := [member for member in members if command.stage not in self.stages[member]]:
            raise ValueError(f"device {others[0]} does not serve {command.stage}")
        start_s = max(self._now_s, self._state_s.get(_source(command), 0.0), *[self._free_s[m] for m in members])
        end_s = start_s + self._duration(command, predict_s(command, self._costs))
        self._state_s[_result(command)] = end_s
        ticket = next(self._order)
        for member in members:
            self._free_s[member] = end_s
            self._unanswered[member][ticket] = command
        self.at(end_s, lambda: self._complete(ticket, command, members, start_s))
        return True

    def _complete(self, ticket: int, command: StageCommand, members: tuple[int, ...], start_s: float) -> None:
        if any([ticket not in self._unanswered[member] for member in members]):
            return  # a member was lost or aborted: the others wait until they are aborted too
        for number, member in enumerate(members):
            answer = functools.partial(self._answer, ticket, member, _answer(command, member, start_s, self._now_s))
            if number and self._answer_gap_s:
                self.at(self._now_s + number * self._answer_gap_s, answer)
            else:
                answer()

    def _answer(self, ticket: int, member: int, event: Event) -> None:
        """Unless it was lost or aborted before."""
        if self._unanswered[member].pop(ticket, None) is not None:
            self._events.append(event)

    def poll(self) -> list[Happening]:
        events, self._events = self._events, []
        return events

    async def wait(self, until_s: float | None) -> None:
        """Move time to the next entry of the agenda or to `until_s`. Raises RuntimeError if there is neither."""
        if self._woken or self._events:
            self._woken = False
            return
        next_s = self._agenda[0][0] if self._agenda else until_s
        if next_s is None:
            raise RuntimeError(f"nothing will ever happen after {self._now_s} s")
        self._now_s = max(self._now_s, next_s if until_s is None else min(next_s, until_s))
        while self._agenda and self._agenda[0][0] <= self._now_s:
            heapq.heappop(self._agenda)[2]()
        self._woken = False  # what these actions woke is this very wait

    def wake(self) -> None:
        self._woken = True

    def abort(self, device_ids: Collection[int]) -> None:
        for device_id in device_ids:
            self._free_s[device_id] = self._now_s
            for command in self._unanswered[device_id].values():
                self._events.append(failed(command, device_id, "aborted", "aborted"))
            self._unanswered[device_id].clear()

    def kill(self, device_id: int, reason: str) -> None:
        if device_id in self.alive:
            self.lose(device_id)

    def revive(self) -> None:
        lost, self._lost_s = self._lost_s, {}
        for device_id, lost_s in lost.items():
            if self._respawn_s is not None:
                at_s = max(self._now_s, lost_s + self._respawn_s)
                self.at(at_s, lambda device_id=device_id: self._return(device_id))  # type: ignore[misc]

    def read_saved(self, params: Params, slot: int, chunk_index: int) -> npt.NDArray[np.float32]:
        """States are not kept here."""
        return np.empty(0, np.float32)

    def write_saved(self, params: Params, slot: int, chunk_index: int, state: npt.NDArray[np.float32]) -> None:
        """See `read_saved`."""

    def put_pictures(self, pictures: Sequence[Any]) -> int | None:
        return 0

    def release_input_slot(self, input_slot: int) -> None:
        """Slots are not scarce here."""

    def acquire_image_slot(self) -> int | None:
        return 0

    def release_image_slot(self, image_slot: int) -> None:
        """Slots are not scarce here."""

    def take_image(self, decode: Decode, receipt: Callable[[], Receipt]) -> None:
        """Takes no time."""
        width, height = decode.params.shape.size
        image = np.broadcast_to(np.uint8(0), (height, width, 3))
        self.release_image_slot(decode.image_slot)
        ready = PictureReady(command_id=decode.command_id, image=image, receipt=receipt(), ready_s=self._now_s)
        self._events.append(ready)


def _source(command: StageCommand) -> tuple[int, int]:
    """The state that a command needs: its id, and chunks behind it."""
    return command.source_state_id if isinstance(command, Denoise) else command.state_id, command.chunk_index


def _result(command: StageCommand) -> tuple[int, int]:
    return command.state_id, command.chunk_index + isinstance(command, Denoise)


def _answer(command: StageCommand, device_id: int, started_s: float, ended_s: float) -> Event:
    match command:
        case EncodePrompt():
            return command.encoded(device_id, started_s, ended_s, num_text_tokens=len(command.prompt.split()))
        case Denoise():
            return command.denoised(device_id, started_s, ended_s, waited_s=0.0)
        case Decode():
            return command.decoded(device_id, started_s, ended_s)
