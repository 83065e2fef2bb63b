"""The bound on attainment: against cases solved by hand, an exact search, and what policies achieve."""

import itertools
import sys

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tetrion.engine.planning.cost.profile import Profile
from tetrion.engine.planning.cost.tables import only_table
from tetrion.entrypoints.bench.clairvoyant import attainment_bound, upper_hull
from tetrion.entrypoints.bench.simulation import simulate
from tetrion.entrypoints.bench.workloads import TraceRequest, Workload, base_slo_s, make_trace
from tetrion.entrypoints.errors import InputError


def profile(step_ms: dict[int, float], encode_ms: float = 0.0, decode_ms: float = 0.0) -> Profile:
    cost = {"step_ms": step_ms, "encode_ms": encode_ms, "decode_ms": decode_ms}
    return msgspec.convert({"heads": 24, "classes": {"256x256": cost}}, Profile)


LINEAR = profile({1: 1000.0, 2: 500.0})
"""Two devices work exactly twice as fast as one: a machine of one speed, whoever uses it."""
REAL = msgspec.convert(
    {
        "heads": 24,
        "classes": {
            "256x256": {"step_ms": {1: 30.2, 2: 21.9, 4: 15.9}, "encode_ms": 25, "decode_ms": 15},
            "512x512": {"step_ms": {1: 53.5, 2: 36.4, 3: 26.9, 4: 22.1}, "encode_ms": 25, "decode_ms": 35},
            "1024x1024": {"step_ms": {1: 164.7, 2: 105.7, 3: 75.1, 4: 59.8}, "encode_ms": 25, "decode_ms": 120},
            "2048x2048": {"step_ms": {1: 824.5, 2: 469.9, 3: 324.5, 4: 251.8}, "encode_ms": 25, "decode_ms": 480},
        },
    },
    Profile,
)
POLICIES = ("horizon", "fixed-1", "fixed-4", "rssp", "tetriserve", "tetriserve-continuous", "edf-best-fit")


def request(arrival_s: float, slo_s: float | None, num_steps: int = 1, px: int = 256) -> TraceRequest:
    return TraceRequest(arrival_s=arrival_s, width=px, height=px, num_steps=num_steps, slo_s=slo_s)


def num_met(trace: list[TraceRequest], table: Profile, num_devices: int, **options: float) -> int:
    bound = attainment_bound(trace, only_table(table), num_devices, **options)  # type: ignore[arg-type]
    assert bound.gap == 0
    return bound.num_met


def test_a_request_alone_is_possible_exactly_if_its_fastest_service_fits() -> None:
    table = profile({1: 100.0, 2: 60.0, 4: 40.0}, encode_ms=25, decode_ms=15)
    assert num_met([request(3.0, 0.201, 4)], table, 4) == 1  # 25 + 4 × 40 + 15 = 200 ms
    assert num_met([request(3.0, 0.199, 4)], table, 4) == 0
    assert num_met([request(3.0, 0.201, 4)], table, 2) == 0
    assert num_met([request(3.0, 0.201, 4)], table, 4, step_overhead_s=0.001) == 0
    assert num_met([request(3.0, 0.201, 4)], table, 4, scale=1.01) == 0


def test_capacity_counts_encode_and_decode() -> None:
    """One device, four requests at once, 1 s each: three fit into 3 s, two with half a second of encode and decode."""
    four = [request(0.0, 3.0, 10)] * 4
    assert num_met(four, profile({1: 100.0}), 1) == 3
    assert num_met(four, profile({1: 100.0}, encode_ms=250, decode_ms=250), 1) == 2


def test_one_request_does_one_thing_at_a_time() -> None:
    """A device more does not help a request whose only degree is 1."""
    assert num_met([request(0.0, 1.5, 2)], profile({1: 1000.0}), 8) == 0


def test_devices_may_be_divided_and_degrees_mixed() -> None:
    """Three requests of 2 s at degree 1 on two devices until 3 s: only with one of them split over time."""
    assert num_met([request(0.0, 3.0, 2)] * 3, profile({1: 1000.0}), 2) == 3
    assert num_met([request(0.0, 2.9, 2)] * 3, profile({1: 1000.0}), 2) == 2


def test_requests_without_slo_take_no_part() -> None:
    bound = attainment_bound([request(0.0, None, 1000), request(0.0, 1.5)], only_table(profile({1: 1000.0})), 1)
    assert (bound.num_met, bound.num_with_slo, bound.attainment) == (1, 1, 1.0)
    assert attainment_bound([request(0.0, None)], only_table(LINEAR), 1).attainment is None


def earliest_deadline_first_meets_all(jobs: list[tuple[float, float, float]]) -> bool:
    """Whether preemptive EDF on one machine (optimal there) meets every (release, deadline, seconds of work)."""
    left = [work for _, _, work in jobs]
    now = 0.0
    while any(work > 1e-9 for work in left):
        ready = [i for i, (release, _, _) in enumerate(jobs) if release <= now + 1e-12 and left[i] > 1e-9]
        later = [release for release, _, _ in jobs if release > now + 1e-12]
        if not ready:
            now = min(later)
            continue
        first = min(ready, key=lambda i: jobs[i][1])
        run = min([left[first], *(release - now for release in later)])
        now, left[first] = now + run, left[first] - run
        if left[first] <= 1e-9 and now > jobs[first][1] + 1e-9:
            return False
    return True


@example(jobs=[(6, 1, 1), (6, 1, 1), (7, 2, 1)])  # the third comes when the others are due
@settings(max_examples=40, deadline=None)
@given(
    jobs=st.lists(
        st.tuples(st.integers(0, 12), st.integers(1, 12), st.integers(1, 6)),
        min_size=1,
        max_size=6,
    )
)
def test_with_linear_speed_up_it_is_the_optimum_of_one_preemptive_machine(jobs: list[tuple[int, int, int]]) -> None:
    """There, all devices on one request at a time lose nothing, and trying every subset under EDF is exact."""
    quarter = [(release / 4, (release + slo) / 4, steps / 4) for release, slo, steps in sorted(jobs)]
    best = max(
        len(chosen)
        for size in range(len(jobs) + 1)
        for chosen in itertools.combinations(quarter, size)
        if earliest_deadline_first_meets_all(list(chosen))
    )
    trace = [request(release, due - release, round(2 * work / 0.5)) for release, due, work in quarter]
    table = profile({1: 500.0, 2: 250.0})
    assert num_met(trace, table, 2) == best


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 2**16),
    st.sampled_from(POLICIES),
    st.sampled_from([4.0, 12.0, 30.0, 120.0]),
    st.sampled_from([0.6, 1.0, 2.0]),
    st.sampled_from([1, 3, 4]),
)
def test_no_policy_meets_more(seed: int, policy: str, rate: float, slo_scale: float, num_devices: int) -> None:
    workload = Workload(rate_per_min=rate, num_requests=12, base_slo_s=base_slo_s(4), slo_scale=slo_scale)
    trace = make_trace(workload, seed)
    run = simulate(trace, profile=REAL, policy=policy, num_devices=num_devices)
    achieved = sum(bool(outcome.is_met) for outcome in run.outcomes)
    assert achieved <= attainment_bound(trace, only_table(REAL), num_devices).num_met
    assert achieved <= attainment_bound(trace, only_table(REAL), num_devices, block=5).num_met


def test_blocks_and_a_search_that_is_cut_short_only_raise_it() -> None:
    trace = make_trace(Workload(rate_per_min=60, num_requests=40, base_slo_s=base_slo_s(4)), 1)
    whole = attainment_bound(trace, only_table(REAL), 4)
    assert whole.num_met < 40
    assert whole.num_met <= attainment_bound(trace, only_table(REAL), 4, block=7).num_met <= 40
    assert whole.num_met <= attainment_bound(trace, only_table(REAL), 4, time_limit_s=1e-3).num_met <= 40


@settings(max_examples=50)
@given(st.lists(st.floats(0.1, 100), min_size=1, max_size=8))
def test_the_hull_lies_above_all_points_and_is_concave(speeds: list[float]) -> None:
    points = list(enumerate(speeds, start=1))
    hull = [(0, 0.0), *upper_hull(points)]
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in itertools.pairwise(hull)]
    assert slopes == sorted(slopes, reverse=True) and all(slope > 0 for slope in slopes)
    assert set(hull[1:]) <= set(points)
    for n, speed in points:
        below = max(corner for corner in hull if corner[0] <= n)
        above = min((corner for corner in hull if corner[0] >= n), default=None)
        if above is None or above == below:
            height = below[1]
        else:
            height = below[1] + (above[1] - below[1]) * (n - below[0]) / (above[0] - below[0])
        assert height >= speed - 1e-9


def test_without_scipy_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(InputError, match=r"bound: needs scipy; install it with pip install scipy"):
        attainment_bound([request(0.0, 5.0)], only_table(LINEAR), 1)
