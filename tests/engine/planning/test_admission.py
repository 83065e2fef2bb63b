"""What admission says of a new request: yes, or the earliest deadline that it could meet."""

import msgspec
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tetrion.engine.config import PlannerConfig
from tetrion.engine.planning.admission import earliest_deadline_s
from tetrion.engine.planning.degrees import DegreeTables
from tetrion.engine.planning.snapshot import DeviceView, RequestView, Snapshot

from .simulation import costs_of, flux_profile
from .test_plans import NOW_S, snapshots

PROFILE = flux_profile()
ENCODE_S, DECODE_S, MARGIN_S = 0.025, 0.12, 0.01
"""Of 1024x1024; the margin is the planner's."""


def newcomer(slo_s: float | None, request_id: str = "new", px: int = 1024) -> RequestView:
    return RequestView(
        request_id=request_id,
        stage="encode",
        model="",
        cost_key=f"{px}x{px}",
        step_index=0,
        num_steps=28,
        arrival_s=NOW_S,
        deadline_s=None if slo_s is None else NOW_S + slo_s,
        ready_s=NOW_S,
    )


def busy(requests: tuple[RequestView, ...] = (), num_devices: int = 8, until_s: float = NOW_S) -> Snapshot:
    return Snapshot(
        now_s=NOW_S,
        requests=requests,
        devices=tuple(DeviceView(device_id=i, free_s=until_s) for i in range(num_devices)),
        tables=DegreeTables(costs_of(PROFILE), num_devices),
        config=PlannerConfig(),
    )


def test_alone_the_earliest_deadline_is_what_the_widest_degree_takes() -> None:
    fastest_s = ENCODE_S + 28 * PROFILE.step_s("1024x1024", 8) + DECODE_S + MARGIN_S
    assert earliest_deadline_s(busy(), newcomer(fastest_s + 0.001)) is None
    assert earliest_deadline_s(busy(), newcomer(fastest_s - 0.001)) == pytest.approx(NOW_S + fastest_s)
    later = busy(until_s=NOW_S + 0.4)
    assert earliest_deadline_s(later, newcomer(fastest_s)) == pytest.approx(NOW_S + 0.4 + fastest_s)


def test_without_an_slo_nobody_is_refused() -> None:
    assert earliest_deadline_s(busy(num_devices=1), newcomer(None)) is None
    assert earliest_deadline_s(busy(num_devices=0), newcomer(0.001)) is None


def test_those_before_count_but_those_without_slo_give_way() -> None:
    one_device = 28 * PROFILE.step_s("1024x1024", 1)
    before = tuple(newcomer(2 * one_device, f"r{i}") for i in range(2))
    refused = earliest_deadline_s(busy(before, num_devices=1), newcomer(1.5 * one_device))
    assert refused is None, "it would displace a later one"
    tight = tuple(newcomer(1.1 * one_device, f"r{i}") for i in range(2))
    refused = earliest_deadline_s(busy(tight, num_devices=1), newcomer(1.2 * one_device))
    assert refused is not None and refused > NOW_S + 1.2 * one_device
    soft = tuple(newcomer(None, f"r{i}") for i in range(4))
    assert earliest_deadline_s(busy(soft, num_devices=1), newcomer(1.2 * one_device)) is None


@settings(max_examples=80, deadline=None)
@given(snapshot=snapshots(), slo_s=st.floats(0.1, 30), px=st.sampled_from((256, 512, 1024, 2048)))
def test_the_deadline_it_names_is_one_that_it_admits(snapshot: Snapshot, slo_s: float, px: int) -> None:
    refused = newcomer(slo_s, "zz", px)
    earliest_s = earliest_deadline_s(snapshot, refused)
    assume(earliest_s is not None)
    assert earliest_s is not None and earliest_s > NOW_S + slo_s
    admitted = msgspec.structs.replace(refused, deadline_s=earliest_s + 1e-6)
    assert earliest_deadline_s(snapshot, admitted) is None
