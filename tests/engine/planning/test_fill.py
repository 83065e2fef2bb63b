"""The free profile, the forward fill, the knapsack, the placement: the parts that policies share."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tetrion.engine.planning.degrees import DegreeTable, useful_degrees
from tetrion.engine.planning.forward_fill import Work, fill, fraction_left, place
from tetrion.engine.planning.free_profile import FreeProfile
from tetrion.engine.planning.placement import choose_members
from tetrion.engine.planning.policies.leftover import gain, widen
from tetrion.engine.planning.snapshot import RequestView
from tetrion.engine.shape import cost_key_of_size

from .simulation import SIZES, flux_profile, legal_degrees, make_profile

DEVICES = 8


def table(size: int = 2, num_devices: int = DEVICES) -> DegreeTable:
    return DegreeTable(flux_profile().cost(cost_key_of_size(SIZES[size])), legal_degrees(num_devices), num_devices)


def work(name: str, size: int, due_s: float, steps: int = 28, start_s: float = 0.0, weight: float = 1.0) -> Work:
    view = RequestView(
        request_id=name,
        stage="denoise",
        model="",
        cost_key=cost_key_of_size(SIZES[size]),
        step_index=0,
        num_steps=steps,
        arrival_s=0.0,
        deadline_s=due_s,
        ready_s=start_s,
        weight=weight,
    )
    return Work(view, table(size), start_s, due_s, True)


def test_degrees_that_gain_nothing_are_not_useful() -> None:
    shared_cores = {"step_ms": {1: 100.0, 2: 99.5, 3: 130.0, 4: 60.0}, "encode_ms": 1, "decode_ms": 1}
    cost = make_profile({"64x64": shared_cores}).cost("64x64")
    assert useful_degrees(cost, (1, 2, 3, 4, 6)) == (1, 4)
    assert useful_degrees(cost, (1, 2, 3)) == (1,)
    only_wide = make_profile({"64x64": {"step_ms": {4: 60.0}, "encode_ms": 1, "decode_ms": 1}}).cost("64x64")
    assert useful_degrees(only_wide, (1, 2, 4)) == (4,)
    assert useful_degrees(only_wide, (1, 2)) == (1,), "nothing else is possible"
    assert DegreeTable(cost, (1, 2, 3, 4), 6).largest == [0, 1, 1, 1, 4, 4, 4]


starts = st.lists(st.floats(0, 10), min_size=1, max_size=DEVICES)


@given(starts, st.lists(st.tuples(st.sampled_from(legal_degrees(DEVICES)), st.floats(0, 10), st.integers(1, 28))))
def test_what_is_taken_is_what_was_walked(free_s: list[float], takes: list[tuple[int, float, int]]) -> None:
    profile = FreeProfile(0.0, free_s)
    assert profile.free[-1] == len(free_s)
    degrees = table()
    for level, start_s, steps in takes:
        before = FreeProfile(0.0, ())
        before.restore(profile.save())
        end_s = profile.finish_s(degrees, level, start_s, steps, math.inf)
        earlier_s = math.nextafter(end_s, 0)
        assert not profile.take(degrees, level, start_s, steps, earlier_s if end_s < math.inf else math.inf)
        assert profile.save() == before.save()
        if end_s == math.inf:
            continue
        assert profile.take(degrees, level, start_s, steps, end_s)
        assert min(profile.free) >= 0
        assert profile.times == sorted(set(profile.times))
        assert all(left != right for left, right in itertools.pairwise(profile.free))
        done, bounds = 0.0, sorted({*before.times, *profile.times})
        for begin, end in itertools.pairwise([*bounds, bounds[-1]]):
            used = free_at(before, begin) - free_at(profile, begin)
            assert used == 0 or (used in degrees.degrees and used <= level and start_s <= begin < end_s)
            done += (end - begin) / degrees.step_s[used] if used else 0.0
        assert done == pytest.approx(steps, rel=1e-6, abs=1e-6)


def free_at(profile: FreeProfile, time_s: float) -> int:
    return profile.free[max(i for i, begin in enumerate(profile.times) if begin <= time_s)]


@given(
    starts,
    st.lists(st.tuples(st.integers(0, 3), st.floats(0, 10), st.integers(1, 28), st.floats(0, 15)), max_size=8),
)
def test_the_level_is_the_least_one_that_ends_in_time(
    free_s: list[float], items: list[tuple[int, float, int, float]]
) -> None:
    profile = FreeProfile(0.0, free_s)
    for i, (size, start_s, steps, budget_s) in enumerate(items):
        item = work(f"r{i}", size, start_s + budget_s, steps, start_s)
        ends_s = [profile.finish_s(item.table, d, start_s, steps, item.due_s) for d in item.table.degrees]
        least = next((d for d, end_s in zip(item.table.degrees, ends_s, strict=True) if end_s < math.inf), 0)
        assert place(profile, item, item.due_s) == bool(least)
        assert item.level == least


def test_the_least_level_that_meets_the_deadline_is_placed() -> None:
    steps_s = {level: 28 * table().step_s[level] for level in table().degrees}
    for level, time_s in steps_s.items():
        item = work("a", 2, time_s + 0.001)
        assert fill(FreeProfile(0.0, [0.0] * 8), [item]) == []
        assert item.level == level


def test_the_largest_is_dropped_unless_its_weight_says_otherwise() -> None:
    def three(weight: float) -> list[Work]:
        return [work("a", 2, 1.8), work("b", 2, 1.8), work("large", 3, 4.2, weight=weight)]

    first, second, large = three(weight=1.0)
    assert fill(FreeProfile(0.0, [0.0] * 8), [first, second, large]) == [large]
    assert (first.level, second.level, large.level) == (4, 4, 0)
    first, second, large = three(weight=100.0)
    assert fill(FreeProfile(0.0, [0.0] * 8), [first, second, large]) == [first, second]
    assert large.level == 8


def test_by_fraction_whoever_is_half_done_is_kept_whatever_its_size() -> None:
    def pair() -> tuple[Work, Work]:
        fresh, half_done = work("a", 2, 2.0), work("large", 3, 2.2)
        half_done.remaining = 14
        return fresh, half_done

    fresh, half_done = pair()
    assert fill(FreeProfile(0.0, [0.0] * 8), [fresh, half_done]) == [half_done]
    fresh, half_done = pair()
    assert fill(FreeProfile(0.0, [0.0] * 8), [fresh, half_done], fraction_left) == [fresh]
    assert half_done.level == 8


@given(st.lists(st.tuples(st.integers(0, 3), st.floats(0.2, 20), st.floats(0, 2), st.integers(1, 28)), max_size=14))
def test_everybody_is_placed_or_dropped_and_the_placed_fit(items: list[tuple[int, float, float, int]]) -> None:
    works = sorted(
        (work(f"r{i}", size, due_s, steps, start_s) for i, (size, due_s, start_s, steps) in enumerate(items)),
        key=lambda item: item.due_s,
    )
    candidates = [item for item in works if not item.is_late]
    profile = FreeProfile(0.0, [0.0] * 8)
    dropped = fill(profile, candidates)
    assert all(bool(item.level) != (item in dropped) for item in candidates)
    assert min(profile.free) >= 0
    again = FreeProfile(0.0, [0.0] * 8)
    placed = [item for item in candidates if item.level]
    levels = [item.level for item in placed]
    assert fill(again, placed) == [], "the fill of those placed is reproducible"
    assert [item.level for item in placed] == levels


@given(st.integers(0, 7), st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), min_size=1, max_size=4))
def test_the_knapsack_is_optimal(num_left: int, kinds: list[tuple[int, int]]) -> None:
    works = [work(f"r{i}", size, 100.0) for i, (size, _) in enumerate(kinds)]
    for item, (_, target) in zip(works, kinds, strict=True):
        item.target = target
    options = [[(d, gain(item, d)) for d in item.table.degrees if d > item.target] for item in works]
    cases = itertools.product(*([(item.target, 0.0), *choice] for item, choice in zip(works, options, strict=True)))
    used = sum(item.target for item in works)
    best = max(
        sum(worth for _, worth in case) for case in cases if sum(degree for degree, _ in case) - used <= num_left
    )
    worth = [{item.target: 0.0, **dict(choice)} for item, choice in zip(works, options, strict=True)]
    left = widen(list(zip(works, options, strict=True)), num_left)
    assert sum(values[item.target] for values, item in zip(worth, works, strict=True)) == pytest.approx(best)
    assert left == num_left - (sum(item.target for item in works) - used) >= 0


@given(
    st.lists(st.integers(0, 9), unique=True),
    st.sets(st.integers(0, 9), min_size=1),
    st.sets(st.integers(0, 9)),
    st.data(),
)
def test_previous_members_stay_in_order(previous: list[int], idle: set[int], claimed: set[int], data) -> None:
    degree = data.draw(st.integers(1, len(idle)))
    members = choose_members(previous, degree, idle, float, claimed)
    kept = [device for device in previous if device in idle][:degree]
    assert list(members[: len(kept)]) == kept
    assert len(set(members)) == degree and set(members) <= idle
    newcomers, unused = members[len(kept) :], idle - set(members)
    assert not any(device in claimed for device in newcomers) or unused <= claimed
    assert members == choose_members(previous, degree, sorted(idle, reverse=True), float, claimed)


def test_too_few_idle_devices() -> None:
    with pytest.raises(ValueError, match="degree 3 does not fit on 2 idle devices"):
        choose_members((), 3, (0, 1), float)
