"""Finished pictures on their way to whoever asked for them, and what came of deadlines.

A request that is handed over in this process has kept its deadline, or not, when its picture is ready; one with a
`delivery` when its caller says that the last byte has left. A picture that nobody took any more counts for neither.
"""

from collections.abc import Callable

import msgspec

from tetrion.engine.loop.requests import Request
from tetrion.engine.planning.cost.delivery import DeliveryModel
from tetrion.engine.request import Delivered

MAX_ON_THE_WAY = 4096
"""Callers that never say what came of a picture must not fill the memory: the oldest are forgotten."""


class DeliveryFigures(msgspec.Struct, frozen=True, kw_only=True):
    """Sums. `deliver_s`: seconds from finished pictures to their last byte; `num_dropped`: pictures that nobody took.
    `num_met`, `num_missed`: deadlines by the last byte."""

    num_delivered: int = 0
    num_dropped: int = 0
    deliver_s: float = 0.0
    num_met: int = 0
    num_missed: int = 0


class Deliveries:
    """Times are seconds on the executor's clock."""

    def __init__(self, ended: Callable[[str, bool], None] = lambda tenant, is_met: None) -> None:
        """`ended` is told whether a tenant's deadline was met."""
        self._ended = ended
        self.model = DeliveryModel()
        self._on_the_way: dict[str, tuple[Request, float]] = {}
        """With when they were finished."""
        self._num_delivered = self._num_dropped = self._num_met = self._num_missed = 0
        self._deliver_s = 0.0

    def finished(self, request: Request, finished_s: float) -> None:
        """Its picture is ready."""
        if request.asked.delivery is None:
            self._settle(request, finished_s, finished_s)
            return
        self._on_the_way[request.request_id] = request, finished_s
        if len(self._on_the_way) > MAX_ON_THE_WAY:
            self.dropped(next(iter(self._on_the_way)))

    def delivered(self, request_id: str, now_s: float, took_s: float) -> Delivered | None:
        """The last byte has left. `took_s`: what it took without waiting for others' pictures or for a slow reader,
        which the next ones are predicted from. None for a request that is not on its way."""
        request, finished_s = self._on_the_way.pop(request_id, (None, 0.0))
        if request is None or request.asked.delivery is None:
            return None
        self.model.observe(request.asked.delivery, request.pixels, took_s)
        return self._settle(request, finished_s, now_s)

    def dropped(self, request_id: str) -> None:
        """Nobody takes the picture any more."""
        self._num_dropped += self._on_the_way.pop(request_id, None) is not None

    def _settle(self, request: Request, finished_s: float, now_s: float) -> Delivered:
        slo_met = None if request.deadline_s is None else now_s <= request.deadline_s
        self._num_delivered += 1
        self._deliver_s += now_s - finished_s
        self._num_met += slo_met is True
        self._num_missed += slo_met is False
        if slo_met is not None:
            self._ended(request.asked.tenant, slo_met)
        return Delivered(
            request_id=request.request_id,
            tenant=request.asked.tenant,
            latency_s=now_s - request.arrival_s,
            deliver_s=now_s - finished_s,
            slo_met=slo_met,
        )

    @property
    def figures(self) -> DeliveryFigures:
        return DeliveryFigures(
            num_delivered=self._num_delivered,
            num_dropped=self._num_dropped,
            deliver_s=self._deliver_s,
            num_met=self._num_met,
            num_missed=self._num_missed,
        )
