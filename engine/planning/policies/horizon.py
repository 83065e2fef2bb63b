"""The `horizon` policy: forward-filled earliest deadline first over requests whose degree may change at every chunk.

The steps, in the order of `plan`: start decodes and encodes; collect what is left to denoise; fill the free profile in
order of deadline, dropping (for this decision only) the largest where something does not fit; give each its degree;
share out the left-over devices; start what is ready, unless a short wait for its full degree ends no later.

Deadlines that can be met go before all else. Requests that can no longer meet theirs (*late* ones) and those that have
none stand in one *pool*, so that stating a deadline never makes a request worse off: the oldest first, large ones a
little later than small ones (see `slo.turn`). Left-over devices go where they are worth most: to the pool, to the
dropped, or to widening those that are on time. What they are worth to the pool is the option `late_worth`: more of it
finishes late work sooner, and costs deadlines. Where nothing is ever left over, the first of the pool has a turn now
and then, so that everybody's turn comes.

Between tenants (and users of one) that have had more device time than their share and those that have not, the latter
go first: they are placed first, the others' requests are dropped first, and stand behind in the pool.

Of a long backlog (requests whose deadline has passed, see `Snapshot`) only the first few are looked at, so that a
decision costs the same however far behind the system is.

Energy modes and budgets act where degrees are chosen: on the levels of `forward_fill.place`, and on what left-over
devices may be used for (see `energy_mode.py`).

A device is left idle beside ready requests only on purpose: it is promised to a request whose chunk or encode ends
soon, the ready one would rather wait for more devices than take a long step on few, or the ready ones are in the pool
and their step at that degree would block it for long.
"""

import functools
import itertools
import math
from collections.abc import Iterator, Sequence

from tetrion.engine.config import EnergyMode
from tetrion.engine.planning.degrees import DegreeTable
from tetrion.engine.planning.energy_mode import affordable_steps, apply_budget, set_patient_aside, worth_using
from tetrion.engine.planning.forward_fill import DROP_FIRST, Work, fill
from tetrion.engine.planning.free_profile import FreeProfile
from tetrion.engine.planning.horizon_options import horizon_options
from tetrion.engine.planning.policies.leftover import Option, gain, widen
from tetrion.engine.planning.round_builder import RoundBuilder
from tetrion.engine.planning.slo import denoise_due_s, due_s, turn
from tetrion.engine.planning.snapshot import RequestView, RoundPlan, Snapshot
from tetrion.engine.stages import AFTER_STEPS, AUX_STAGES, BEFORE_STEPS

AUX_SOON_S = 0.036
"""Devices whose encode or decode ends within this count as free when degrees are decided."""
DROPPED_WORTH = 0.25
"""Worth of left-over devices to requests that were dropped, relative to those that count on their deadline."""
REST_WORTH = 0.83
"""Worth to all but the first of the pool, relative to it: it goes first, but not at the price of throughput."""
POOL_ITEMS = 8
"""So many of the pool compete for left-over devices."""
BACKLOG_LOOKED_AT = 48
"""So many of the backlog may take a device that is still idle after that."""
LONGEST_STEP_S = 0.4
"""Requests of the pool run only at degrees whose step takes at most this long (or the widest)."""
FAR_BEHIND = 2
"""Where more requests of the pool than so many a device wait, left-over devices are worth proportionally less to it:
each is late by so much that finishing it sooner helps little, and costs others their deadlines."""
TURN_EVERY = 60
"""Of so many chunks of its own length the oldest of the pool has one before all others, once it has waited for its
patience."""
MIN_CANDIDATES = 48
"""At least so many of the most urgent requests (else one per device) enter the fill."""


def plan(snapshot: Snapshot) -> RoundPlan:
    """The next round. Pure: same snapshot, same plan."""
    tick = _Tick(snapshot)
    if not tick.builder.idle:
        return RoundPlan()
    tick.start_aux()
    tick.collect()
    tick.fill()
    tick.set_targets()
    tick.share_left_over()
    return tick.start_denoise()


class _Tick:
    """One planning decision, step by step."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        self.config = snapshot.config
        self.options = horizon_options(snapshot.config)
        self.now_s = snapshot.now_s
        self.builder = RoundBuilder(snapshot)
        self.tables = snapshot.tables
        self.requests: Sequence[RequestView] = snapshot.requests
        """By rank, within it by urgency."""
        if snapshot.ranks:
            self.requests = sorted(snapshot.requests, key=snapshot.rank)
        self.first_step_s: dict[str, float] = {}
        """When the steps of a request that has other stages before it can begin."""
        self.in_chunk = [request for request in snapshot.requests if self._is_in_chunk(request)]
        self.works: list[Work] = []
        self.on_time: list[Work] = []
        """Those that can be in time, in the order in which they are placed."""
        self.pool: list[Work] = []
        self.beyond: list[RequestView] = []
        self.placed: list[Work] = []
        self.dropped: list[Work] = []
        self.capacity = self.left = 0

    def _is_in_chunk(self, request: RequestView) -> bool:
        return request.ready_s > self.builder.limit_s and (request.step_index > 0 or request.stage in AFTER_STEPS)

    # 1: decode, encode --------------------------------------------------------------------------------------------

    def start_aux(self) -> None:
        """Start every decode, then every encode that finds an idle device, most urgent first."""
        requests = self.requests
        aux = [request for stage in reversed(AUX_STAGES) for request in requests if request.stage == stage]
        if not aux:
            return
        claimed = {device for request in requests if request.stage == "denoise" for device in request.members}
        for request in aux:
            table, stage = self.tables[request.model, request.cost_key], request.stage
            if self.builder.idle_for(stage) and self.builder.is_ready(request):
                end_s = self.builder.free_s[self.builder.start(request, claimed=claimed).members[0]]
            else:
                end_s = max(request.ready_s, self.builder.soonest_s(stage)) + table.cost.aux_s[stage]
            if stage in BEFORE_STEPS:
                self.first_step_s[request.request_id] = end_s + (table.before_s[stage] - table.cost.aux_s[stage])

    # 2: what is left to do ----------------------------------------------------------------------------------------

    def collect(self) -> None:
        """Every request with steps left, of the backlog the first few: on time, in the pool, or not urgent enough to be
        looked at."""
        bound = self.options.max_candidates or max(MIN_CANDIDATES, self.tables.num_devices)
        works, num_on_time = self.works, 0
        for request in self.requests:
            if request.stage in AFTER_STEPS:
                continue
            if num_on_time >= bound and request.deadline_s is not None and not self._saves_energy(request):
                self.beyond.append(request)
                continue
            work = self._work(request)
            num_on_time += not (work.is_late or work.is_soft)
            works.append(work)
        aside = set_patient_aside(works, self.now_s)
        self.on_time = [work for work in works if not (work.is_late or work.is_soft or work in aside)]
        pool = [work for work in works if work.is_late or work.is_soft]
        pool += [self._work(request) for request in self.snapshot.backlog[:POOL_ITEMS]]
        self.pool = sorted(pool, key=self._seniority)

    def _saves_energy(self, request: RequestView) -> bool:
        """Whether what it is given depends on joules, which its table has to know."""
        return request.energy_mode != "fastest" and bool(self.tables[request.model, request.cost_key].step_j)

    def _seniority(self, work: Work) -> tuple[int, float, int, str]:
        return self.snapshot.rank(work.view), *turn(work.view, work.table)

    def _work(self, request: RequestView) -> Work:
        table = self.tables[request.model, request.cost_key]
        start_s, is_ready = self.now_s, True
        if request.stage in BEFORE_STEPS:
            start_s, is_ready = self.first_step_s[request.request_id], False
        elif request.ready_s > start_s:
            start_s, is_ready = request.ready_s, self.builder.is_ready(request)
        due = denoise_due_s(due_s(request, self.config), table.after_s)
        work = Work(request, table, start_s, due, is_ready)
        if request.budget_j is not None:
            apply_budget(work, self.config)
        return work

    # 3, 4, 5: who is in time --------------------------------------------------------------------------------------

    def fill(self) -> None:
        """Place the most urgent in the free profile, and drop what does not fit: of a higher rank before a lower."""
        drop_first = DROP_FIRST[self.options.drop]
        profile = FreeProfile(self.now_s, self.builder.free_for("denoise").values())
        self.placed = self._whose_turn_it_is()
        for work in self.placed:
            profile.take_devices(
                work.level, self.now_s, self.now_s + max(self.config.chunk_s, work.table.step_s[work.level])
            )
        for _, alike in itertools.groupby(self.on_time, key=lambda work: self.snapshot.rank(work.view)):
            self.dropped += fill(profile, list(alike), drop_first)
        self.placed += [work for work in self.on_time if work.level]

    def _whose_turn_it_is(self) -> list[Work]:
        """The oldest of the pool, at its narrowest degree, if it is time."""
        oldest = self.pool[:1]
        if not oldest or not oldest[0].is_ready:
            return []
        (work,) = oldest
        length_s = max(self.config.chunk_s, work.table.step_s[work.degrees[0]])
        is_patient = self.now_s - work.view.arrival_s <= self.config.patience_s
        if is_patient or self.now_s % (TURN_EVERY * length_s) >= length_s:
            return []
        del self.pool[0]
        work.level = work.degrees[0]
        return oldest

    # 6: targets ---------------------------------------------------------------------------------------------------

    def set_targets(self) -> None:
        """Give each that is placed its level while devices last. Who had better wait for more gets none."""
        busy = {device for request in self.in_chunk for device in request.members}
        builder, soon_s = self.builder, self.now_s + AUX_SOON_S
        devices = builder.free_for("denoise").items()
        self.capacity = sum([d in builder.idle or d in busy or free <= soon_s for d, free in devices])
        left = self.capacity
        ends: list[tuple[float, int]] = []
        holding: list[Work] = []
        for work in self.placed:
            degree = work.table.largest[min(work.level, left)]
            if 0 < degree < work.level and work.is_ready:
                wait_end_s = _freed_s(ends, work.level - left)
                if self._had_better_wait(work.table, degree, work.level, wait_end_s):
                    holding.append(work)
                    continue
            work.target = degree
            left -= degree
            if degree:
                ends.append((work.start_s + work.remaining * work.table.step_s[degree], degree))
        self.placed = [work for work in self.placed if work not in holding]
        self.left = left

    def _had_better_wait(self, table: DegreeTable, degree: int, wanted: int, wait_end_s: float) -> bool:
        """Whether one step at `degree` would end later than the wait for `wanted` devices and one step on those, steps
        not being divisible as the fill takes them to be. Then the loop is to look again in time."""
        if self.now_s + table.step_s[degree] <= wait_end_s + table.step_s[wanted]:
            return False
        self.builder.wake_at(wait_end_s - self.config.lead_s)
        return True

    # 7: left-over devices -----------------------------------------------------------------------------------------

    def share_left_over(self) -> None:
        """Widen requests and give others a target, as it is worth most."""
        if self.left <= 0:
            return
        worth, rest = self._pool_worth(), _first_of_each_class(self.pool[1:POOL_ITEMS], self.left)
        items = [
            *self._options(self.placed, False, 1.0),
            *self._options(self.dropped[:MIN_CANDIDATES], False, DROPPED_WORTH),
            *self._options(self.pool[:1], True, worth),
            *self._options(rest, True, worth * REST_WORTH),
        ]
        widen(items, self.left)

    def _pool_worth(self) -> float:
        """Of left-over devices, to the first of the pool."""
        waiting = len(self.pool) + len(self.snapshot.backlog[POOL_ITEMS:])
        return self.options.late_worth * min(1.0, FAR_BEHIND * self.tables.num_devices / max(1, waiting))

    def _options(self, works: Sequence[Work], are_in_pool: bool, worth: float) -> Iterator[tuple[Work, list[Option]]]:
        """What could be done for each with so many more devices."""
        for work in works:
            target, most = work.target, work.target + self.left
            degrees = self._left_over_degrees(work.view, work.table, are_in_pool, target)
            gains = [(d, worth * gain(work, d)) for d in degrees if target < d <= most]
            options = gains if are_in_pool else [(d, work.table.efficiency[d] * value) for d, value in gains]
            if options:
                yield work, options

    def _left_over_degrees(self, view: RequestView, table: DegreeTable, is_in_pool: bool, target: int) -> Sequence[int]:
        """Degrees at which left-over devices may run a request that has `target`."""
        degrees = self._pool_degrees(table) if is_in_pool else table.degrees
        return worth_using(view, table, target, degrees, self.config, self.now_s)

    def _pool_degrees(self, table: DegreeTable) -> Sequence[int]:
        """None that blocks devices for long, but always one that can come free."""
        widest = table.largest[self.capacity]
        return [degree for degree in table.degrees if degree == widest or table.step_s[degree] <= LONGEST_STEP_S]

    # 8, 9: start --------------------------------------------------------------------------------------------------

    def start_denoise(self) -> RoundPlan:
        """Start what is ready: first those with a target, then whatever can use devices that are promised to nobody."""
        starting: list[tuple[RequestView, int]] = []
        room, promised = self.builder.room, self._promised()
        for work in itertools.chain(self.placed, self.dropped, self.pool):
            if work.is_ready and work.target:
                degree = work.target if work.target <= room else self._degree_now(work, room)
                if degree:
                    starting.append((work.view, degree))
                    room -= degree
                else:
                    promised += work.target
        if room > promised:
            starting += self._start_others(room - promised)
        self.builder.start_all([(view, degree, self._affordable_steps(view, degree)) for view, degree in starting])
        num_ready = sum([work.is_ready for work in self.works]) + len(self.snapshot.backlog)
        num_ready += sum(map(self._may_start, self.beyond))
        return self.builder.build(num_held=self.builder.room if num_ready > len(starting) else 0)

    def _affordable_steps(self, view: RequestView, degree: int) -> int | None:
        """Steps that the budget leaves for a chunk; one where it leaves none. None: there is no budget."""
        if view.budget_j is None:
            return None
        table, start_s = self.tables[view.model, view.cost_key], max(self.now_s, view.ready_s)
        return max(1, affordable_steps(view, table, degree, self.config, start_s))

    def _start_others(self, room: int) -> Iterator[tuple[RequestView, int]]:
        """What else is started, and at which degree."""
        widest: dict[tuple[DegreeTable, bool, EnergyMode, float | None], int] = {}
        for view, table, is_in_pool in self._without_target():
            alike = table, is_in_pool, view.energy_mode, view.budget_j
            degree = widest.get(alike)
            if degree is None:
                degrees = self._left_over_degrees(view, table, is_in_pool, target=0)
                degree = widest[alike] = max([d for d in degrees if d <= room], default=0)
            if degree:
                yield view, degree
                room -= degree
                if not room:
                    return
                widest.clear()

    def _without_target(self) -> Iterator[tuple[RequestView, DegreeTable, bool]]:
        """What else could start, and whether it is of the pool."""
        for work in itertools.chain(self.placed, self.dropped):
            if work.is_ready and not work.target:
                yield work.view, work.table, False
        for view in self.beyond:
            if self._may_start(view):
                yield view, self.tables[view.model, view.cost_key], False
        for work in self.pool:
            if work.is_ready and not work.target:
                yield work.view, work.table, True
        for view in self.snapshot.backlog[POOL_ITEMS:BACKLOG_LOOKED_AT]:
            yield view, self.tables[view.model, view.cost_key], True

    def _may_start(self, view: RequestView) -> bool:
        return view.stage not in BEFORE_STEPS and self.builder.is_ready(view)

    def _promised(self) -> int:
        """Devices that requests whose chunk or encode still runs will take in addition to those they have."""
        held = {request.request_id: self.builder.num_denoising(request) for request in self.in_chunk}
        coming = [work for work in self.works if work.target and not work.is_ready]
        return sum([max(0, work.target - held.get(work.view.request_id, 0)) for work in coming])

    @functools.cached_property
    def _surplus(self) -> list[float]:
        """When each device that is busy now will be free for somebody else, ascending."""
        targets = {work.view.request_id: work.target for work in self.works}
        times: list[float] = []
        for request in self.in_chunk:
            kept = targets.get(request.request_id, 0)
            if request.stage in AFTER_STEPS:
                kept = any([self.builder.serves(member, request.stage) for member in request.members])
            times += [request.ready_s] * (self.builder.num_denoising(request) - kept)
        in_chunk = {device for request in self.in_chunk for device in request.members}
        soon_s, idle = self.now_s + AUX_SOON_S, self.builder.idle
        devices = self.builder.free_for("denoise").items()
        times += [t for d, t in devices if t <= soon_s and d not in idle and d not in in_chunk]
        return sorted(times)

    def _degree_now(self, work: Work, room: int) -> int:
        """The degree to start at although the target does not fit; 0: nothing fits, or it waits for its target."""
        degree, missing = work.table.largest[room], work.target - room
        if not degree or missing > len(self._surplus):
            return degree
        waits = self._had_better_wait(work.table, degree, work.target, self._surplus[missing - 1])
        return 0 if waits else degree


def _freed_s(ends: Sequence[tuple[float, int]], num_devices: int) -> float:
    """When so many devices have come free, of those that are so at (time, devices); infinity: never."""
    for end_s, freed in sorted(ends):
        num_devices -= freed
        if num_devices <= 0:
            return end_s
    return math.inf


def _first_of_each_class(works: Sequence[Work], num: int) -> list[Work]:
    """The first `num` of each class. On so many devices no more can start, and to the knapsack they are all alike."""
    counts: dict[DegreeTable, int] = {}
    first = []
    for work in works:
        counts[work.table] = counts.get(work.table, 0) + 1
        if counts[work.table] <= num:
            first.append(work)
    return first
