"""What holds for every registered policy: on random snapshots, and on random traces run to their end."""

import math
import random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.planning.simulation import Simulation, check_plan, content
from tests.engine.planning.test_plans import NOW_S, PROFILE, random_trace, snapshots
from tetrion.engine.config import PlannerConfig
from tetrion.engine.planning.policies.horizon import POOL_ITEMS
from tetrion.engine.planning.policies.registry import FAMILIES, POLICIES, WORK_CONSERVING, get_planner
from tetrion.engine.planning.snapshot import RequestView, RoundPlan, Snapshot

EVERY_POLICY = (*POLICIES, "fixed-1", "fixed-2", "fixed-3", "fixed-8", "tetriserve-g1", "tetriserve-g2")


def test_every_family_is_covered() -> None:
    families = {name.rstrip("0123456789").removesuffix("-") for name in EVERY_POLICY if name not in POLICIES}
    assert families == set(FAMILIES) and set(POLICIES) >= WORK_CONSERVING


@pytest.mark.parametrize("policy", EVERY_POLICY)
@settings(max_examples=40, deadline=None)
@given(snapshot=snapshots())
def test_any_plan_keeps_the_contract_and_repeats(policy: str, snapshot: Snapshot) -> None:
    planner = get_planner(policy)
    before = content(snapshot)
    plan = planner(snapshot)
    check_plan(snapshot, plan)
    assert planner(snapshot) == plan
    assert content(snapshot) == before
    usable = {request.request_id: PROFILE.degrees(request.cost_key) for request in snapshot.requests}
    assert all(len(a.members) in usable[a.request_id] for a in plan.assignments if a.stage == "denoise")


def idle_beside_work(snapshot: Snapshot, plan: RoundPlan) -> bool:
    """Whether a device stays idle although a request without pinned degrees is ready and was not served."""
    limit_s = snapshot.now_s + snapshot.config.lead_s
    busy = {device for assignment in plan.assignments for device in assignment.members}
    served = {assignment.request_id for assignment in plan.assignments}
    idle = any(device.free_s <= limit_s and device.device_id not in busy for device in snapshot.devices)
    return idle and any(r.ready_s <= limit_s and r.request_id not in served for r in snapshot.requests)


@pytest.mark.parametrize("policy", sorted(WORK_CONSERVING))
@settings(max_examples=150, deadline=None)
@given(snapshot=snapshots())
def test_work_conserving_policies_leave_no_device_idle(policy: str, snapshot: Snapshot) -> None:
    free = tuple(msgspec.structs.replace(request, force_degrees=()) for request in snapshot.requests)
    snapshot = msgspec.structs.replace(snapshot, requests=free)
    for shown in (snapshot, with_backlog(snapshot)):
        assert not idle_beside_work(snapshot, get_planner(policy)(shown))


def with_backlog(snapshot: Snapshot) -> Snapshot:
    """The same state as the engine shows it: those past their deadline that nothing runs for are kept apart."""
    limit_s = snapshot.now_s + snapshot.config.lead_s

    def is_overdue(request: RequestView) -> bool:
        has_slo = request.deadline_s is not None and request.deadline_s < snapshot.now_s and not request.force_degrees
        return has_slo and request.stage == "denoise" and request.ready_s <= limit_s

    kept = tuple(request for request in snapshot.requests if not is_overdue(request))
    return msgspec.structs.replace(
        snapshot, requests=kept, backlog=tuple(request for request in snapshot.requests if is_overdue(request))
    )


@pytest.mark.parametrize("policy", EVERY_POLICY)
@settings(max_examples=60, deadline=None)
@given(snapshot=snapshots())
def test_what_is_kept_apart_is_served_as_if_it_were_not(policy: str, snapshot: Snapshot) -> None:
    apart = with_backlog(snapshot)
    together, split = (get_planner(policy)(each) for each in (snapshot, apart))
    check_plan(snapshot, split)
    if len(apart.backlog) <= POOL_ITEMS:
        assert summary(split) == summary(together)
        assert (split.wake_s, split.num_held) == (together.wake_s, together.num_held)


def summary(plan: RoundPlan) -> list[tuple[str, str, int, int]]:
    return [(a.request_id, a.stage, len(a.members), a.chunk_steps) for a in plan.assignments]


@settings(max_examples=100, deadline=None)
@given(snapshot=snapshots())
def test_horizon_says_how_many_devices_it_holds_back(snapshot: Snapshot) -> None:
    """All that are idle beside a ready request, and none where nothing is ready (see `test_plans` for its reasons)."""
    free = tuple(msgspec.structs.replace(request, force_degrees=()) for request in snapshot.requests)
    snapshot = with_backlog(msgspec.structs.replace(snapshot, requests=free))
    plan = get_planner("horizon")(snapshot)
    everything = msgspec.structs.replace(snapshot, requests=snapshot.all_requests, backlog=())
    assert bool(plan.num_held) == idle_beside_work(everything, plan)
    busy = {device for assignment in plan.assignments for device in assignment.members}
    limit_s = snapshot.now_s + snapshot.config.lead_s
    idle = [d for d in snapshot.devices if d.free_s <= limit_s and d.device_id not in busy]
    assert plan.num_held in (0, len(idle))


@pytest.mark.parametrize("policy", EVERY_POLICY)
@settings(max_examples=25, deadline=None)
@given(snapshot=snapshots())
def test_an_idle_machine_starts_something_or_says_when(policy: str, snapshot: Snapshot) -> None:
    devices = tuple(msgspec.structs.replace(device, free_s=NOW_S) for device in snapshot.devices)
    requests = tuple(msgspec.structs.replace(request, ready_s=NOW_S) for request in snapshot.requests)
    plan = get_planner(policy)(msgspec.structs.replace(snapshot, devices=devices, requests=requests))
    assert not requests or plan.assignments or (plan.wake_s is not None and NOW_S < plan.wake_s < NOW_S + 5)


@pytest.mark.parametrize("policy", EVERY_POLICY)
@settings(max_examples=6, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    num_devices=st.sampled_from((1, 2, 3, 8)),
    rate_per_s=st.sampled_from((0.5, 3.0, 100.0)),
    patience_s=st.sampled_from((1.0, 60.0)),
)
def test_every_request_is_served_after_arrivals_stop(
    policy: str, seed: int, num_devices: int, rate_per_s: float, patience_s: float
) -> None:
    """Late ones, those without a deadline and those with pinned degrees too."""
    trace = random_trace(random.Random(seed), num_devices, 20, rate_per_s)
    Simulation(get_planner(policy), trace, num_devices, PROFILE, PlannerConfig(patience_s=patience_s)).run()
    for request in trace:
        assert math.isfinite(request.finish_s), request
        assert len(request.degrees) == request.num_steps
