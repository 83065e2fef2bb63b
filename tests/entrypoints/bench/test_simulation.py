"""Traces through the real loop in virtual time."""

import msgspec
import pytest

from tetrion.engine.config import PlannerConfig
from tetrion.engine.executors.simulated import Disturbance
from tetrion.engine.planning.cost.profile import Profile
from tetrion.entrypoints.bench.outcomes import Run
from tetrion.entrypoints.bench.simulation import Loss, simulate
from tetrion.entrypoints.bench.workloads import Trace, TraceRequest, Workload, base_slo_s, make_trace

PROFILE = msgspec.convert(
    {
        "heads": 24,
        "classes": {
            "256x256": {"step_ms": {1: 30.2, 2: 21.9, 4: 15.9, 8: 13.5}, "encode_ms": 25, "decode_ms": 15},
            "2048x2048": {"step_ms": {1: 824.5, 2: 469.9, 4: 251.8, 8: 147.03}, "encode_ms": 25, "decode_ms": 480},
        },
    },
    Profile,
)
POLICIES = ("horizon", "fixed-2", "rssp", "tetriserve-g2", "tetriserve-continuous", "edf", "edf-best-fit")


def trace(num_requests: int = 40, rate_per_min: float = 60.0) -> Trace:
    workload = Workload(rate_per_min=rate_per_min, num_requests=num_requests, base_slo_s=base_slo_s(8))
    return make_trace(workload, 7)


def one(**changes: object) -> Trace:
    fields = {"arrival_s": 1.0, "width": 256, "height": 256, "num_steps": 4, "slo_s": 1.0}
    return (TraceRequest(**(fields | changes)),)  # type: ignore[arg-type]


def test_one_request_alone_costs_what_the_profile_says() -> None:
    run = simulate(one(), profile=PROFILE, policy="fixed-2", num_devices=2)
    (outcome,) = run.outcomes
    assert outcome.latency_s == pytest.approx(0.025 + 4 * 0.0219 + 0.015)
    assert outcome.gpu_s == pytest.approx(0.025 + 2 * 4 * 0.0219 + 0.015)
    assert outcome.degrees == (2, 2, 2, 2) and outcome.is_met is True
    assert run.end_s == outcome.finished_s and run.utilisation == pytest.approx(outcome.gpu_s / (2 * run.end_s))


def test_a_deadline_is_missed_by_being_late_and_absent_without_slo() -> None:
    def met(**changes: object) -> bool | None:
        return simulate(one(**changes), profile=PROFILE, policy="fixed-1", num_devices=1).outcomes[0].is_met

    assert met(slo_s=0.17) is True and met(slo_s=0.15) is False and met(slo_s=None) is None


@pytest.mark.parametrize("policy", POLICIES)
def test_every_request_of_a_trace_finishes(policy: str) -> None:
    run = simulate(trace(), profile=PROFILE, policy=policy, num_devices=8)
    assert all(outcome.finished_s is not None and len(outcome.degrees) == 28 for outcome in run.outcomes)
    assert 0 < run.utilisation <= 1 and len(run.decision_s) >= 40


def noisy(seed: int, policy: str = "horizon") -> Run:
    return simulate(
        trace(),
        profile=PROFILE,
        policy=policy,
        num_devices=8,
        duration=Disturbance(seed=seed, noise=0.1, bias=0.05, step_overhead_s=0.0003, regroup_s=0.0002),
        losses=(Loss(time_s=10.0, device_id=3), Loss(time_s=20.0, device_id=0)),
    )


@pytest.mark.parametrize("policy", POLICIES)
def test_a_seed_gives_the_same_run_and_survives_lost_workers(policy: str) -> None:
    first, second = noisy(1, policy), noisy(1, policy)
    assert first.outcomes == second.outcomes and first.end_s == second.end_s
    assert all(outcome.finished_s is not None for outcome in first.outcomes)
    assert noisy(2, policy).outcomes != first.outcomes


def test_without_workers_the_rest_fails_and_the_run_ends() -> None:
    losses = (Loss(time_s=5.0, device_id=0), Loss(time_s=6.0, device_id=1))
    run = simulate(trace(), profile=PROFILE, policy="horizon", num_devices=2, losses=losses)
    finished = [outcome for outcome in run.outcomes if outcome.finished_s is not None]
    assert 0 < len(finished) < 40
    assert all(o.finished_s is not None and o.finished_s <= 6.0 for o in finished)
    assert all(o.is_met is False for o in run.outcomes if o.finished_s is None)


def test_arrivals_do_not_wait_for_the_system() -> None:
    """At ten times the rate the last request still arrives on time; only its latency grows."""
    slow, fast = (
        simulate(trace(rate_per_min=rate), profile=PROFILE, policy="fixed-1", num_devices=1) for rate in (6.0, 600.0)
    )
    assert fast.outcomes[-1].request.arrival_s < slow.outcomes[-1].request.arrival_s / 50
    assert (fast.outcomes[-1].latency_s or 0) > (slow.outcomes[-1].latency_s or 0)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"num_devices": 0}, "devices: must be at least 1, got 0"),
        ({"policy": "best"}, "policy: expected one of"),
        ({"trace": ()}, "trace: must have from 1 to 100000 requests, got 0"),
        ({"roles": "0:encode+decode,1-2:denoise"}, "roles: devices are from 0 to 1"),
        ({"losses": (Loss(time_s=0, device_id=2),)}, "losses: device must be from 0 to 1, got 2"),
    ],
)
def test_bad_arguments_are_named(changes: dict[str, object], complaint: str) -> None:
    arguments = {"trace": one(), "profile": PROFILE, "policy": "horizon", "num_devices": 2} | changes
    requests = arguments.pop("trace")
    with pytest.raises(ValueError, match=complaint):
        simulate(requests, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("policy", POLICIES)
def test_with_roles_degrees_are_those_of_the_devices_that_denoise(policy: str) -> None:
    run = simulate(trace(20), profile=PROFILE, policy=policy, num_devices=4, roles="0:encode+decode,1-3:denoise")
    degrees = {degree for outcome in run.outcomes for degree in outcome.degrees}
    assert all(outcome.latency_s for outcome in run.outcomes) and degrees <= {1, 2, 3}


def test_what_admission_refuses_is_not_met_and_takes_no_device_time() -> None:
    """Four at once on one device, of which each takes 0.16 s: the third and fourth cannot be in time."""
    four = one(slo_s=0.4) * 4
    config = PlannerConfig(admission="reject-hopeless")
    run = simulate(four, profile=PROFILE, policy="horizon", num_devices=1, planner_config=config)
    refused = [outcome for outcome in run.outcomes if outcome.refused]
    assert len(refused) == 2
    assert all(o.is_met is False and o.finished_s is None and o.gpu_s == 0 for o in refused)
    assert all(o.is_met for o in run.outcomes if not o.refused)
    every = simulate(four, profile=PROFILE, policy="horizon", num_devices=1)
    assert not any(outcome.refused for outcome in every.outcomes)
    assert all(outcome.finished_s is not None for outcome in every.outcomes)


def test_a_run_of_which_everything_is_refused_ends() -> None:
    config = PlannerConfig(admission="reject-hopeless")
    run = simulate(one(slo_s=0.01) * 3, profile=PROFILE, policy="horizon", num_devices=1, planner_config=config)
    assert [outcome.refused for outcome in run.outcomes] == [True] * 3


def test_fewer_in_flight_are_seen_at_once() -> None:
    """Of an early, a later and a tight request, the tight one gets a device first if the policy sees all of them."""
    size = {"width": 2048, "height": 2048, "num_steps": 28}
    three = (*one(arrival_s=0.0, slo_s=None, **size), *one(arrival_s=0.1, slo_s=None, **size), *one(arrival_s=0.2))
    seen, unseen = (
        simulate(three, profile=PROFILE, policy="edf", num_devices=1, max_inflight=num).outcomes[2] for num in (3, 1)
    )
    assert (seen.finished_s or 0) < (unseen.finished_s or 0)


def test_options_that_nobody_reads_are_refused() -> None:
    with pytest.raises(ValueError, match="planner: there is no option 'nix'; policy edf has none"):
        simulate(one(), profile=PROFILE, policy="edf", num_devices=1, planner_config=PlannerConfig(options={"nix": 1}))


@pytest.mark.parametrize("admission", ["all", "reject-hopeless"])
def test_a_tenant_that_floods_the_engine_costs_another_no_deadline(admission: str) -> None:
    """On two devices: A sends a third more than they can do, B one picture every seven seconds."""
    flood = [
        TraceRequest(arrival_s=0.33 * i, width=256, height=256, num_steps=28, slo_s=1.5, tenant="A") for i in range(300)
    ]
    others = [
        TraceRequest(arrival_s=3.0 + 7.0 * i, width=256, height=256, num_steps=28, slo_s=1.2, tenant="B")
        for i in range(13)
    ]
    both = tuple(sorted(flood + others, key=lambda request: request.arrival_s))
    config = PlannerConfig(admission=admission)  # type: ignore[arg-type]
    run = simulate(both, profile=PROFILE, policy="horizon", num_devices=2, max_inflight=16, planner_config=config)
    met = [outcome.is_met for outcome in run.outcomes if outcome.request.tenant == "B"]
    assert all(met)
    assert not all(outcome.is_met for outcome in run.outcomes)
