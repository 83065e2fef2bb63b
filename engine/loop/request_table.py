"""All living requests, and who gets the next state slot. Knows nothing of processes, planners or torch.

Between tenants and users that is in `shares.py`. Within a user those go first that can still meet their deadline, the
earliest first; then, by their soft deadline, those that have none and those that are *late*: a deadline that cannot be
met any more counts for nothing, so nobody is worse off for having stated one. Of `SLOTS_A_LATE_ONE` slots one is for
these before others, so that they do not starve behind feasible ones. What they own beyond that they own as long as
nobody feasible waits: then a slot is taken back from one of them that rests (`next_exchange`).
"""

import itertools
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator

from tetrion.engine.errors import Displaced, EngineOverloaded, RequestError
from tetrion.engine.loop.feasible import Feasible, Rank
from tetrion.engine.loop.requests import LEGAL_TRANSITIONS, STAGE_STATES, TERMINAL_STATES, Request, RequestState
from tetrion.engine.loop.shares import LANES, Claim, Lane, Shares
from tetrion.engine.loop.slots import StateSlots
from tetrion.engine.planning.remaining import NOTHING, Remaining

CAN_BE_SET_ASIDE = frozenset({RequestState.WAITING, RequestState.READY})
"""One that only has to be decoded gives its slot back soon enough."""
SLOTS_A_LATE_ONE = 8
"""Of so many slots (of two, if there are fewer) one is kept for requests that no deadline hurries, if any wants it."""
FEASIBLE_LANES = tuple(lane for lane in LANES if lane.is_feasible)
OTHER_LANES = tuple(lane for lane in LANES if not lane.is_feasible)


class RequestTable:
    """All living requests and the state slots they own. A slot number is the same in every worker's slab."""

    def __init__(
        self,
        num_slots: int,
        max_queued: int,
        patience_s: float,
        is_patient: Callable[[Request], bool] = lambda request: False,
        remaining: Callable[[Request], Remaining] = lambda request: NOTHING,
    ) -> None:
        """`is_patient`: requests that may be kept waiting for long while they own a slot. They own at most half of the
        slots, so that others find one. What it says of a request never changes. `remaining`: what it needs still."""
        self._is_patient, self._remaining = is_patient, remaining
        self._max_queued = max_queued
        self._patience_s = patience_s
        self._now_s = -math.inf
        self.slots = StateSlots(num_slots)
        self._max_patient, self._num_patient = max(1, num_slots // 2), 0
        self._num_for_others = num_slots // SLOTS_A_LATE_ONE or int(num_slots > 1)
        self._others: dict[str, Request] = {}
        """Those that own a slot and are not feasible."""
        self._feasible: Feasible[Request] = Feasible()
        """Whether they own a slot or wait for one."""
        self._silent: OrderedDict[str, float] = OrderedDict()
        """Since when nothing has happened for each, the longest first."""
        self._shares = Shares(num_slots)
        self._new: dict[str, Request] = {}
        """Those that have never owned a slot."""
        self._set_aside: dict[str, Request] = {}
        """Those whose slot was taken back."""
        self.saved_bytes = 0
        """Of their states."""
        self.input_bytes = 0
        """Of the pictures that all have brought."""
        self._admitted: dict[str, Request] = {}
        self._cancelled: dict[str, Request] = {}
        self._changed: set[str] = set()

    def __len__(self) -> int:
        return self.num_queued + len(self._admitted)

    def __contains__(self, request_id: str) -> bool:
        return self.get(request_id) is not None

    @property
    def num_queued(self) -> int:
        return len(self._new) + len(self._set_aside)

    def get(self, request_id: str) -> Request | None:
        return self._admitted.get(request_id) or self._new.get(request_id) or self._set_aside.get(request_id)

    def get_admitted(self, request_id: str) -> Request | None:
        """The request if it owns a slot."""
        return self._admitted.get(request_id)

    def admitted(self) -> Iterator[Request]:
        """Requests that own a slot, in order of admission."""
        return iter(self._admitted.values())

    def queued(self) -> Iterator[Request]:
        """Requests that wait for a slot: first those that have never owned one, in order of arrival."""
        return itertools.chain(self._new.values(), self._set_aside.values())

    def longest_silent(self) -> tuple[Request, float] | None:
        """For whom nothing has happened for longest, and since when."""
        first = next(iter(self._silent.items()), None)
        if first is None:
            return None
        request = self.get(first[0])
        assert request is not None
        return request, first[1]

    def heard_of(self, request: Request) -> None:
        """Something happens for it now."""
        self._silent[request.request_id] = self._now_s
        self._silent.move_to_end(request.request_id)

    def cancelled(self) -> list[Request]:
        """Living requests that were cancelled."""
        return list(self._cancelled.values())

    def mark_changed(self, request: Request) -> None:
        """Whoever writes a request's progress without `move`, with nothing in flight for it, says so."""
        self._changed.add(request.request_id)

    def take_changed(self) -> set[str]:
        """Ids of requests that have moved, ended or been cancelled since the last call."""
        changed, self._changed = self._changed, set()
        return changed

    # Time ---------------------------------------------------------------------------------------------------------

    def at(self, now_s: float) -> None:
        """It is `now_s`: those whose latest start is past are late."""
        self._now_s = now_s
        for request in self._feasible.take_late(now_s):
            self._judge(request)

    def judge_all(self) -> None:
        """What requests need has changed for many: there are more devices, or fewer."""
        for request in self.all():
            self._judge(request)

    def _judge(self, request: Request) -> None:
        """Whether it can meet its deadline."""
        deadline_s = _deadline_s(request)
        if deadline_s is None or request.cancelled:
            return
        left = self._remaining(request)
        latest_s = deadline_s - left.fastest_s
        if latest_s >= self._now_s:
            self._feasible.put(_rank(request), request, latest_s, left.device_s, request.asked.weight)
        else:
            self._feasible.remove(_rank(request))
        if request.is_feasible != (latest_s >= self._now_s):
            before = self._claim(request)
            request.is_feasible = not request.is_feasible
            self._shares.change(before, self._claim(request))
            if request.slot >= 0:
                self._note_other(request)

    def _note_other(self, request: Request) -> None:
        """It owns a slot, and may have come to be one of the others."""
        if request.is_feasible:
            self._others.pop(request.request_id, None)
        else:
            self._others[request.request_id] = request

    def feasible_around(self, request: Request, num_before: int, num_after: int) -> tuple[list[Request], float]:
        """In order of deadline, so many that come before the request (which need not be here) and so many that come
        after it; and the device seconds of all that come before those."""
        return self._feasible.around(_rank(request), num_before, num_after)

    def late(self) -> Iterator[Request]:
        """Those that own a slot and have a deadline that they cannot meet."""
        return (request for request in self._others.values() if request.deadline_s is not None)

    def crowded_until_s(self, request: Request, num_after: int, num_devices: int) -> float | None:
        """Whether the request, which is not here yet, is too much for some that come behind the `num_after` after it:
        see `Feasible.crowded_until_s`."""
        work_s, weight = self._remaining(request).device_s, request.asked.weight
        return self._feasible.crowded_until_s(_rank(request), num_after, work_s, weight, request.arrival_s, num_devices)

    # Who comes, waits and goes ------------------------------------------------------------------------------------

    def all(self) -> list[Request]:
        return [*self._admitted.values(), *self.queued()]

    def add(self, request: Request) -> None:
        """Queue a new request. In a full queue it takes the place of the newest of the tenant with most there, which
        is cancelled with `Displaced`, if its own tenant will then still not have more.

        Raises EngineOverloaded, or RequestError for an id that is in use.
        """
        if request.request_id in self:
            raise RequestError("request_id", f"{request.request_id!r} is in use")
        self._now_s = max(self._now_s, request.arrival_s)
        self._judge(request)
        claim = self._claim(request)
        try:
            self._make_room(claim)
        except EngineOverloaded:
            self._feasible.remove(_rank(request))
            raise
        self._new[request.request_id] = request
        self.input_bytes += request.input_bytes
        self._silent[request.request_id] = self._now_s
        self._shares.wait(claim, is_new=True)

    def _make_room(self, claim: Claim) -> None:
        """Raises EngineOverloaded."""
        if self._shares.num_waiting >= self._max_queued:
            displaced = self._shares.to_displace(claim)
            full = f"{self._shares.num_waiting} requests are queued already (max_queued)"
            if displaced is None:
                raise EngineOverloaded(full)
            self.cancel(self._new[displaced], Displaced(f"{full}, and one of a tenant with fewer took its place"))

    def cancel(self, request: Request, error: Exception | None = None) -> None:
        """Note that nobody wants it any more, or that it has come to an `error`; it gets no slot, and ends once nothing
        is in flight for it."""
        request.cancelled = True
        request.error = request.error or error
        self._cancelled[request.request_id] = request
        self._feasible.remove(_rank(request))
        self._shares.leave(self._claim(request))
        self.mark_changed(request)

    def admit(self, first: Request | None = None) -> list[Request]:
        """Give slots to queued requests. Returns those that got one. `first`: it gets one before the others."""
        admitted: list[Request] = []
        while self.slots.num_free and (request := first or self._next()) is not None:
            first = None
            self._leave_queue(request)
            self._admitted[request.request_id] = request
            request.slot = self.slots.take()
            self._shares.hold(self._claim(request))
            self._num_patient += self._is_patient(request)
            self._note_other(request)
            assert request.planned_stage is not None
            self._change(request, STAGE_STATES[request.planned_stage][0])
            admitted.append(request)
        return admitted

    def next_exchange(self, is_at_rest: Callable[[Request], bool]) -> tuple[Request, Request] | None:
        """A request whose slot another should have, and that one. None if there is a free slot, nobody should give one
        to anybody, or all that could go have something in flight. To be asked again once the slot was taken back and
        given to the other.

        For a share: a tenant that owns more than its share gives to one that owns less. The tenant that owns most gives
        first, within it the user that owns most, and of that one's requests the last in the order of admission. That is
        the least urgent one, which the planner would come to last, so as a rule it is the least advanced, too; and
        among its own it is the last to get a slot again.

        For a deadline: one that is not feasible gives to one that is, in the same order, if there are more of its kind
        with slots than are kept for it; to another user's or tenant's only if its own owns more.

        Slots do not go to and fro: a share makes those of tenants more equal, since nobody falls below it by giving or
        comes above it by getting; a deadline does not make them less equal, and leaves fewer slots with late ones.
        """
        if self.slots.num_free:
            return None
        return self._exchange_for_share(is_at_rest) or self._exchange_for_deadline(is_at_rest)

    def _exchange_for_share(self, is_at_rest: Callable[[Request], bool]) -> tuple[Request, Request] | None:
        waiting = self._next()
        share = self._shares.share() if waiting is not None else 0
        if waiting is None or self._num_held(waiting)[0] >= share:
            return None
        richer = [request for request in self._admitted.values() if self._num_held(request)[0] > share]
        return self._exchange(richer, waiting, is_at_rest)

    def _exchange_for_deadline(self, is_at_rest: Callable[[Request], bool]) -> tuple[Request, Request] | None:
        waiting = self._first_of(self._lanes(FEASIBLE_LANES)) if len(self._others) > self._num_for_others else None
        if waiting is None:
            return None
        could_go = [request for request in self._others.values() if self._may_give(request, waiting)]
        return self._exchange(could_go, waiting, is_at_rest)

    def _may_give(self, request: Request, waiting: Request) -> bool:
        """Whether the tenant, or of the same one the user, owns more than that of the request that waits; its own
        slots anybody may use as well as can be."""
        (tenants, users), (tenants_waiting, users_waiting) = self._num_held(request), self._num_held(waiting)
        if request.asked.tenant != waiting.asked.tenant:
            return tenants > tenants_waiting
        return request.asked.user == waiting.asked.user or users > users_waiting

    def _exchange(
        self, requests: list[Request], waiting: Request, is_at_rest: Callable[[Request], bool]
    ) -> tuple[Request, Request] | None:
        could_go = [
            (self._num_held(request), self._claim(request).rank, request)
            for request in requests
            if request.state in CAN_BE_SET_ASIDE and not request.cancelled and is_at_rest(request)
        ]
        return (max(could_go)[2], waiting) if could_go else None

    def set_aside(self, request: Request) -> None:
        """Take its slot back. It is queued again with its progress, but no device has its state any more. Nothing may
        be in flight for it."""
        assert not request.cancelled
        request.holders = ()
        request.forget_dispatched()
        self._change(request, RequestState.QUEUED)
        self._give_slot_back(request)
        self._set_aside[request.request_id] = request
        self.saved_bytes += _saved_bytes(request)
        self._shares.wait(self._claim(request), is_new=False)

    def _leave_queue(self, request: Request) -> None:
        self._new.pop(request.request_id, None)
        if self._set_aside.pop(request.request_id, None) is not None:
            self.saved_bytes -= _saved_bytes(request)

    def move(self, request: Request, state: RequestState) -> None:
        """Change a request's state; a terminal state frees its slot and forgets it."""
        assert state is not RequestState.QUEUED, "that is set_aside's"
        self._change(request, state)
        if state in TERMINAL_STATES:
            self._cancelled.pop(request.request_id, None)
            self._feasible.remove(_rank(request))
            self._silent.pop(request.request_id, None)
            self.input_bytes -= request.input_bytes
            if request.request_id in self._admitted:
                self._give_slot_back(request)
            else:
                self._shares.leave(self._claim(request))
                self._leave_queue(request)
        else:
            self.heard_of(request)
            if request.is_feasible:
                self._judge(request)

    def _change(self, request: Request, state: RequestState) -> None:
        assert state in LEGAL_TRANSITIONS[request.state], f"{request.state} → {state}"
        request.state = state
        self.mark_changed(request)

    # Slots --------------------------------------------------------------------------------------------------------

    def change_slot(self, request: Request) -> None:
        """Give the request another slot, of which there must be one."""
        self.slots.release(request.slot)
        request.slot = self.slots.take()

    def _give_slot_back(self, request: Request) -> None:
        del self._admitted[request.request_id]
        self._others.pop(request.request_id, None)
        self.slots.release(request.slot)
        request.slot = -1
        self._num_patient -= self._is_patient(request)
        self._shares.release(self._claim(request))

    def _next(self) -> Request | None:
        """Who gets the next slot."""
        first = self._first_of(self._lanes(LANES))
        if first is not None and first.is_feasible and len(self._others) < self._num_for_others:
            other = self._first_of(self._lanes(OTHER_LANES))
            if other is not None and self._num_held(other) <= self._num_held(first):
                return other
        return first

    def _lanes(self, lanes: tuple[Lane, ...]) -> list[Lane]:
        """Those of which somebody may have a slot."""
        return [lane for lane in lanes if not lane.is_patient or self._num_patient < self._max_patient]

    def _first_of(self, lanes: list[Lane]) -> Request | None:
        request_id = self._shares.next(lanes)
        return None if request_id is None else self._new.get(request_id) or self._set_aside[request_id]

    def _num_held(self, request: Request) -> tuple[int, int]:
        """Slots of its tenant and of its user."""
        return self._shares.num_held(request.asked.tenant, request.asked.user)

    def _claim(self, request: Request) -> Claim:
        due_s = _deadline_s(request) if request.is_feasible else request.arrival_s + self._patience_s
        return Claim(
            request_id=request.request_id,
            tenant=request.asked.tenant,
            user=request.asked.user,
            rank=(not request.is_feasible, due_s, -request.asked.priority, request.request_id),
            lane=Lane(is_feasible=request.is_feasible, is_patient=self._is_patient(request)),
        )


def _deadline_s(request: Request) -> float | None:
    """The one that slots are given by."""
    return request.engine_deadline_s


def _rank(request: Request) -> Rank:
    """Among those with a deadline; one without is not among them, and has a rank all the same."""
    deadline_s = _deadline_s(request)
    due_s = math.inf if deadline_s is None else deadline_s
    return due_s, -request.asked.priority, request.request_id


def _saved_bytes(request: Request) -> int:
    return 0 if request.saved is None else request.saved.nbytes
