"""Whatever degrees and layouts of branches a request's steps are run at, its latents are those of degree 1."""

import msgspec
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.engine.families.conftest import Loaded
from tests.engine.families.ranks import Schedule

NUM_STEPS = 4


@st.composite
def schedules(draw: st.DrawFn, num_devices: int, num_steps: int) -> Schedule:
    """Any members in any order, chunks of any length."""
    schedule, left = [], num_steps
    while left:
        degree = draw(st.integers(1, num_devices))
        members = draw(st.permutations(range(num_devices)))[:degree]
        steps = draw(st.integers(1, left))
        schedule.append((tuple(members), steps))
        left -= steps
    return schedule


@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_schedule_has_the_bits_of_degree_1(loaded: Loaded, data: st.DataObject) -> None:
    check(loaded, data.draw(schedules(loaded.ours.num_devices, NUM_STEPS)))


def test_all_degrees_have_the_bits_of_degree_1(loaded: Loaded) -> None:
    """Even ones evaluate two branches apart, odd ones in turn."""
    degrees = range(loaded.ours.num_devices, 0, -1)
    check(loaded, [(tuple(range(degree)), 1) for degree in degrees])


def check(loaded: Loaded, schedule: Schedule) -> None:
    ours = loaded.ours
    total = sum(num_steps for _, num_steps in schedule)
    params = msgspec.structs.replace(loaded.params(total), num_steps=total)
    texts, start = loaded.begin(params)
    expected = ours.denoise(texts, start, params, [((0,), params.num_steps)])
    assert torch.equal(ours.denoise(texts, start, params, schedule), expected)
