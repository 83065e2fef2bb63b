"""What admission says of a new request: yes, or the earliest deadline that it could meet."""

import random

import msgspec
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tetrion.engine.config import PlannerConfig
from tetrion.engine.loop.feasible import Feasible
from tetrion.engine.planning import admission
from tetrion.engine.planning.admission import Forecast, num_around
from tetrion.engine.planning.degrees import DegreeTables
from tetrion.engine.planning.remaining import remaining
from tetrion.engine.planning.slo import urgency
from tetrion.engine.planning.snapshot import DeviceView, RequestView, Snapshot

from .simulation import costs_of, flux_profile
from .test_plans import NOW_S, snapshots

PROFILE = flux_profile()
ENCODE_S, DECODE_S, MARGIN_S = 0.025, 0.12, 0.01
"""Of 1024x1024; the margin is the planner's."""


def earliest_deadline_s(snapshot: Snapshot, newcomer: RequestView, work_before_s: float = 0.0) -> float | None:
    forecast = Forecast(snapshot=snapshot, newcomer=newcomer, work_before_s=work_before_s)
    return admission.earliest_deadline_s(forecast)


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


def as_all_would(num_devices: int, load: float, draw: random.Random) -> tuple[bool, bool]:
    """Whether a newcomer is refused beside 100 to 300 requests by a look at those nearest to its deadline, the rest
    being work, and whether by a look at all. `load`: their work over what devices can do until their deadlines."""
    config, tables = PlannerConfig(), DegreeTables(costs_of(PROFILE), num_devices)
    feasible, views = Feasible[RequestView](), []
    num_queued, new = draw.randrange(100, 300), newcomer(None, px=draw.choice((256, 1024, 2048)))
    drawn = [(draw.choice((256, 512, 1024)), draw.randint(4, 28)) for _ in range(num_queued)]
    left = [remaining(tables["", f"{px}x{px}"], "encode", num_steps) for px, num_steps in drawn]
    span_s = sum(one.device_s for one in left) / num_devices / load
    for number, ((px, num_steps), one) in enumerate(zip(drawn, left, strict=True)):
        view = newcomer(draw.uniform(5, span_s), f"r{number:03d}", px)
        views.append(msgspec.structs.replace(view, num_steps=num_steps))
        assert view.deadline_s is not None
        feasible.put((view.deadline_s, 0, view.request_id), views[-1], 0.0, one.device_s)
    due_s = NOW_S + draw.uniform(5, span_s)
    new, rank = msgspec.structs.replace(new, deadline_s=due_s), (due_s, 0, "new")
    num_before, num_after = num_around(num_devices, config)
    shown, work_s = feasible.around(rank, num_before, num_after)
    assert len(shown) <= num_before + num_after
    own_s = remaining(tables["", new.cost_key], "encode", new.num_steps).device_s
    forecast = Forecast(
        snapshot=busy(tuple(shown), num_devices),
        newcomer=new,
        work_before_s=work_s,
        crowded_until_s=feasible.crowded_until_s(rank, num_after, own_s, 1.0, NOW_S, num_devices),
    )
    every = busy(tuple(sorted(views, key=lambda view: urgency(view, config))), num_devices)
    return admission.earliest_deadline_s(forecast) is not None, earliest_deadline_s(every, new) is not None


@pytest.mark.parametrize("num_devices", [2, 8])
def test_of_many_those_nearest_to_its_deadline_decide_as_all_would(num_devices: int) -> None:
    draw = random.Random(num_devices)
    judged = [as_all_would(num_devices, load, draw) for load in (0.8, 1.0, 1.1, 1.3) for _ in range(15)]
    num_different = sum(of_some is not of_all for of_some, of_all in judged)
    num_refused = sum(of_all for _, of_all in judged)
    assert num_different <= 6 and 15 <= num_refused <= 45, (num_different, num_refused)


def test_encodes_and_decodes_of_late_ones_count() -> None:
    fastest_s = ENCODE_S + 28 * PROFILE.step_s("1024x1024", 8) + DECODE_S + MARGIN_S
    late = tuple(newcomer(0.001, f"r{number}") for number in range(16))
    snapshot, more_s = msgspec.structs.replace(busy(), backlog=late), 16 * (ENCODE_S + DECODE_S) / 8
    assert earliest_deadline_s(snapshot, newcomer(fastest_s + more_s + 0.001)) is None
    refused = earliest_deadline_s(snapshot, newcomer(fastest_s + more_s - 0.001))
    assert refused == pytest.approx(NOW_S + fastest_s + more_s)


def test_work_before_keeps_every_device_busy() -> None:
    fastest_s = ENCODE_S + 28 * PROFILE.step_s("1024x1024", 8) + DECODE_S + MARGIN_S
    assert earliest_deadline_s(busy(), newcomer(10 + fastest_s + 0.001), 80.0) is None
    refused = earliest_deadline_s(busy(), newcomer(10 + fastest_s - 0.001), 80.0)
    assert refused == pytest.approx(NOW_S + 10 + fastest_s)
