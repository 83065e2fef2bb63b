"""A small discrete-event simulation of devices under a planner, for tests only: no noise, one command ahead.

It checks every plan against the contract of `snapshot.py` as it carries it out.
"""

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec
import numpy

from tetrion.engine.config import PlannerConfig
from tetrion.engine.planning.cost.profile import Profile
from tetrion.engine.planning.cost.tables import CostTables
from tetrion.engine.planning.degrees import DegreeTables, legal_for
from tetrion.engine.planning.slo import urgency
from tetrion.engine.planning.snapshot import Assignment, DeviceView, Planner, RequestView, RoundPlan, Snapshot
from tetrion.engine.roles import Stages
from tetrion.engine.stages import NEXT_STAGE, STAGES, Stage

HEADS = 24
BASE_SLO_S = {8: (1.5, 2.0, 3.0, 5.0), 4: (1.5, 2.5, 5.0, 10.0)}
SIZES = ((256, 256), (512, 512), (1024, 1024), (2048, 2048))


def flux_profile() -> Profile:
    """FLUX.1-dev step times of the prototype behind PLANNER.md's table, in ms (degrees 3, 6, 8 extrapolated)."""
    rows = {
        "256x256": ((30.2, 21.9, 17.9, 15.9, 14.18, 13.5), 15),
        "512x512": ((53.5, 36.4, 26.87, 22.1, 17.68, 15.4), 35),
        "1024x1024": ((164.7, 105.7, 75.1, 59.8, 45.39, 37.96), 120),
        "2048x2048": ((824.5, 469.9, 324.5, 251.8, 182.68, 147.03), 480),
    }
    return make_profile(
        {
            size: {"step_ms": dict(zip((1, 2, 3, 4, 6, 8), steps, strict=True)), "encode_ms": 25, "decode_ms": decode}
            for size, (steps, decode) in rows.items()
        }
    )


def make_profile(classes: dict[str, dict[str, object]], heads: int = HEADS) -> Profile:
    return msgspec.convert({"heads": heads, "classes": classes}, Profile)


def costs_of(profile: Profile) -> CostTables:
    """The tables of a pool that serves one model, whose name is empty."""
    return CostTables(profiles={"": profile})


def legal_degrees(num_devices: int) -> tuple[int, ...]:
    return tuple(n for n in range(1, num_devices + 1) if HEADS % n == 0)


@dataclass
class SimRequest:
    """A request of a trace; `slo_s` None: no SLO. The lower fields are the simulation's."""

    request_id: str
    arrival_s: float
    width: int
    height: int
    num_steps: int
    slo_s: float | None
    weight: float = 1.0
    priority: int = 0
    force_degrees: tuple[int, ...] = ()
    stage: Stage | None = "encode"
    step_index: int = 0
    ready_s: float = 0.0
    members: tuple[int, ...] = ()
    finish_s: float = math.inf
    degrees: list[int] = field(default_factory=list)

    @property
    def cost_key(self) -> str:
        return f"{self.width}x{self.height}"

    @property
    def deadline_s(self) -> float | None:
        return None if self.slo_s is None else self.arrival_s + self.slo_s

    @property
    def is_met(self) -> bool:
        return self.finish_s <= (math.inf if self.deadline_s is None else self.deadline_s)

    def view(self) -> RequestView | None:
        if self.stage is None:
            return None
        return RequestView(
            request_id=self.request_id,
            stage=self.stage,
            model="",
            cost_key=self.cost_key,
            step_index=self.step_index,
            num_steps=self.num_steps,
            arrival_s=self.arrival_s,
            deadline_s=self.deadline_s,
            ready_s=self.ready_s,
            members=self.members,
            weight=self.weight,
            priority=self.priority,
            force_degrees=self.force_degrees,
        )


class Simulation:
    """Runs a trace to its end. `on_plan(snapshot, plan)` sees every decision."""

    def __init__(
        self,
        planner: Planner,
        trace: Sequence[SimRequest],
        num_devices: int,
        profile: Profile,
        config: PlannerConfig | None = None,
        on_plan: Callable[[Snapshot, RoundPlan], None] | None = None,
        overhead_s: tuple[float, float] = (0.0003, 0.0002),
        stages: Sequence[Stages] = (),
    ) -> None:
        """`stages`: of each device; all of all by default."""
        self.stages = stages or (STAGES,) * num_devices
        self.planner = planner
        self.trace = list(trace)
        self.costs = costs_of(profile)
        self.tables = DegreeTables(self.costs, sum("denoise" in own for own in self.stages))
        self.config = config or PlannerConfig()
        self.on_plan = on_plan
        self.step_overhead_s, self.regroup_s = overhead_s
        self.free_s = dict.fromkeys(range(num_devices), 0.0)
        self.alive: dict[str, SimRequest] = {}
        self.num_plans = 0

    def run(self, until_s: float = math.inf) -> list[SimRequest]:
        """Returns the trace, finished; raises AssertionError on a broken plan or when it no longer gets anywhere."""
        times = [request.arrival_s for request in self.trace]
        heapq.heapify(times)
        arrivals = sorted(self.trace, key=lambda request: (request.arrival_s, request.request_id), reverse=True)
        stalled = 0
        while times and times[0] <= until_s:
            now_s = heapq.heappop(times)
            while times and times[0] <= now_s + 1e-9:
                heapq.heappop(times)
            while arrivals and arrivals[-1].arrival_s <= now_s:
                request = arrivals.pop()
                request.ready_s = request.arrival_s
                self.alive[request.request_id] = request
            snapshot = self.snapshot(now_s)
            if not snapshot.requests:
                continue
            plan = self.planner(snapshot)
            self.num_plans += 1
            if self.on_plan is not None:
                self.on_plan(snapshot, plan)
            check_plan(snapshot, plan)
            for assignment in plan.assignments:
                end_s = self.start(assignment, now_s)
                for time_s in (end_s - self.config.lead_s, end_s):
                    heapq.heappush(times, max(time_s, now_s + 1e-9))
            if plan.wake_s is not None:
                stalled = 0 if plan.assignments else stalled + 1
                assert stalled < 1000, "the planner wakes itself without doing anything"
                heapq.heappush(times, max(plan.wake_s, now_s + 1e-6))
        return self.trace

    def snapshot(self, now_s: float) -> Snapshot:
        views = [view for request in self.alive.values() if (view := request.view())]
        return Snapshot(
            now_s=now_s,
            requests=tuple(sorted(views, key=lambda view: urgency(view, self.config))),
            devices=tuple(
                DeviceView(device_id=d, free_s=max(t, now_s), stages=self.stages[d]) for d, t in self.free_s.items()
            ),
            tables=self.tables,
            config=self.config,
        )

    def start(self, assignment: Assignment, now_s: float) -> float:
        request = self.alive[assignment.request_id]
        start_s = max(now_s, request.ready_s, *(self.free_s[device] for device in assignment.members))
        cost = self.costs.cost("", request.cost_key)
        if assignment.stage == "denoise":
            end_s = start_s + assignment.chunk_steps * (cost.step_s(len(assignment.members)) + self.step_overhead_s)
            end_s += self.regroup_s * (assignment.members != request.members)
            request.step_index += assignment.chunk_steps
            request.degrees += [len(assignment.members)] * assignment.chunk_steps
            request.stage = "denoise" if request.step_index < request.num_steps else "decode"
        else:
            end_s = start_s + cost.aux_s[assignment.stage]
            request.stage = NEXT_STAGE[assignment.stage]
        if request.stage is None:
            request.finish_s = end_s
            del self.alive[request.request_id]
        request.ready_s, request.members = end_s, assignment.members
        self.free_s.update(dict.fromkeys(assignment.members, end_s))
        return end_s


def content(snapshot: Snapshot) -> bytes:
    """All that a snapshot says; of its tables the costs."""
    return msgspec.json.encode(
        msgspec.structs.asdict(snapshot) | {"tables": snapshot.costs, "ranks": list(snapshot.ranks.items())}
    )


def check_plan(snapshot: Snapshot, plan: RoundPlan) -> None:
    """Every promise that holds for any plan of any policy."""
    limit_s = snapshot.now_s + snapshot.config.lead_s
    requests = {request.request_id: request for request in snapshot.requests}
    free_s = {device.device_id: device.free_s for device in snapshot.devices}
    stages = {device.device_id: device.stages for device in snapshot.devices}
    devices = [device for assignment in plan.assignments for device in assignment.members]
    assert len(set(devices)) == len(devices), "a device twice"
    assert len({a.request_id for a in plan.assignments}) == len(plan.assignments), "a request twice"
    for assignment in plan.assignments:
        request = requests[assignment.request_id]
        assert assignment.stage == request.stage
        assert request.ready_s <= limit_s, "not ready"
        assert all(free_s[device] <= limit_s for device in assignment.members), "not free"
        assert all(assignment.stage in stages[device] for device in assignment.members), "against its role"
        if assignment.stage == "denoise":
            profile = snapshot.costs.profiles[request.model]
            num_devices = sum("denoise" in own for own in stages.values())
            assert len(assignment.members) in legal_for(profile, request.cost_key, num_devices)
            assert assignment.step_index == request.step_index
            assert 1 <= assignment.chunk_steps <= request.num_steps - request.step_index
        else:
            assert len(assignment.members) == 1
            assert assignment.chunk_steps == 0
    assert plan.wake_s is None or plan.wake_s >= snapshot.now_s


def planner_point_trace(
    seed: int, num_requests: int, rate_per_min: float, num_devices: int, slo_scale: float, mix: str = "uniform"
) -> list[SimRequest]:
    """The trace recipe behind PLANNER.md's table: Poisson arrivals, 28 steps, base SLOs times `slo_scale`."""
    draw = numpy.random.default_rng(seed)
    arrivals_s = numpy.cumsum(draw.exponential(60 / rate_per_min, num_requests))
    tokens = numpy.array([(width // 16) * (height // 16) for width, height in SIZES])
    worth = numpy.ones(len(SIZES)) if mix == "uniform" else numpy.exp(tokens / 16384)
    sizes = draw.choice(len(SIZES), num_requests, p=worth / worth.sum())
    slo_s = BASE_SLO_S[num_devices]
    return [
        SimRequest(f"r{i:04d}", float(arrival_s), *SIZES[size], 28, slo_s[size] * slo_scale)
        for i, (arrival_s, size) in enumerate(zip(arrivals_s, sizes, strict=True))
    ]


def attainment(trace: Sequence[SimRequest]) -> float:
    """Share of the requests finished by their deadline."""
    return sum(request.is_met for request in trace) / len(trace)
