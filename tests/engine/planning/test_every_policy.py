"""What holds for every registered policy: on random snapshots, and on random traces run to their end."""

import math
import random

import msgspec
import pytest
from hypothesis import given, settings

from tetrion.engine.config import PlannerConfig
from tetrion.engine.planning.registry import FAMILIES, POLICIES, WORK_CONSERVING, get_planner
from tetrion.engine.planning.snapshot import RoundPlan, Snapshot

from .simulation import Simulation, check_plan
from .test_plans import NOW_S, PROFILE, random_trace, snapshots

EVERY_POLICY = (*POLICIES, "fixed-1", "fixed-2", "fixed-3", "fixed-8", "tetriserve-g1", "tetriserve-g2")


def test_every_family_is_covered() -> None:
    families = {name.rstrip("0123456789").removesuffix("-") for name in EVERY_POLICY if name not in POLICIES}
    assert families == set(FAMILIES) and set(POLICIES) >= WORK_CONSERVING


@pytest.mark.parametrize("policy", EVERY_POLICY)
@settings(max_examples=40, deadline=None)
@given(snapshot=snapshots())
def test_any_plan_keeps_the_contract_and_repeats(policy: str, snapshot: Snapshot) -> None:
    planner = get_planner(policy)
    before = msgspec.json.encode(snapshot)
    plan = planner(snapshot)
    check_plan(snapshot, plan)
    assert planner(snapshot) == plan
    assert msgspec.json.encode(snapshot) == before
    usable = {request.request_id: PROFILE.degrees(request.width, request.height) for request in snapshot.requests}
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
    assert not idle_beside_work(snapshot, get_planner(policy)(snapshot))


@pytest.mark.parametrize("policy", EVERY_POLICY)
@settings(max_examples=25, deadline=None)
@given(snapshot=snapshots())
def test_an_idle_machine_starts_something_or_says_when(policy: str, snapshot: Snapshot) -> None:
    devices = tuple(msgspec.structs.replace(device, free_s=NOW_S) for device in snapshot.devices)
    requests = tuple(msgspec.structs.replace(request, ready_s=NOW_S) for request in snapshot.requests)
    plan = get_planner(policy)(msgspec.structs.replace(snapshot, devices=devices, requests=requests))
    assert not requests or plan.assignments or (plan.wake_s is not None and NOW_S < plan.wake_s < NOW_S + 5)


@pytest.mark.parametrize("policy", EVERY_POLICY)
@pytest.mark.parametrize("num_devices", [1, 3, 8])
def test_every_request_is_served_after_arrivals_stop(policy: str, num_devices: int) -> None:
    for seed in range(2):
        draw = random.Random(f"{policy}-{seed}-{num_devices}")
        trace = random_trace(draw, num_devices, 20, rate_per_s=draw.choice((0.5, 3.0, 100.0)))
        config = PlannerConfig(patience_s=draw.choice((1.0, 60.0)))
        Simulation(get_planner(policy), trace, num_devices, PROFILE, config).run()
        for request in trace:
            assert math.isfinite(request.finish_s), request
            assert len(request.degrees) == request.num_steps
