"""Two models on one pool of devices, in virtual time: each priced by its own table, whatever plans."""

import msgspec
import pytest

from tests.engine.planning.test_energy_mode import with_joules
from tetrion.engine.config import PlannerConfig
from tetrion.engine.planning.cost.profile import Profile
from tetrion.entrypoints.bench.recording import Recorder
from tetrion.entrypoints.bench.simulation import simulate
from tetrion.entrypoints.bench.workloads import Trace, TraceRequest

COST = {"step_ms": {1: 100, 2: 60, 3: 45, 4: 36}, "encode_ms": 5, "decode_ms": 20}
LARGE = msgspec.convert({"heads": 24, "classes": {"512x512": COST}}, Profile)
SMALL = msgspec.convert({"heads": 4, "classes": {"512x512": {**COST, "step_ms": {1: 10, 2: 6, 4: 4}}}}, Profile)
PROFILES = {"large": with_joules(LARGE), "small": with_joules(SMALL)}


def trace(num: int, slo_s: float | None = 6.0) -> Trace:
    return tuple(
        TraceRequest(
            arrival_s=0.3 * n,
            width=512,
            height=512,
            num_steps=10,
            slo_s=slo_s,
            model="small" if n % 2 else "large",
            num_branches=1 + n % 3 // 2,
        )
        for n in range(num)
    )


@pytest.mark.parametrize(
    "policy", ["horizon", "fixed-2", "rssp", "edf-best-fit", "tetriserve", "tetriserve-continuous"]
)
def test_every_policy_serves_both_at_degrees_that_each_has(policy: str) -> None:
    requests = trace(24)
    run = simulate(requests, profile=PROFILES, policy=policy, num_devices=4)
    for request, outcome in zip(requests, run.outcomes, strict=True):
        assert outcome.finished_s is not None and len(outcome.degrees) == 10
        legal = {1, 2, 4} if request.model == "small" else {1, 2, 3, 4}
        assert set(outcome.degrees) <= legal


def test_each_takes_as_long_as_its_own_table_says() -> None:
    recorder = Recorder()
    simulate(trace(2), profile=PROFILES, policy="fixed-1", num_devices=2, recorder=recorder)
    step_s = {c.request: c.net_s / c.chunk_steps for c in recorder.chunks if c.stage == "denoise"}
    assert step_s[0] == pytest.approx(0.100) and step_s[1] == pytest.approx(0.010)


def test_branches_that_go_apart_take_a_degree_of_two_no_longer_than_one_alone() -> None:
    recorder = Recorder()
    simulate(trace(3)[2:], profile=PROFILES, policy="fixed-2", num_devices=2, recorder=recorder)
    (step_s, *_) = [c.net_s / c.chunk_steps for c in recorder.chunks if c.stage == "denoise"]
    assert step_s == pytest.approx(0.100)


@pytest.mark.parametrize("admission", ["all", "reject-hopeless"])
@pytest.mark.parametrize("mode", ["fastest", "balanced", "least-energy"])
def test_modes_and_admission_hold_for_both(mode: str, admission: str) -> None:
    config = PlannerConfig(options={"energy": mode}, admission=admission)  # type: ignore[arg-type]
    run = simulate(trace(12, slo_s=20.0), profile=PROFILES, policy="horizon", num_devices=4, planner_config=config)
    assert all(outcome.is_met for outcome in run.outcomes)


def test_a_model_without_a_table_is_refused() -> None:
    with pytest.raises(ValueError, match="trace: model: 'small' has no cost table"):
        simulate(trace(2), profile={"large": LARGE}, policy="horizon", num_devices=2)
