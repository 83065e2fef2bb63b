"""The `horizon` policy: forward-filled earliest deadline first over requests whose degree may change at every chunk.

The steps, in the order of `plan`: start decodes and encodes; collect what is left to denoise; fill the free profile in
order of deadline, dropping (for this decision only) the largest where something does not fit; give each its degree;
widen with the left-over devices; start what is ready, unless a short wait for its full degree ends no later.

Requests without SLO have a soft deadline. They never displace one with an SLO, nobody is dropped among them, and they
go in order of that deadline whether or not it has passed, so none starves behind newer ones. A request that can no
longer meet its SLO is *late*: it is served from left-over devices, and by the rescue rule when it has waited long.

A device is left idle beside ready requests only on purpose: it is promised to a request whose chunk or encode ends
soon, or the ready ones are late and their step at that degree would block it for long.
"""

from collections.abc import Sequence

from tetrion.engine.planning.degrees import DegreeTable, degree_tables
from tetrion.engine.planning.forward_fill import Work, fill, fill_soft
from tetrion.engine.planning.free_profile import FreeProfile
from tetrion.engine.planning.leftover import Option, gain, widen
from tetrion.engine.planning.round_builder import RoundBuilder
from tetrion.engine.planning.slo import denoise_due_s, due_s, slo_s, urgency
from tetrion.engine.planning.snapshot import RequestView, RoundPlan, Snapshot

AUX_SOON_S = 0.036
"""Devices whose encode or decode ends within this count as free when degrees are decided."""
DROPPED_VALUE = 0.25
LATE_VALUE = 0.05
"""Worth of left-over devices to requests that do not count on their deadline, relative to those that do."""
LATE_ITEMS = 8
"""So many late requests compete for left-over devices; more of them mean saturation."""
LATE_STEP_CHUNKS = 2.0
"""Late requests run only at degrees whose step takes at most this many chunk lengths (or the widest)."""
RESCUE_AGE = 10.0
"""A request this many SLOs (or patiences) old may own a device."""
MIN_CANDIDATES = 48
"""At least so many of the most urgent requests (else 4 per device) enter the fill."""


def plan(snapshot: Snapshot) -> RoundPlan:
    """The next round. Pure: same snapshot, same plan."""
    if not snapshot.devices:
        return RoundPlan()
    tick = _Tick(snapshot)
    tick.start_aux()
    works = tick.collect()
    on_time = [work for work in works if not work.is_late and not work.is_soft]
    soft = [work for work in works if work.is_soft]
    late = [work for work in works if work.is_late]
    bound = max(MIN_CANDIDATES, 4 * len(snapshot.devices))
    rescued = tick.rescue(soft) or tick.rescue_late(late, on_time[:bound])
    profile = tick.free_profile(rescued)
    dropped = fill(profile, on_time[:bound]) + on_time[bound:]
    fill_soft(profile, [work for work in soft[:bound] if work not in rescued])
    placed = [work for work in [*on_time, *soft] if work.level]
    late = [work for work in late if work not in rescued]
    left = tick.set_targets(rescued, placed)
    tick.use_left_over(left, [*rescued, *placed], dropped, late)
    tick.start_denoise([*rescued, *placed, *dropped, *soft[bound:], *late])
    return tick.builder.build()


class _Tick:
    """One planning decision."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.config = snapshot.config
        self.now_s = snapshot.now_s
        self.builder = RoundBuilder(snapshot)
        self.tables = degree_tables(snapshot)
        self.requests = sorted(snapshot.requests, key=lambda request: urgency(request, snapshot.config))
        self.encode_end_s: dict[str, float] = {}
        self.longest_late_step_s = LATE_STEP_CHUNKS * snapshot.config.chunk_s
        self.in_chunk = [request for request in self.requests if self._is_in_chunk(request)]
        self.capacity = 0

    def table(self, request: RequestView) -> DegreeTable:
        return self.tables[request.width, request.height]

    def _is_in_chunk(self, request: RequestView) -> bool:
        return not self.builder.is_ready(request) and (request.step_index > 0 or request.stage == "decode")

    # 1: decode, encode --------------------------------------------------------------------------------------------

    def start_aux(self) -> None:
        """Start every decode, then every encode that finds an idle device, most urgent first."""
        for stage in ("decode", "encode"):
            for request in self.requests:
                if request.stage == stage:
                    end_s = self._start_one_aux(request)
                    if stage == "encode":
                        self.encode_end_s[request.request_id] = end_s

    def _start_one_aux(self, request: RequestView) -> float:
        """Start it, if it can; when it ends or would end at the earliest."""
        builder = self.builder
        if builder.idle and builder.is_ready(request):
            others = (other for other in self.requests if other is not request and other.stage == "denoise")
            started = builder.start(request, claimed={device for other in others for device in other.members})
            return builder.free_s[started.members[0]]
        return max(request.ready_s, min(builder.free_s.values())) + self.table(request).cost.encode_s

    # 2: what is left to do ----------------------------------------------------------------------------------------

    def collect(self) -> list[Work]:
        """Every request with steps left, most urgent first."""
        works = []
        for request in self.requests:
            if request.stage != "decode":
                table = self.table(request)
                start_s = self.encode_end_s.get(request.request_id, max(self.now_s, request.ready_s))
                due = denoise_due_s(due_s(request, self.config), table.cost.decode_s)
                is_ready = request.stage == "denoise" and self.builder.is_ready(request)
                works.append(Work(request, table, start_s, due, is_ready))
        return works

    # 6, 7, 10: targets --------------------------------------------------------------------------------------------

    def rescue(self, waiting: Sequence[Work]) -> list[Work]:
        """The oldest request that has waited `RESCUE_AGE` times its SLO or the patience."""
        old = [w for w in waiting if self.now_s - w.view.arrival_s > RESCUE_AGE * slo_s(w.view, self.config)]
        return [min(old, key=lambda work: (work.view.arrival_s, work.view.request_id))] if old else []

    def rescue_late(self, late: Sequence[Work], on_time: Sequence[Work]) -> list[Work]:
        """The late request to rescue, if the system is below saturation: few are late, and nobody on time has to be
        dropped for it."""
        rescued = self.rescue(late) if len(late) <= LATE_ITEMS else []
        return rescued if rescued and not fill(self.free_profile(rescued), on_time) else []

    def free_profile(self, rescued: Sequence[Work]) -> FreeProfile:
        """The devices that are free for all but the rescued."""
        profile = FreeProfile(self.now_s, self.builder.free_s.values())
        for work in rescued:
            degree = work.table.narrowest
            profile.take_devices(degree, self.now_s, work.start_s + work.remaining * work.table.step_s[degree])
        return profile

    def set_targets(self, rescued: Sequence[Work], placed: Sequence[Work]) -> int:
        """Give the rescued its narrowest degree, then each placed request its level while devices last; returns how
        many are left."""
        busy = {device for request in self.in_chunk for device in request.members}
        builder, soon_s = self.builder, self.now_s + AUX_SOON_S
        self.capacity = sum(d in builder.idle or d in busy or free <= soon_s for d, free in builder.free_s.items())
        left = self.capacity
        for work in [*rescued, *placed]:
            work.target = work.table.largest[min(work.level or work.table.narrowest, left)]
            left -= work.target
        return left

    def use_left_over(self, left: int, placed: Sequence[Work], dropped: Sequence[Work], late: Sequence[Work]) -> None:
        """Widen requests, and start some that have no target, with the devices that are left."""
        if left <= 0:
            return
        items: list[tuple[Work, list[Option]]] = []
        for works, value in ((placed, 1.0), (dropped[:MIN_CANDIDATES], DROPPED_VALUE), (late[:LATE_ITEMS], LATE_VALUE)):
            for work in works:
                options = [
                    (d, value * gain(work, d)) for d in self._allowed(work) if work.target < d <= work.target + left
                ]
                if options:
                    items.append((work, options))
        widen(items, left)

    def _allowed(self, work: Work) -> Sequence[int]:
        """Degrees at which left-over devices may run it. A late request keeps one that can come free."""
        table = work.table
        if not work.is_late:
            return table.degrees
        widest = table.largest[self.capacity]
        return [d for d in table.degrees if d == widest or table.step_s[d] <= self.longest_late_step_s]

    # 8, 9: start --------------------------------------------------------------------------------------------------

    def start_denoise(self, works: Sequence[Work]) -> None:
        """Start what is ready: first those with a target, then others on devices promised to nobody."""
        surplus = self._surplus(works)
        starting: list[tuple[Work, int]] = []
        rest: list[Work] = []
        room, promised = len(self.builder.idle), self._promised(works)
        for work in works:
            if work.is_ready and work.target:
                degree = self._degree_now(work, room, surplus)
                if degree:
                    starting.append((work, degree))
                    room -= degree
                else:
                    promised += work.target
            elif work.is_ready:
                rest.append(work)
        for work in rest:
            degree = max((d for d in self._allowed(work) if d <= room - promised), default=0)
            if degree:
                starting.append((work, degree))
                room -= degree
        self._start(starting)

    def _promised(self, works: Sequence[Work]) -> int:
        """Devices that requests whose chunk or encode still runs will take in addition to those they have."""
        held = {request.request_id: len(request.members) for request in self.in_chunk}
        coming = (work for work in works if not work.is_ready)
        return sum(max(0, work.target - held.get(work.view.request_id, 0)) for work in coming)

    def _surplus(self, works: Sequence[Work]) -> list[float]:
        """When each device that is busy now will be free for somebody else, ascending."""
        targets = {work.view.request_id: work.target for work in works}
        times: list[float] = []
        for request in self.in_chunk:
            kept = 1 if request.stage == "decode" else targets[request.request_id]
            times += [request.ready_s] * (len(request.members) - kept)
        in_chunk = {device for request in self.in_chunk for device in request.members}
        soon_s, idle = self.now_s + AUX_SOON_S, self.builder.idle
        times += [t for d, t in self.builder.free_s.items() if t <= soon_s and d not in idle and d not in in_chunk]
        return sorted(times)

    def _degree_now(self, work: Work, room: int, surplus: Sequence[float]) -> int:
        """The degree to start at now; 0: nothing fits, or it waits for its target, since one step at what is idle now
        would end later than the wait and one step at the target."""
        if work.target <= room:
            return work.target
        degree, missing = work.table.largest[room], work.target - room
        if not degree or missing > len(surplus):
            return degree
        wait_end_s, step_s = surplus[missing - 1], work.table.step_s
        if self.now_s + step_s[degree] <= wait_end_s + step_s[work.target]:
            return degree
        self.builder.wake_at(wait_end_s - self.config.lead_s)
        return 0

    def _start(self, starting: Sequence[tuple[Work, int]]) -> None:
        wanted = [set(work.view.members[:degree]) for work, degree in starting]
        for i, (work, degree) in enumerate(starting):
            self.builder.start(work.view, degree, claimed=set().union(*wanted[i + 1 :]))
