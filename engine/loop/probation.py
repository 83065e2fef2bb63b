"""Requests on probation: devices died, or fell silent, at all but the last of their attempts.

Each runs alone, one after the other: on one device that has been kept free of everything else (where devices have
roles, another one a stage), so that no other request pays if that device dies too, and nobody else is blamed for it.
"""

from tetrion.engine.loop.in_flight import InFlightTable
from tetrion.engine.loop.request_table import RequestTable
from tetrion.engine.loop.requests import Request
from tetrion.engine.loop.snapshots import SnapshotBuilder
from tetrion.engine.planning.cost.tables import CostTables
from tetrion.engine.planning.policies.registry import get_planner
from tetrion.engine.planning.snapshot import Assignment


class Probation:
    """`snapshots` is told which device is kept free."""

    def __init__(self, table: RequestTable, in_flight: InFlightTable, snapshots: SnapshotBuilder) -> None:
        self._table, self._in_flight, self._snapshots = table, in_flight, snapshots
        self._planner = get_planner("fixed-1")
        self._request_id = ""

    def plan(self, costs: CostTables) -> tuple[Assignment, ...]:
        """What the request whose turn it is does next; nothing while it does something, or its device is not free."""
        request = self._whose_turn()
        if request is None:
            self._snapshots.kept_free = None
            return ()
        kept_free = self._snapshots.kept_free
        able = self._snapshots.able(request)
        if kept_free is None or kept_free not in able:
            kept_free = self._snapshots.kept_free = self._soonest_free(able)
        if kept_free is None or request.cancelled or self._in_flight.of_device(kept_free):
            return ()
        snapshot = self._snapshots.of_one(request, kept_free, costs)
        return () if snapshot is None else self._planner(snapshot).assignments

    def _whose_turn(self) -> Request | None:
        """The same until it has ended, or was hit no more."""
        waiting = {request.request_id: request for request in self._table.admitted() if request.is_on_probation}
        request = waiting.get(self._request_id) or next(iter(waiting.values()), None)
        self._request_id = "" if request is None else request.request_id
        return request

    def _soonest_free(self, able: frozenset[int]) -> int | None:
        return min(sorted(able), key=lambda device_id: len(self._in_flight.of_device(device_id)), default=None)
