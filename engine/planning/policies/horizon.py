"""The `horizon` policy: forward-filled earliest deadline first over requests whose degree may change at every chunk.

The steps, in the order of `plan`: start decodes and encodes; collect what is left to denoise; fill the free profile in
order of deadline, dropping (for this decision only) the largest where something does not fit; give each its degree;
widen with the left-over devices; start what is ready, unless a short wait for its full degree ends no later.

Requests without SLO have a soft deadline. They never displace one with an SLO, nobody is dropped among them, and they
go in order of that deadline whether or not it has passed, so none starves behind newer ones. A request that can no
longer meet its SLO is *late*: it is served from left-over devices, and by the rescue rule when it has waited long.

Of a long backlog (requests whose deadline has passed, see `Snapshot`) only the most urgent few are looked at, so that a
decision costs the same however far behind the system is.

Energy modes and budgets act where degrees are chosen: on the levels of `forward_fill.place`, and on what left-over
devices may be used for (see `energy_mode.py`).

A device is left idle beside ready requests only on purpose: it is promised to a request whose chunk or encode ends
soon, the ready one would rather wait for more devices than take a long step on few, or the ready ones are late and
their step at that degree would block it for long.
"""

import functools
import math
from collections.abc import Iterator, Sequence

from tetrion.engine.config import EnergyMode
from tetrion.engine.planning.degrees import DegreeTable
from tetrion.engine.planning.energy_mode import affordable_steps, apply_budget, set_patient_aside, worth_using
from tetrion.engine.planning.forward_fill import DROP_FIRST, Work, fill, fill_soft
from tetrion.engine.planning.free_profile import FreeProfile
from tetrion.engine.planning.horizon_options import horizon_options
from tetrion.engine.planning.policies.leftover import Option, gain, widen
from tetrion.engine.planning.round_builder import RoundBuilder
from tetrion.engine.planning.slo import denoise_due_s, due_s, slo_s, urgency
from tetrion.engine.planning.snapshot import RequestView, RoundPlan, Snapshot
from tetrion.engine.stages import AFTER_STEPS, AUX_STAGES, BEFORE_STEPS

AUX_SOON_S = 0.036
"""Devices whose encode or decode ends within this count as free when degrees are decided."""
DROPPED_VALUE = 0.25
"""Worth of left-over devices to requests that were dropped, relative to those that count on their deadline."""
LATE_ITEMS = 8
"""So many late requests compete for left-over devices; more of them mean saturation."""
BACKLOG_LOOKED_AT = 48
"""So many of the backlog may take a device that is still idle after that."""
LATE_STEP_CHUNKS = 2.0
"""Late requests run only at degrees whose step takes at most this many chunk lengths (or the widest)."""
RESCUE_AGE = 10.0
"""A request this many SLOs (or patiences) old may own a device."""
MIN_CANDIDATES = 48
"""At least so many of the most urgent requests (else 4 per device) enter the fill."""


def plan(snapshot: Snapshot) -> RoundPlan:
    """The next round. Pure: same snapshot, same plan."""
    tick = _Tick(snapshot)
    if not tick.builder.idle:
        return RoundPlan()
    tick.start_aux()
    tick.collect()
    waiting = set_patient_aside(tick.works, snapshot.now_s)
    on_time = [work for work in tick.works if not work.is_late and not work.is_soft and work not in waiting]
    soft = [work for work in tick.works if work.is_soft]
    bound = tick.options.max_candidates or max(MIN_CANDIDATES, 4 * len(snapshot.devices))
    rescued = tick.rescued = tick.rescue(soft) or tick.rescue_late(on_time[:bound])
    profile = tick.free_profile(rescued)
    dropped = fill(profile, on_time[:bound], DROP_FIRST[tick.options.drop]) + on_time[bound:]
    fill_soft(profile, [work for work in soft[:bound] if work not in rescued])
    placed = [*rescued, *(work for work in [*on_time, *soft] if work.level)]
    left = tick.set_targets(placed)
    placed = [work for work in placed if work not in tick.holding]
    lucky = tick.use_left_over(left, placed, dropped)
    return tick.start_denoise([*placed, *dropped, *soft[bound:], *lucky])


class _Tick:
    """One planning decision."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        self.config = snapshot.config
        self.options = horizon_options(snapshot.config)
        self.now_s = snapshot.now_s
        self.builder = RoundBuilder(snapshot)
        self.tables = snapshot.tables
        self.first_step_s: dict[str, float] = {}
        """When the steps of a request that has other stages before it can begin."""
        self.in_chunk = [request for request in snapshot.requests if self._is_in_chunk(request)]
        self.works: list[Work] = []
        self.late: list[Work] = []
        self.rescued: list[Work] = []
        self.holding: list[Work] = []
        self.capacity = 0

    def _is_in_chunk(self, request: RequestView) -> bool:
        return request.ready_s > self.builder.limit_s and (request.step_index > 0 or request.stage in AFTER_STEPS)

    # 1: decode, encode --------------------------------------------------------------------------------------------

    def start_aux(self) -> None:
        """Start every decode, then every encode that finds an idle device, most urgent first."""
        requests = self.snapshot.requests
        aux = [request for stage in reversed(AUX_STAGES) for request in requests if request.stage == stage]
        if not aux:
            return
        claimed = {device for request in requests if request.stage == "denoise" for device in request.members}
        for request in aux:
            table, stage = self.tables[request.model, request.cost_key], request.stage
            if self.builder.idle and self.builder.is_ready(request):
                end_s = self.builder.free_s[self.builder.start(request, claimed=claimed).members[0]]
            else:
                end_s = max(request.ready_s, min(self.builder.free_s.values())) + table.cost.aux_s[stage]
            if stage in BEFORE_STEPS:
                self.first_step_s[request.request_id] = end_s + (table.before_s[stage] - table.cost.aux_s[stage])

    # 2: what is left to do ----------------------------------------------------------------------------------------

    def collect(self) -> None:
        """Every request with steps left but for the backlog, most urgent first; those that are late, the first of the
        backlog among them, likewise."""
        self.works = [self._work(request) for request in self.snapshot.requests if request.stage not in AFTER_STEPS]
        self.late = [work for work in self.works if work.is_late]
        if backlog := [self._work(request) for request in self.snapshot.backlog[:LATE_ITEMS]]:
            self.late = sorted(self.late + backlog, key=lambda work: urgency(work.view, self.config))

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

    # 6, 7, 10: targets --------------------------------------------------------------------------------------------

    def rescue(self, waiting: Sequence[Work]) -> list[Work]:
        """The oldest request that has waited `RESCUE_AGE` times its SLO or the patience."""
        old = [w for w in waiting if self.now_s - w.view.arrival_s > RESCUE_AGE * slo_s(w.view, self.config)]
        return [min(old, key=lambda work: (work.view.arrival_s, work.view.request_id))] if old else []

    def rescue_late(self, on_time: Sequence[Work]) -> list[Work]:
        """The late request to rescue, if the system is below saturation: few are late, and nobody on time has to be
        dropped for it."""
        are_few = max(len(self.snapshot.backlog), len(self.late)) <= LATE_ITEMS
        if not (self.late and self.options.rescue and are_few):
            return []
        rescued = self.rescue(self.late)
        return rescued if rescued and not fill(self.free_profile(rescued), on_time) else []

    def free_profile(self, rescued: Sequence[Work]) -> FreeProfile:
        """The devices that are free for all but the rescued."""
        profile = FreeProfile(self.now_s, self.builder.free_s.values())
        for work in rescued:
            degree = work.table.narrowest
            profile.take_devices(degree, self.now_s, work.start_s + work.remaining * work.table.step_s[degree])
        return profile

    def set_targets(self, placed: Sequence[Work]) -> int:
        """Give each request its level (the rescued its narrowest degree) while devices last; returns how many are
        left. Who had better wait for more is set aside in `holding`."""
        busy = {device for request in self.in_chunk for device in request.members}
        builder, soon_s = self.builder, self.now_s + AUX_SOON_S
        self.capacity = sum([d in builder.idle or d in busy or free <= soon_s for d, free in builder.free_s.items()])
        left = self.capacity
        ends: list[tuple[float, int]] = []
        for work in placed:
            level = work.level or work.table.narrowest
            degree = work.table.largest[min(level, left)]
            if 0 < degree < level and work.is_ready:
                wait_end_s = _freed_s(ends, level - left)
                if self._had_better_wait(work.table, degree, level, wait_end_s):
                    self.holding.append(work)
                    continue
            work.target = degree
            left -= degree
            if degree:
                ends.append((work.start_s + work.remaining * work.table.step_s[degree], degree))
        return left

    def _had_better_wait(self, table: DegreeTable, degree: int, wanted: int, wait_end_s: float) -> bool:
        """Whether one step at `degree` would end later than the wait for `wanted` devices and one step on those, steps
        not being divisible as the fill takes them to be. Then the loop is to look again in time."""
        if self.now_s + table.step_s[degree] <= wait_end_s + table.step_s[wanted]:
            return False
        self.builder.wake_at(wait_end_s - self.config.lead_s)
        return True

    def use_left_over(self, left: int, placed: Sequence[Work], dropped: Sequence[Work]) -> list[Work]:
        """With the devices that are left, widen requests and give some of the others a target; late ones come last.
        Returns those of them that got one."""
        if left <= 0:
            return []
        items = [*self._options(placed, left, 1.0), *self._options(dropped[:MIN_CANDIDATES], left, DROPPED_VALUE)]
        left = widen(items, left)
        if left <= 0:
            return []
        late = [work for work in self.late if work not in self.rescued][:LATE_ITEMS]
        widen(list(self._options(_first_of_each_class(late, left), left, 1.0)), left)
        return [work for work in late if work.target]

    def _options(self, works: Sequence[Work], left: int, value: float) -> Iterator[tuple[Work, list[Option]]]:
        """What could be done for each with so many more devices."""
        for work in works:
            target, most = work.target, work.target + left
            degrees = self._left_over_degrees(work.view, work.table, work.is_late, target)
            options = [(d, value * gain(work, d)) for d in degrees if target < d <= most]
            if options:
                yield work, options

    def _left_over_degrees(self, view: RequestView, table: DegreeTable, is_late: bool, target: int) -> Sequence[int]:
        """Degrees at which left-over devices may run a request that has `target`."""
        degrees = self._late_degrees(table) if is_late else table.degrees
        return worth_using(view, table, target, degrees, self.config, self.now_s)

    def _late_degrees(self, table: DegreeTable) -> Sequence[int]:
        """Degrees at which left-over devices may run a late request: none that blocks them for long, but always one
        that can come free."""
        widest, longest_s = table.largest[self.capacity], LATE_STEP_CHUNKS * self.config.chunk_s
        return [degree for degree in table.degrees if degree == widest or table.step_s[degree] <= longest_s]

    # 8, 9: start --------------------------------------------------------------------------------------------------

    def start_denoise(self, works: Sequence[Work]) -> RoundPlan:
        """Start what is ready: first those of `works` with a target, then whatever can use devices that are promised
        to nobody."""
        starting: list[tuple[RequestView, int]] = []
        room, promised = len(self.builder.idle), self._promised()
        for work in works:
            if work.is_ready and work.target:
                degree = work.target if work.target <= room else self._degree_now(work, room)
                if degree:
                    starting.append((work.view, degree))
                    room -= degree
                else:
                    promised += work.target
        if room > promised:
            starting += self._start_others(works, room - promised)
        wanted = [set(view.members[:degree]) for view, degree in starting]
        for i, (view, degree) in enumerate(starting):
            steps = None if view.budget_j is None else self._affordable_steps(view, degree)
            self.builder.start(view, degree, claimed=set().union(*wanted[i + 1 :]), num_steps=steps)
        num_ready = sum([work.is_ready for work in self.works]) + len(self.snapshot.backlog)
        return self.builder.build(num_held=len(self.builder.idle) if num_ready > len(starting) else 0)

    def _affordable_steps(self, view: RequestView, degree: int) -> int:
        """Steps that the budget leaves for a chunk; one where it leaves none."""
        table, start_s = self.tables[view.model, view.cost_key], max(self.now_s, view.ready_s)
        return max(1, affordable_steps(view, table, degree, self.config, start_s))

    def _start_others(self, works: Sequence[Work], room: int) -> Iterator[tuple[RequestView, int]]:
        """What else is started, and at which degree."""
        widest: dict[tuple[DegreeTable, bool, EnergyMode, float | None], int] = {}
        for view, table, is_late in self._without_target(works):
            alike = table, is_late, view.energy_mode, view.budget_j
            degree = widest.get(alike)
            if degree is None:
                degrees = self._left_over_degrees(view, table, is_late, target=0)
                degree = widest[alike] = max([d for d in degrees if d <= room], default=0)
            if degree:
                yield view, degree
                room -= degree
                if not room:
                    return
                widest.clear()

    def _without_target(self, works: Sequence[Work]) -> Iterator[tuple[RequestView, DegreeTable, bool]]:
        """What else could start, and whether it is late: those of `works`, then late ones."""
        for work in works:
            if work.is_ready and not work.target and not work.is_late:
                yield work.view, work.table, False
        for work in self.late:
            if work.is_ready and not work.target:
                yield work.view, work.table, True
        for view in self.snapshot.backlog[LATE_ITEMS:BACKLOG_LOOKED_AT]:
            yield view, self.tables[view.model, view.cost_key], True

    def _promised(self) -> int:
        """Devices that requests whose chunk or encode still runs will take in addition to those they have."""
        held = {request.request_id: len(request.members) for request in self.in_chunk}
        coming = [work for work in self.works if work.target and not work.is_ready]
        return sum([max(0, work.target - held.get(work.view.request_id, 0)) for work in coming])

    @functools.cached_property
    def _surplus(self) -> list[float]:
        """When each device that is busy now will be free for somebody else, ascending."""
        targets = {work.view.request_id: work.target for work in self.works}
        times: list[float] = []
        for request in self.in_chunk:
            kept = 1 if request.stage in AFTER_STEPS else targets[request.request_id]
            times += [request.ready_s] * (len(request.members) - kept)
        in_chunk = {device for request in self.in_chunk for device in request.members}
        soon_s, idle = self.now_s + AUX_SOON_S, self.builder.idle
        times += [t for d, t in self.builder.free_s.items() if t <= soon_s and d not in idle and d not in in_chunk]
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
