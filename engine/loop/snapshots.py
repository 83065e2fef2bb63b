"""What the planner is shown: the request table and what is in flight, as `Snapshot` values.

Looks ahead: whatever is dispatched counts as done at its predicted end, so that a device's next command can be planned
shortly before its running one ends. Per request one command may run and one be queued behind it.

A snapshot costs what has changed since the last one, not the number of requests: the view of a request that nothing is
in flight for does not depend on the time, so it is kept until the table says that the request has changed.
"""

import heapq
import itertools
import math
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from operator import itemgetter

import msgspec

from tetrion.engine.config import PlannerConfig
from tetrion.engine.executors.base import Executor
from tetrion.engine.loop.device_shares import DeviceShares
from tetrion.engine.loop.in_flight import InFlight, InFlightTable
from tetrion.engine.loop.request_table import RequestTable
from tetrion.engine.loop.requests import Request
from tetrion.engine.planning.admission import Forecast, num_around
from tetrion.engine.planning.cost.tables import CostTables
from tetrion.engine.planning.degrees import DegreeTables
from tetrion.engine.planning.horizon_options import horizon_options
from tetrion.engine.planning.slo import Turn, turn, urgency
from tetrion.engine.planning.snapshot import NO_RANKS, DeviceView, Holder, RequestView, Snapshot
from tetrion.engine.stages import STAGES, Stage

MAX_COMMANDS_PER_REQUEST = 2

Entry = tuple[float, int, str, RequestView]
"""A view behind its `urgency`, which is never the same for two requests: entries sort by it."""
OverdueEntry = tuple[Turn, RequestView]
"""A view behind its `slo.turn`."""


class SnapshotBuilder:
    """The views of all requests that can be given something now or later, in order of urgency."""

    def __init__(
        self,
        executor: Executor,
        table: RequestTable,
        in_flight: InFlightTable,
        config: PlannerConfig,
    ) -> None:
        self._executor = executor
        self._table = table
        self._in_flight = in_flight
        self._config = config
        self._energy_mode = horizon_options(config).energy
        self.kept_free: int | None = None
        """A device that is given nothing but what `of_one` is asked for."""
        self._all_stages = all(stages == STAGES for stages in executor.stages.values())
        self._tables: DegreeTables | None = None
        self._shares = DeviceShares(len(executor.device_ids), config.tenant_weights)
        self._entries: dict[str, Entry] = {}
        self._current: list[Entry] = []
        self._holders: Counter[Holder] = Counter()
        """How many of the views are whose."""
        self._overdue: dict[Holder, list[OverdueEntry]] = {}
        self._turns: dict[str, Turn] = {}
        """What each of these is behind."""
        self._backlog: tuple[RequestView, ...] | None = ()
        self._ranks: Mapping[Holder, int] = NO_RANKS
        self._running: frozenset[str] = frozenset()
        self._queued: dict[str, RequestView] = {}
        """Views of requests that wait in the queue, as far as somebody has asked for them."""

    def snapshot(self, costs: CostTables) -> Snapshot | None:
        """Everything as it is now; None if nothing can be started: there is no request, or no device that can be given
        something before its running command is about to end."""
        now_s = self._executor.now_s()
        free_s = self._free_s(now_s)
        if min(free_s.values(), default=math.inf) > now_s + self._config.lead_s:
            return None
        self._refresh(now_s)
        return self._snapshot(now_s, free_s, costs) if self._entries else None

    def forecast(self, costs: CostTables, newcomer: Request) -> Forecast:
        """What admission is to know of a new request. The snapshot has those that can still meet their deadlines, the
        ones in the queue as if they were admitted; of very many those nearest to its own, so that it costs the same
        however many there are. Its backlog are late ones that own a slot and
        are not only waiting for left-over devices."""
        now_s = self._executor.now_s()
        self._refresh(now_s)
        free_s = self._free_s(now_s)
        num_denoising = self._num_denoising(free_s)
        num_before, num_after = num_around(num_denoising, self._config)
        others, work_s = self._table.feasible_around(newcomer, num_before, num_after)
        ranks = self._shares.ranks(self._holders.keys() | {_holder(newcomer)}, now_s)
        own, last = ranks.get(_holder(newcomer), 0), max(ranks.values(), default=0)
        views = [
            view
            for request in others
            if ranks.get(_holder(request), 0) <= own and (view := self._view_in_forecast(request)) is not None
        ]
        late = [entry for request in self._table.late() if (entry := self._entries.get(request.request_id)) is not None]
        snapshot = Snapshot(
            now_s=now_s,
            requests=tuple(views),
            devices=self._devices(free_s),
            tables=self._tables_for(costs, num_denoising),
            config=self._config,
            backlog=tuple([entry[3] for entry in late if entry[0] >= now_s or not self._is_overdue(entry[3])]),
        )
        forecast = Forecast(snapshot=snapshot, newcomer=self.view_of_new(newcomer))
        if own < last:
            return forecast
        crowded_until_s = self._table.crowded_until_s(newcomer, num_after, num_denoising)
        return msgspec.structs.replace(forecast, work_before_s=work_s, crowded_until_s=crowded_until_s)

    def _view_in_forecast(self, request: Request) -> RequestView | None:
        if request.slot >= 0:
            return self.view_of(request.request_id)
        view = self._queued.get(request.request_id)
        if view is None:
            view = self._queued[request.request_id] = self.view_of_new(request)
        return view

    def of_one(self, request: Request, device_id: int, costs: CostTables) -> Snapshot | None:
        """As if there were nothing but this request and this idle device; None if something is in flight for it. Pinned
        degrees do not count."""
        stage, now_s = request.planned_stage, self._executor.now_s()
        if stage is None or self._in_flight.of_request(request.request_id):
            return None
        view = msgspec.structs.replace(self._view(request, stage, request.arrival_s), force_degrees=())
        return Snapshot(
            now_s=now_s,
            requests=(view,),
            devices=self._devices({device_id: now_s}),
            tables=DegreeTables(costs, 1),
            config=self._config,
        )

    def ran(self, request: Request, device_s: float) -> None:
        """The request was given so much device time."""
        self._shares.ran(_holder(request), device_s, self._executor.now_s())

    @property
    def usable(self) -> frozenset[int]:
        """Devices that may be given something."""
        return self._executor.alive & self._in_flight.devices

    def able(self, request: Request) -> frozenset[int]:
        """Those that serve its next stage."""
        stage, stages = request.planned_stage, self._executor.stages
        return self.usable if stage is None else frozenset({d for d in self.usable if stage in stages[d]})

    def view_of(self, request_id: str) -> RequestView | None:
        """The view of a request in the latest snapshot."""
        entry = self._entries.get(request_id)
        return None if entry is None else entry[3]

    def view_of_new(self, request: Request) -> RequestView:
        """A request of which nothing is done or in flight."""
        return self._view(request, STAGES[0], request.arrival_s)

    def _snapshot(self, now_s: float, free_s: dict[int, float], costs: CostTables) -> Snapshot:
        tables = self._tables_for(costs, self._num_denoising(free_s))
        self._set_aside(now_s, tables)
        self._rank(now_s)
        return Snapshot(
            now_s=now_s,
            requests=tuple([entry[3] for entry in self._current]),
            devices=self._devices(free_s),
            tables=tables,
            config=self._config,
            backlog=self._backlog or (),
            ranks=self._ranks,
        )

    def tables(self, costs: CostTables) -> DegreeTables:
        """For the devices that there are."""
        return self._tables_for(costs, self._num_denoising(self.usable - {self.kept_free}))

    def _num_denoising(self, device_ids: Collection[int]) -> int:
        """How many of these form degrees; 1 if none does, for costs are asked for all the same."""
        if self._all_stages:
            return max(1, len(device_ids))
        return max(1, sum(["denoise" in self._executor.stages[device_id] for device_id in device_ids]))

    def _devices(self, free_s: Mapping[int, float]) -> tuple[DeviceView, ...]:
        stages = self._executor.stages
        return tuple([DeviceView(device_id=d, free_s=time_s, stages=stages[d]) for d, time_s in free_s.items()])

    def _rank(self, now_s: float) -> None:
        """Whose turn it is, and the backlog in that order."""
        ranks = self._shares.ranks(self._holders.keys(), now_s)
        if self._backlog is None or (self._overdue and ranks != self._ranks):
            order = sorted(self._overdue, key=lambda holder: ranks.get(holder, 0))
            groups = itertools.groupby(order, key=lambda holder: ranks.get(holder, 0))
            alike = [
                heapq.merge(*[self._overdue[holder] for holder in holders], key=itemgetter(0)) for _, holders in groups
            ]
            self._backlog = tuple([view for entries in alike for _, view in entries])
        self._ranks = ranks

    def _tables_for(self, costs: CostTables, num_devices: int) -> DegreeTables:
        tables = self._tables
        if tables is None or tables.costs is not costs or tables.num_devices != num_devices:
            tables = self._tables = DegreeTables(costs, num_devices, tables)
        return tables

    def _refresh(self, now_s: float) -> None:
        """Look again at the requests that have changed, and at those that something is or was in flight for."""
        running = self._in_flight.request_ids()
        changed = self._table.take_changed() | running | self._running
        for request_id in changed:
            self._queued.pop(request_id, None)
            request = self._table.get_admitted(request_id)
            entries = self._in_flight.of_request(request_id)
            view = None if request is None else self._view_of_admitted(request, entries, now_s)
            known = self._entries.pop(request_id, None)
            if known is not None and known[3] == view:
                self._entries[request_id] = known
                continue
            if known is not None:
                self._take_out(known)
            if view is not None:
                self._entries[request_id] = (*urgency(view, self._config), view)
                insort(self._current, self._entries[request_id])
                self._holders[view.holder] += 1
        self._running = running

    def _take_out(self, entry: Entry) -> None:
        i, view = bisect_left(self._current, entry), entry[3]
        if i < len(self._current) and self._current[i] is entry:
            del self._current[i]
        else:
            entries = self._overdue[view.holder]
            del entries[bisect_left(entries, self._turns.pop(view.request_id), key=itemgetter(0))]
            if not entries:
                del self._overdue[view.holder]
            self._backlog = None
        self._holders[view.holder] -= 1
        if not self._holders[view.holder]:
            del self._holders[view.holder]

    def _set_aside(self, now_s: float, tables: DegreeTables) -> None:
        """Move to the backlog those whose deadline has passed with nothing in flight."""
        i = 0
        while i < len(self._current) and self._current[i][0] < now_s:
            view = self._current[i][3]
            if self._is_overdue(view):
                del self._current[i]
                key = self._turns[view.request_id] = turn(view, tables[view.model, view.cost_key])
                insort(self._overdue.setdefault(view.holder, []), (key, view), key=itemgetter(0))
                self._backlog = None
            else:
                i += 1

    def _is_overdue(self, view: RequestView) -> bool:
        """Its due time being past. Soft deadlines do not count, and requests with pinned degrees are not kept apart."""
        has_slo = view.deadline_s is not None and not view.force_degrees
        return has_slo and view.stage == "denoise" and view.request_id not in self._running

    def _free_s(self, now_s: float) -> dict[int, float]:
        """When each usable device is free. One that holds as many commands as it may is beyond the lead, however soon
        they are predicted to end."""
        usable, in_flight = self.usable - {self.kept_free}, self._in_flight
        free_s, beyond_s = {}, now_s + 2 * self._config.lead_s
        for device_id in self._executor.device_ids:
            if device_id in usable:
                time_s = in_flight.free_s(device_id, now_s)
                free_s[device_id] = time_s if time_s > beyond_s or in_flight.has_room(device_id) else beyond_s
        return free_s

    def _view_of_admitted(self, request: Request, running: Sequence[InFlight], now_s: float) -> RequestView | None:
        stage = request.planned_stage
        if stage is None or request.cancelled or len(running) >= MAX_COMMANDS_PER_REQUEST:
            return None
        if request.is_on_probation:
            return None  # see probation.py
        ready_s = max([entry.expected_end_s(now_s) for entry in running], default=request.arrival_s)
        return self._view(request, stage, ready_s)

    def _view(self, request: Request, stage: Stage, ready_s: float) -> RequestView:
        asked, config = request.asked, self._config
        weight = asked.weight * config.tenant_weights.get(asked.tenant, 1.0)
        budget_j = asked.energy.budget_j
        return RequestView(
            request_id=request.request_id,
            stage=stage,
            model=request.params.model,
            cost_key=request.cost_key,
            step_index=request.planned_step_index,
            num_steps=request.num_steps,
            arrival_s=request.arrival_s,
            deadline_s=request.engine_deadline_s,
            ready_s=ready_s,
            members=request.planned_holders,
            weight=weight * config.class_weights.get(request.cost_key, 1.0) if config.class_weights else weight,
            priority=asked.priority,
            holder=_holder(request),
            force_degrees=asked.force_degrees,
            energy_mode=asked.energy.mode or self._energy_mode,
            budget_j=None if budget_j is None else budget_j - request.spent_j,
        )


def _holder(request: Request) -> Holder:
    return request.asked.tenant, request.asked.user
