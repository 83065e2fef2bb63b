"""Requests whose degree is pinned step by step (`force_degrees`), served beside any policy by one wrapper.

They are for tests and experiments, so what counts is that they run exactly as asked and harm nobody:

* A forced request whose turn has come (no unpinned request arrived before it) reserves the devices that become free
  first, as many as its degree needs, ahead of the policy, and starts when all of them are free. Reserved devices look
  busy to the policy. Reservations are made in order of arrival, so nothing can wait in a circle.
* One whose turn has not come takes what the policy leaves idle. Once it has waited `patience_s`, the unpinned requests
  that arrived after it are held back until those before it are finished: neither side can starve the other.
* Encode and decode take the first idle device that serves them.
* A chunk ends where the degree changes. A degree that the devices (that are left) cannot form becomes the largest
  legal one below it.
"""

from collections.abc import Sequence

import msgspec

from tetrion.engine.planning.round_builder import RoundBuilder
from tetrion.engine.planning.slo import arrival_order, urgency
from tetrion.engine.planning.snapshot import Planner, RequestView, RoundPlan, Snapshot
from tetrion.engine.stages import AFTER_STEPS


def serve_forced(policy: Planner) -> Planner:
    """`policy`, with requests that carry `force_degrees` served outside it."""

    def plan(snapshot: Snapshot) -> RoundPlan:
        forced = [request for request in snapshot.requests if request.force_degrees]
        if not forced or not snapshot.devices:
            return policy(snapshot)
        forced.sort(key=arrival_order)
        others = [request for request in _in_order(snapshot) if not request.force_degrees]
        first_other = min(map(arrival_order, others), default=None)
        table = _Reservations(snapshot)
        overtaken = []
        for request in forced:
            if request.stage != "denoise" or first_other is None or arrival_order(request) < first_other:
                table.start_or_reserve(request)
            else:
                overtaken.append(request)
        inner = policy(table.what_is_left(_not_held_back(others, overtaken, snapshot)))
        table.builder.idle.difference_update(device for a in inner.assignments for device in a.members)
        for request in overtaken:
            table.start_if_idle(request)
        return msgspec.structs.replace(inner, assignments=table.builder.build().assignments + inner.assignments)

    return plan


def _in_order(snapshot: Snapshot) -> list[RequestView]:
    """All requests by urgency, the backlog among them."""
    return sorted(snapshot.all_requests, key=lambda request: urgency(request, snapshot.config))


def pinned_degree(request: RequestView, legal: Sequence[int]) -> int:
    """The degree of the request's next step: the last entry holds for all that follow; at most what is legal."""
    wanted = _pin(request, request.step_index)
    return max((degree for degree in legal if degree <= wanted), default=legal[0])


def pinned_chunk_steps(request: RequestView, step_s: float, chunk_s: float) -> int:
    """Steps until the chunk is full or the pinned degree changes."""
    steps, first = request.chunk_steps(step_s, chunk_s), request.step_index
    changes = (k for k in range(1, steps) if _pin(request, first + k) != _pin(request, first))
    return next(changes, steps)


def _pin(request: RequestView, step_index: int) -> int:
    return request.force_degrees[min(step_index, len(request.force_degrees) - 1)]


def _not_held_back(
    others: Sequence[RequestView], overtaken: Sequence[RequestView], snapshot: Snapshot
) -> tuple[RequestView, ...]:
    """The unpinned requests that the policy may see: all, or those before a forced one that has lost patience."""
    impatient = [r for r in overtaken if snapshot.now_s - r.arrival_s > snapshot.config.patience_s]
    if not impatient:
        return tuple(others)
    turn = arrival_order(impatient[0])
    return tuple(request for request in others if arrival_order(request) < turn or request.stage in AFTER_STEPS)


class _Reservations:
    """What forced requests take ahead of the policy in one decision; `open`: devices neither taken nor reserved."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        self.builder = RoundBuilder(snapshot)
        self.open = set(self.builder.free_s)
        self.tables = snapshot.tables

    def start_or_reserve(self, request: RequestView) -> None:
        """Start a ready request, or keep the devices it needs free for it."""
        builder = self.builder
        if not builder.is_ready(request) or self.start_if_idle(request):
            return
        degree = self._degree(request)
        able = [device for device in self.open if builder.serves(device, "denoise")]
        if request.stage != "denoise" or degree > len(able):
            return
        reserved = sorted(able, key=lambda d: (builder.free_s[d], d not in request.members, d))[:degree]
        step_s = self._step_s(request, degree)
        builder.occupy(reserved, max(builder.free_s[d] for d in reserved) + step_s * self._chunk_steps(request, step_s))
        self.open.difference_update(reserved)

    def start_if_idle(self, request: RequestView) -> bool:
        """Start the request if it is ready and enough devices are idle."""
        degree = self._degree(request)
        if not self.builder.is_ready(request) or degree > len(self.builder.idle_for(request.stage)):
            return False
        num_steps = None
        if request.stage == "denoise":
            num_steps = self._chunk_steps(request, self._step_s(request, degree))
        self.open.difference_update(self.builder.start(request, degree, num_steps=num_steps).members)
        return True

    def what_is_left(self, requests: tuple[RequestView, ...]) -> Snapshot:
        """The snapshot for the policy: taken and reserved devices are busy in it."""
        busy_s = self.builder.limit_s + self.snapshot.config.chunk_s
        devices = tuple(
            device
            if device.device_id in self.open
            else msgspec.structs.replace(device, free_s=max(self.builder.free_s[device.device_id], busy_s))
            for device in self.snapshot.devices
        )
        return msgspec.structs.replace(self.snapshot, requests=requests, backlog=(), devices=devices)

    def _degree(self, request: RequestView) -> int:
        if request.stage != "denoise":
            return 1
        return pinned_degree(request, self.tables[request.model, request.cost_key].legal)

    def _step_s(self, request: RequestView, degree: int) -> float:
        return self.snapshot.costs.cost(request.model, request.cost_key).step_s(degree)

    def _chunk_steps(self, request: RequestView, step_s: float) -> int:
        return pinned_chunk_steps(request, step_s, self.snapshot.config.chunk_s)
