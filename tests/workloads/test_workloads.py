"""Generators and trace files of `tetrion.entrypoints.bench.workloads`."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tetrion.entrypoints.bench.workloads import (
    INTERACTIVE_AND_BATCH,
    SIZES,
    ModelShare,
    Stream,
    TraceRequest,
    Workload,
    base_slo_s,
    class_shares,
    format_trace,
    make_trace,
    parse_trace,
    read_trace,
    write_trace,
)


def workload(**changes: object) -> Workload:
    fields = {"rate_per_min": 24.0, "num_requests": 700, "base_slo_s": base_slo_s(8)}
    return Workload(**(fields | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("mix", ["uniform", "skewed"])
def test_the_recipe_of_the_planner_points_is_reproduced_draw_by_draw(mix: str) -> None:
    """g = default_rng(seed); cumsum(g.exponential(60 / rate, 700)); g.choice(4, 700, p)."""
    g = np.random.default_rng(11)
    arrivals = np.cumsum(g.exponential(60 / 24.0, 700))
    p = np.ones(4) / 4 if mix == "uniform" else np.exp(np.array([256, 1024, 4096, 16384]) / 16384)
    classes = g.choice(4, 700, p=p / p.sum())
    trace = make_trace(workload(mix=mix, slo_scale=1.2), 11)
    assert [request.arrival_s for request in trace] == arrivals.tolist()
    assert [(request.width, request.height) for request in trace] == [SIZES[c] for c in classes]
    assert [request.slo_s for request in trace] == [(1.5, 2.0, 3.0, 5.0)[c] * 1.2 for c in classes]
    assert {request.num_steps for request in trace} == {28} and {request.weight for request in trace} == {1.0}


@pytest.mark.parametrize("arrivals", ["poisson", "gamma", "diurnal", "production"])
def test_arrivals_keep_their_rate_ascend_and_repeat(arrivals: str) -> None:
    asked = workload(arrivals=arrivals, num_requests=20_000, rate_per_min=60.0)
    trace = make_trace(asked, 3)
    times = np.array([request.arrival_s for request in trace])
    assert (np.diff(times) >= 0).all() and times[0] >= 0
    assert times[-1] == pytest.approx(20_000, rel=0.08)
    assert make_trace(asked, 3) == trace and make_trace(asked, 4) != trace


def test_gamma_arrivals_are_as_bursty_as_asked() -> None:
    gaps = np.diff(
        [r.arrival_s for r in make_trace(workload(arrivals="gamma", burstiness=3.0, num_requests=40_000), 1)]
    )
    assert gaps.std() / gaps.mean() == pytest.approx(3.0, rel=0.1)


def test_the_ramp_has_its_peak_half_a_period_after_the_start() -> None:
    asked = workload(arrivals="diurnal", num_requests=30_000, rate_per_min=600.0, period_s=600.0, swing=0.8)
    phase = np.array([r.arrival_s % 600.0 for r in make_trace(asked, 1)])
    peak, trough = np.mean((phase > 225) & (phase < 375)), np.mean((phase < 75) | (phase > 525))
    assert peak / trough == pytest.approx((1 + 0.8 * 0.9) / (1 - 0.8 * 0.9), rel=0.15)


def test_tiers_change_slos_and_weights_but_not_arrivals_and_classes() -> None:
    plain, tiered = make_trace(workload(), 5), make_trace(workload(tiers=INTERACTIVE_AND_BATCH), 5)
    kinds = {(b.slo_s / a.slo_s, b.weight) for a, b in zip(plain, tiered, strict=True) if a.slo_s and b.slo_s}
    assert kinds == {(1.0, 1.0), (10.0, 0.25)}
    assert [(r.arrival_s, r.width) for r in plain] == [(r.arrival_s, r.width) for r in tiered]
    assert np.mean([request.weight == 0.25 for request in tiered]) == pytest.approx(0.3, abs=0.06)


def test_skewed_prefers_large_pictures() -> None:
    shares = class_shares("skewed")
    assert shares.sum() == pytest.approx(1) and list(shares) == sorted(shares)
    assert shares[3] / shares[0] == pytest.approx(np.exp((16384 - 256) / 16384))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rate_per_min", 0.0),
        ("num_requests", 0),
        ("num_steps", 0),
        ("slo_scale", -1.0),
        ("burstiness", 0.0),
        ("period_s", 0.0),
        ("swing", 1.5),
        ("mix", "even"),
        ("base_slo_s", (1.0,)),
        ("slo_share", 1.5),
        ("step_shares", ((0, 1.0),)),
        ("step_shares", ((4, 0.0),)),
        ("tenant", "t" * 257),
    ],
)
def test_a_bad_workload_names_the_field(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{field}: must be"):
        workload(**{field: value})


@settings(max_examples=50)
@given(
    st.lists(
        st.builds(
            TraceRequest,
            arrival_s=st.floats(0, 1e6),
            width=st.integers(1, 65536),
            height=st.integers(1, 65536),
            num_steps=st.integers(1, 1000),
            slo_s=st.one_of(st.none(), st.floats(1e-3, 86_400)),
            weight=st.floats(1e-3, 1e6),
            tenant=st.text(max_size=8),
        ),
        min_size=1,
        max_size=8,
    )
)
def test_a_trace_file_returns_what_was_written(requests: list[TraceRequest]) -> None:
    trace = tuple(sorted(requests, key=lambda request: request.arrival_s))
    assert parse_trace(format_trace(trace)) == trace


LINE = b'{"arrival_s": 1.0, "width": 256, "height": 256, "num_steps": 28, "slo_s": 2.0, "weight": 1.0}\n'


def test_slo_and_weight_may_be_left_out_and_empty_lines_are_skipped() -> None:
    (request,) = parse_trace(b'\n{"arrival_s": 0, "width": 256, "height": 256, "num_steps": 4}\n\n')
    assert request.slo_s is None and request.weight == 1.0


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (LINE.replace(b"2.0", b"-2.0"), r"slo_s: Expected .*> 0"),
        (LINE.replace(b"256,", b"0,", 1), r"width: Expected .*>= 1"),
        (LINE.replace(b"28", b'"many"'), r"num_steps: Expected `int`, got `str`"),
        (LINE.replace(b'"num_steps": 28, ', b""), "missing required field `num_steps`"),
        (LINE.replace(b"weight", b"wieght"), "unknown field `wieght`"),
        (LINE.replace(b"1.0,", b"0.5,", 1), r"arrival_s: must not be before the line above \(1.0\), got 0.5"),
        (b"at once\n", "not a JSON object"),
        (b'{"arrival_s": \xff}\n', "not a JSON object|nvalid"),
        (b"[1]\n", "Expected `object`"),
    ],
)
def test_a_bad_line_is_named_with_its_field(line: bytes, complaint: str) -> None:
    with pytest.raises(ValueError, match=rf"^trace: line 3: .*(?:{complaint})"):
        parse_trace(LINE + b"\n" + line)


def test_a_file_is_named_and_an_empty_one_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(LINE.replace(b"2.0", b"0"))
    with pytest.raises(ValueError, match=r"t\.jsonl: line 1: slo_s"):
        read_trace(path)
    path.write_bytes(b"\n")
    with pytest.raises(ValueError, match="has no request"):
        read_trace(path)
    trace = make_trace(workload(num_requests=5), 1)
    write_trace(path, trace)
    assert read_trace(path) == trace


def test_models_change_neither_arrivals_nor_sizes() -> None:
    models = (ModelShare(name="a", share=3.0), ModelShare(name="b", num_branches=2, slo_scale=2.0))
    alone = make_trace(workload(num_requests=300), 1)
    shared = make_trace(workload(num_requests=300, models=models), 1)
    assert [(r.arrival_s, r.width) for r in shared] == [(r.arrival_s, r.width) for r in alone]
    of_b = [(one, other) for one, other in zip(shared, alone, strict=True) if one.model == "b"]
    assert 50 < len(of_b) < 100 and all(r.model == "a" for r in shared if r.num_branches == 1)
    assert all(one.slo_s == 2 * (other.slo_s or 0) and one.num_branches == 2 for one, other in of_b)


def test_who_states_an_slo_and_steps_change_neither_arrivals_nor_sizes() -> None:
    shares = ((4, 1.0), (28, 1.0), (50, 2.0))
    plain, mixed = make_trace(workload(), 5), make_trace(workload(slo_share=0.5, step_shares=shares), 5)
    assert [(r.arrival_s, r.width) for r in plain] == [(r.arrival_s, r.width) for r in mixed]
    assert np.mean([request.slo_s is None for request in mixed]) == pytest.approx(0.5, abs=0.06)
    steps = [request.num_steps for request in mixed]
    assert [steps.count(n) / 700 for n in (4, 28, 50)] == pytest.approx([0.25, 0.25, 0.5], abs=0.06)
    pairs = [(a.slo_s, b) for a, b in zip(plain, mixed, strict=True)]
    factors = {(b.num_steps, round(b.slo_s / slo_s, 9)) for slo_s, b in pairs if slo_s and b.slo_s}
    assert factors == {(4, 0.25), (28, 1.0), (50, round(50 / 28, 9))}
    assert workload(step_shares=shares).mean_steps == pytest.approx(33)


def test_streams_beside_come_until_the_others_end_and_leave_them_as_they_are() -> None:
    giants = Stream(size=(2048, 2048), rate_per_min=6.0, num_steps=50, slo_s=12.0, tenant="B")
    one = Stream(size=(4096, 4096), num_requests=1)
    alone, asked = make_trace(workload(), 5), workload(tenant="A", beside=(giants, one))
    trace = make_trace(asked, 5)
    assert trace == make_trace(asked, 5) and [r.arrival_s for r in trace] == sorted(r.arrival_s for r in trace)
    of_a = [request for request in trace if request.tenant == "A"]
    assert [(r.arrival_s, r.width, r.slo_s) for r in of_a] == [(r.arrival_s, r.width, r.slo_s) for r in alone]
    of_b = [request for request in trace if request.tenant == "B"]
    assert len(of_b) == pytest.approx(alone[-1].arrival_s / 10, rel=0.3)
    assert {(r.width, r.num_steps, r.slo_s) for r in of_b} == {(2048, 50, 12.0)}
    (middle,) = [request for request in trace if request.width == 4096]
    assert middle.arrival_s == pytest.approx(alone[-1].arrival_s / 2) and middle.slo_s is None


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({}, "beside.rate_per_min: must be given, or num_requests, but not both"),
        ({"rate_per_min": 1.0, "num_requests": 1}, "beside.rate_per_min: must be given"),
        ({"rate_per_min": 0.0}, "beside.rate_per_min: must be from 0.001"),
        ({"num_requests": 0}, "beside.num_requests: must be from 1"),
        ({"rate_per_min": 1.0, "slo_s": 0.0}, "beside.slo_s: must be above 0"),
        ({"rate_per_min": 1.0, "num_steps": 0}, "beside.num_steps: must be from 1"),
    ],
)
def test_a_bad_stream_names_the_field(fields: dict[str, object], complaint: str) -> None:
    with pytest.raises(ValueError, match=f"^{complaint}"):
        Stream(size=(256, 256), **fields)  # type: ignore[arg-type]
