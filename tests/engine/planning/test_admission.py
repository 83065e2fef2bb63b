"""What admission says of a new request: yes, or the earliest deadline that it could meet."""

import random

import msgspec
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tetrion.engine.config import PlannerConfig
from tetrion.engine.planning.admission import earliest_deadline_s, num_around
from tetrion.engine.planning.degrees import DegreeTables
from tetrion.engine.planning.remaining import remaining
from tetrion.engine.planning.slo import urgency
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


def queued(draw: random.Random, number: int, num_devices: int) -> RequestView:
    """One of many that would keep so many devices busy until about its deadline, most of which are in time."""
    view = newcomer(draw.uniform(30, 100 + 1.3 * number / num_devices), f"r{number:03d}", draw.choice((256, 512, 1024)))
    return msgspec.structs.replace(view, num_steps=draw.randint(4, 28))


@pytest.mark.parametrize("num_devices", [2, 8])
def test_of_many_those_nearest_to_its_deadline_and_the_work_before_decide_as_all_would(num_devices: int) -> None:
    draw, table = random.Random(num_devices), DegreeTables(costs_of(PROFILE), num_devices)
    num_before, num_after = num_around(num_devices, PlannerConfig())
    num_different, num_refused, num_hidden = 0, 0, 0
    for _ in range(60):
        views = [queued(draw, number, num_devices) for number in range(draw.randrange(100, 300))]
        views.sort(key=lambda view: urgency(view, PlannerConfig()))
        new = newcomer(draw.uniform(5, 150), px=draw.choice((256, 1024, 2048)))
        place = sum(urgency(view, PlannerConfig()) < urgency(new, PlannerConfig()) for view in views)
        first = max(0, place - num_before)
        left = [remaining(table["", view.cost_key], "encode", view.num_steps) for view in views[:first]]
        shown = busy(tuple(views[first : place + num_after]), num_devices)
        of_some = earliest_deadline_s(shown, new, sum(one.device_s for one in left))
        of_all = earliest_deadline_s(busy(tuple(views), num_devices), new)
        num_different += (of_some is None) is not (of_all is None)
        num_refused += of_all is not None
        num_hidden += first > 0
    assert num_different <= 3, "one of twenty"
    assert 10 <= num_refused <= 50 and num_hidden > 20, "else there is nothing to decide"


def test_work_before_keeps_every_device_busy() -> None:
    fastest_s = ENCODE_S + 28 * PROFILE.step_s("1024x1024", 8) + DECODE_S + MARGIN_S
    assert earliest_deadline_s(busy(), newcomer(10 + fastest_s + 0.001), 80.0) is None
    refused = earliest_deadline_s(busy(), newcomer(10 + fastest_s - 0.001), 80.0)
    assert refused == pytest.approx(NOW_S + 10 + fastest_s)
