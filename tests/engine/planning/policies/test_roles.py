"""Devices with roles, under every policy: nothing is given to a device that does not serve it, and nobody starves."""

import random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.planning.policies.test_every_policy import EVERY_POLICY
from tests.engine.planning.simulation import Simulation, check_plan, costs_of
from tests.engine.planning.test_plans import NOW_S, PROFILE, random_trace, snapshots
from tetrion.engine.planning.admission import Forecast, earliest_deadline_s
from tetrion.engine.planning.degrees import DegreeTables
from tetrion.engine.planning.policies.registry import get_planner
from tetrion.engine.planning.snapshot import Snapshot
from tetrion.engine.roles import Stages, able
from tetrion.engine.stages import STAGES

SOME_STAGES = st.sets(st.sampled_from(STAGES), min_size=1).map(lambda own: tuple(s for s in STAGES if s in own))


@st.composite
def roles(draw: st.DrawFn, num_devices: int) -> tuple[Stages, ...]:
    """Of each device; every stage is served by some."""
    drawn = [set(draw(SOME_STAGES)) for _ in range(num_devices)]
    for stage in STAGES:
        if not any(stage in own for own in drawn):
            drawn[draw(st.integers(0, num_devices - 1))].add(stage)
    return tuple(tuple(stage for stage in STAGES if stage in own) for own in drawn)


@st.composite
def snapshots_with_roles(draw: st.DrawFn, all_served: bool = False) -> Snapshot:
    """Unless `all_served` there may be stages whose devices are all gone."""
    snapshot = draw(snapshots())
    count = len(snapshot.devices)
    stages = draw(roles(count) if all_served else st.lists(SOME_STAGES, min_size=count, max_size=count))
    devices = [msgspec.structs.replace(d, stages=own) for d, own in zip(snapshot.devices, stages, strict=True)]
    num_denoising = max(1, len(able(dict(enumerate(stages)), "denoise")))
    return msgspec.structs.replace(
        snapshot, devices=tuple(devices), tables=DegreeTables(costs_of(PROFILE), num_denoising)
    )


@pytest.mark.parametrize("policy", EVERY_POLICY)
@settings(max_examples=60, deadline=None)
@given(snapshot=snapshots_with_roles())
def test_nothing_is_assigned_against_a_role(policy: str, snapshot: Snapshot) -> None:
    planner = get_planner(policy)
    plan = planner(snapshot)
    check_plan(snapshot, plan)
    assert planner(snapshot) == plan


@pytest.mark.parametrize("policy", EVERY_POLICY)
@settings(max_examples=25, deadline=None)
@given(snapshot=snapshots_with_roles(all_served=True))
def test_idle_devices_start_something_or_the_plan_says_when(policy: str, snapshot: Snapshot) -> None:
    devices = tuple(msgspec.structs.replace(device, free_s=NOW_S) for device in snapshot.devices)
    requests = tuple(msgspec.structs.replace(request, ready_s=NOW_S) for request in snapshot.requests)
    plan = get_planner(policy)(msgspec.structs.replace(snapshot, devices=devices, requests=requests))
    assert not requests or plan.assignments or (plan.wake_s is not None and NOW_S < plan.wake_s < NOW_S + 5)


@pytest.mark.parametrize("policy", EVERY_POLICY)
@settings(max_examples=6, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**32 - 1), rate_per_s=st.sampled_from((0.5, 3.0, 100.0)))
def test_every_request_is_finished_in_the_end(policy: str, data: st.DataObject, seed: int, rate_per_s: float) -> None:
    stages = data.draw(roles(data.draw(st.sampled_from((2, 3, 5)))))
    num_denoising = len(able(dict(enumerate(stages)), "denoise"))
    trace = random_trace(random.Random(seed), num_denoising, 25, rate_per_s)
    Simulation(get_planner(policy), trace, len(stages), PROFILE, stages=stages).run()
    assert all(request.stage is None and len(request.degrees) == request.num_steps for request in trace)


@settings(max_examples=60, deadline=None)
@given(snapshot=snapshots_with_roles(), slo_s=st.sampled_from((0.01, 1.0, 100.0)))
def test_admission_names_a_deadline_after_the_one_that_it_refuses(snapshot: Snapshot, slo_s: float) -> None:
    view = next((r for r in snapshot.requests if not r.force_degrees), None)
    if view is None:
        return
    newcomer = msgspec.structs.replace(
        view, request_id="new", stage="encode", step_index=0, members=(), arrival_s=NOW_S, ready_s=NOW_S,
        deadline_s=NOW_S + slo_s,
    )  # fmt: skip
    earliest_s = earliest_deadline_s(Forecast(snapshot=snapshot, newcomer=newcomer))
    assert earliest_s is None or NOW_S < earliest_s < NOW_S + 1e6
