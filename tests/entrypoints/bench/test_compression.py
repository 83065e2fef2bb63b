"""Workloads fitted to a machine."""

import math

import msgspec
import pytest

from tetrion.engine.planning.cost.profile import Profile
from tetrion.engine.planning.cost.tables import only_table
from tetrion.entrypoints.bench.compression import calibration, compress, load_of, offered_load
from tetrion.entrypoints.bench.workloads import SIZES, TraceRequest, Workload, base_slo_s, make_trace

PROFILE = msgspec.convert(
    {
        "heads": 24,
        "classes": {
            "256x256": {"step_ms": {1: 30.0, 4: 16.0}, "encode_ms": 25, "decode_ms": 15},
            "2048x2048": {"step_ms": {1: 800.0, 2: 470.0, 4: 250.0, 8: 147.0}, "encode_ms": 25, "decode_ms": 480},
        },
    },
    Profile,
)


def test_compression_divides_all_but_encode_and_decode() -> None:
    trace = (TraceRequest(arrival_s=8.0, width=2048, height=2048, num_steps=28, slo_s=8.505, weight=2.0),)
    (request,) = compress(trace, 4, only_table(PROFILE))
    assert (request.arrival_s, request.num_steps, request.weight) == (2.0, 7, 2.0)
    assert request.slo_s == pytest.approx(0.505 + 8.0 / 4)


def test_factor_one_changes_nothing_and_a_request_without_slo_keeps_none() -> None:
    trace = make_trace(Workload(rate_per_min=12, num_requests=20, base_slo_s=base_slo_s(4)), 1)
    same = compress(trace, 1, only_table(PROFILE))
    assert [request.arrival_s for request in same] == [request.arrival_s for request in trace]
    assert [request.slo_s for request in same] == pytest.approx([request.slo_s for request in trace])
    (free,) = compress((TraceRequest(arrival_s=1, width=256, height=256, num_steps=8),), 2, only_table(PROFILE))
    assert free.slo_s is None and free.num_steps == 4


@pytest.mark.parametrize(("factor", "complaint"), [(3, "28 steps cannot be divided by 3"), (0, "at least 1, got 0")])
def test_steps_must_divide(factor: int, complaint: str) -> None:
    trace = make_trace(Workload(rate_per_min=12, num_requests=2, base_slo_s=base_slo_s(4)), 1)
    with pytest.raises(ValueError, match=f"^compress: .*{complaint}"):
        compress(trace, factor, only_table(PROFILE))


def test_a_load_of_one_keeps_every_device_busy_at_the_narrowest_degree() -> None:
    """Two sizes, 10 steps: 25 + 300 + 15 ms and 25 + 8000 + 480 ms of one device each."""
    sizes = (SIZES[0], SIZES[3])
    per_image_s = 0.5 * (0.34 + 8.505)
    assert load_of(60.0 * 2 / per_image_s, PROFILE, sizes, (0.5, 0.5), 10, 2) == pytest.approx(1.0)
    assert load_of(6.0, PROFILE, sizes, (1.0, 0.0), 10, 4) == pytest.approx(0.1 * 0.34 / 4)


def test_the_load_of_a_trace_is_what_its_requests_take_while_they_arrive() -> None:
    """340 ms and 8.505 s, within 10 s on two devices."""
    first, last = (
        TraceRequest(arrival_s=arrival_s, width=side, height=side, num_steps=10)
        for arrival_s, side in ((1.0, 256), (10.0, 2048))
    )
    assert offered_load((first, last), only_table(PROFILE), 2) == pytest.approx((0.34 + 8.505) / 20)
    assert offered_load((msgspec.structs.replace(first, arrival_s=0.0),), only_table(PROFILE), 2) == math.inf


def test_the_widest_degree_counts_even_where_it_is_not_the_quickest() -> None:
    cost = {"step_ms": {1: 100.0, 2: 120.0}, "encode_ms": 0, "decode_ms": 0}
    profile = msgspec.convert({"heads": 24, "classes": {"256x256": cost}}, Profile)
    assert calibration((1.0,), ((256, 256),), 10, profile, 2) == pytest.approx(1.1 * 10 * 0.12)


def test_the_largest_size_alone_takes_its_slo_over_1_1() -> None:
    factor = calibration(base_slo_s(4), SIZES, 28, PROFILE, 4)
    assert factor * base_slo_s(4)[3] / 1.1 == pytest.approx(0.025 + 28 * 0.25 + 0.48)
    factor = calibration(base_slo_s(8), SIZES, 28, PROFILE, 8)
    assert factor * base_slo_s(8)[3] / 1.1 == pytest.approx(0.505 + 28 * 0.147)
