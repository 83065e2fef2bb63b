"""Virtual time: what a `Disturbance` does to durations, and that the executor wakes its loop no more than needed."""

import asyncio
import math
import statistics

import msgspec
import pytest

from tetrion.engine.executors.simulated import Disturbance, SimulatedExecutor
from tetrion.engine.messages import Denoise, EncodePrompt
from tetrion.engine.params import Params
from tetrion.engine.planning.cost.profile import Profile
from tetrion.engine.planning.cost.tables import CostTables
from tetrion.engine.shape import StepShape

PROFILE = msgspec.convert(
    {"heads": 12, "classes": {"128x128": {"step_ms": {1: 20, 2: 12}, "encode_ms": 5, "decode_ms": 10}}}, Profile
)
COSTS = CostTables(profiles={"": PROFILE})
SHAPE = StepShape(width=128, height=128, image=64, text=(64,))
PARAMS = Params(model="", shape=SHAPE, num_steps=12, guidance=0.0, seed=0)
ENCODE = EncodePrompt(command_id=1, request_id="r", state_id=1, slot=0, params=PARAMS, prompt="a b")


def chunk(members: tuple[int, ...], holders: tuple[int, ...]) -> Denoise:
    return Denoise(
        command_id=2,
        round_id=1,
        request_id="r",
        state_id=1,
        source_state_id=1,
        slot=0,
        members=members,
        holders=holders,
        source=holders[0],
        step_index=0,
        chunk_index=0,
        chunk_steps=5,
        params=PARAMS,
    )


def test_bias_and_overheads_are_added_where_they_belong() -> None:
    disturbance = Disturbance(bias=0.5, step_overhead_s=0.25, regroup_s=10.0)
    assert disturbance(ENCODE, 2.0) == 3.0
    assert disturbance(chunk((0, 1), (0, 1)), 2.0) == pytest.approx(3.0 + 5 * 0.25)
    assert disturbance(chunk((1, 0), (0, 1)), 2.0) == pytest.approx(3.0 + 5 * 0.25 + 10.0)


def test_noise_has_mean_one_the_spread_asked_for_and_its_seed() -> None:
    draws = [disturbance(ENCODE, 1.0) for disturbance in [Disturbance(seed=3, noise=0.2)] for _ in range(5000)]
    assert statistics.fmean(draws) == pytest.approx(1.0, abs=0.01)
    assert statistics.stdev(map(math.log, draws)) == pytest.approx(0.2, rel=0.05)
    again = Disturbance(seed=3, noise=0.2)
    assert [again(ENCODE, 1.0) for _ in range(3)] == draws[:3]
    assert Disturbance(seed=4, noise=0.2)(ENCODE, 1.0) != draws[0]


@pytest.mark.parametrize(
    ("field", "value"), [("bias", -1.0), ("noise", -0.1), ("step_overhead_s", math.inf), ("regroup_s", -1.0)]
)
def test_impossible_disturbances_are_refused(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"^{field}: must be"):
        Disturbance(**{field: value})


def test_what_happens_in_a_wait_does_not_cut_the_next_one_short() -> None:
    executor = SimulatedExecutor(COSTS, 1)
    executor.at(1.0, executor.wake)
    asyncio.run(executor.wait(5.0))
    assert executor.now_s() == 1.0
    asyncio.run(executor.wait(5.0))
    assert executor.now_s() == 5.0
    executor.wake()
    asyncio.run(executor.wait(9.0))
    assert executor.now_s() == 5.0


def test_time_stands_still_when_nothing_will_ever_happen() -> None:
    with pytest.raises(RuntimeError, match="nothing will ever happen"):
        asyncio.run(SimulatedExecutor(COSTS, 1).wait(None))


def test_a_group_starts_when_its_last_member_and_the_state_are_there() -> None:
    executor = SimulatedExecutor(COSTS, 2)
    executor.submit(ENCODE, (0,))
    executor.submit(chunk((0, 1), (0,)), (0, 1))
    ended = []
    while len(ended) < 3:
        asyncio.run(executor.wait(None))
        ended += [(event.device_id, round(event.started_s, 6), round(event.ended_s, 6)) for event in executor.poll()]
    assert ended == [(0, 0.0, 0.005), (0, 0.005, 0.065), (1, 0.005, 0.065)]
