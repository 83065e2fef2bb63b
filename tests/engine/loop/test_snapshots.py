"""The builder keeps views from one snapshot to the next: they must be what a look at everything would give."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.loop.test_loop import COSTS, SPEC, Simulation
from tetrion.engine.config import PlannerConfig
from tetrion.engine.loop.request_table import RequestTable
from tetrion.engine.loop.requests import Request
from tetrion.engine.loop.snapshots import SnapshotBuilder
from tetrion.engine.planning.slo import turn, urgency
from tetrion.engine.planning.snapshot import RoundPlan, Snapshot
from tetrion.engine.request import ImageRequest
from tetrion.engine.resolve import resolve_request


class AllChanged:
    """A table of which everything has changed."""

    def __init__(self, table: RequestTable) -> None:
        self._table = table

    def __getattr__(self, name: str) -> Any:
        return getattr(self._table, name)

    def take_changed(self) -> set[str]:
        return {request.request_id for request in self._table.admitted()}


def checked(simulation: Simulation) -> list[Snapshot]:
    """Every snapshot of the simulation from now on, each compared with that of a new builder."""
    loop, seen = simulation.loop, []
    planner = loop.planner

    def plan(snapshot: Snapshot) -> RoundPlan:
        table: Any = AllChanged(loop.table)
        fresh = SnapshotBuilder(loop.executor, table, loop._in_flight, loop._config)
        assert fresh.snapshot(snapshot.costs) == snapshot
        seen.append(snapshot)
        return planner(snapshot)

    loop.planner = plan
    return seen


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_what_was_kept_is_what_a_fresh_look_gives(data: st.DataObject) -> None:
    simulation = Simulation(
        num_devices=data.draw(st.integers(1, 4)), max_inflight=data.draw(st.sampled_from((2, 5, 64)))
    )
    seen = checked(simulation)
    for number in range(data.draw(st.integers(1, 12))):
        simulation.request(
            f"r{number}",
            at_s=data.draw(st.floats(0, 2)),
            width=data.draw(st.sampled_from((128, 512))),
            num_steps=data.draw(st.integers(1, 8)),
            slo_ms=data.draw(st.sampled_from((None, 50, 400, 2000))),
            force_degrees=data.draw(st.sampled_from(((), (), (1,)))),
        )
        if data.draw(st.integers(0, 3)) == 0:
            at_s = data.draw(st.floats(0, 3))
            simulation.executor.at(at_s, lambda request_id=f"r{number}": simulation.loop.cancel(request_id))
    if len(simulation.executor.device_ids) > 1 and data.draw(st.booleans()):
        simulation.executor.at(data.draw(st.floats(0, 2)), lambda: simulation.executor.lose(0))
    simulation.run()
    config = simulation.loop._config
    for snapshot in seen:
        assert list(snapshot.requests) == sorted(snapshot.requests, key=lambda view: urgency(view, config))
        assert list(snapshot.backlog) == sorted(
            snapshot.backlog, key=lambda view: turn(view, snapshot.tables[view.model, view.cost_key])
        )
        assert all(view.deadline_s < snapshot.now_s and view.stage == "denoise" for view in snapshot.backlog)  # type: ignore[operator]


def test_those_past_their_deadline_are_kept_apart_and_are_served_all_the_same() -> None:
    simulation = Simulation(num_devices=1)
    seen = checked(simulation)
    for number in range(30):
        simulation.request(f"r{number:02d}", width=512, height=512, slo_ms=3000)
    simulation.run()
    assert len(simulation.results) == 30
    assert max(len(snapshot.backlog) for snapshot in seen) > 20


def new_request(request_id: str, **fields: Any) -> Request:
    asked = ImageRequest(prompt="x", seed=1, request_id=request_id, **fields)
    return Request(resolve_request(asked, SPEC, 4), 0.0)


def test_weights_of_class_and_tenant_multiply_that_of_the_request() -> None:
    simulation = Simulation()
    config = PlannerConfig(class_weights={"128x128": 3.0}, tenant_weights={"gold": 5.0})
    loop = simulation.loop
    builder = SnapshotBuilder(loop.executor, loop.table, loop._in_flight, config)
    weights = {}
    for number, (px, tenant) in enumerate(((128, "gold"), (128, "other"), (512, "gold"), (512, ""))):
        view = builder.view_of_new(new_request(f"r{number}", width=px, height=px, weight=2.0, tenant=tenant))
        weights[view.request_id] = view.weight
    assert weights == {"r0": 30.0, "r1": 6.0, "r2": 10.0, "r3": 2.0}


@pytest.mark.parametrize("max_inflight", [1, 64])
def test_a_forecast_shows_those_with_a_deadline_that_can_be_met_in_the_queue_too(max_inflight: int) -> None:
    simulation = Simulation(max_inflight=max_inflight)
    seen: list[list[str]] = []

    def look() -> None:
        forecast = simulation.loop._snapshots.forecast(COSTS, new_request("new", slo_ms=1e6))
        seen.append([request.request_id for request in forecast.snapshot.requests])
        assert (forecast.newcomer.request_id, forecast.work_before_s, forecast.crowded_until_s) == ("new", 0.0, None)

    for number, slo_ms in enumerate((None, 60_000.0, 30_000.0, 10.0)):
        simulation.request(f"r{number}", at_s=0.0, width=512, height=512, slo_ms=slo_ms)
    simulation.executor.at(0.1, look)
    simulation.run()
    assert seen == [["r2", "r1"]]


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_of_many_a_forecast_shows_the_nearest_and_adds_up_those_before(data: st.DataObject) -> None:
    simulation = Simulation(num_devices=1, planner={"options": {"max_candidates": 4}}, max_inflight=3)
    slos_ms = data.draw(st.lists(st.integers(100, 1000), min_size=1, max_size=20))
    for number, slo_ms in enumerate(slos_ms):
        simulation.request(f"r{number:02d}", width=512, height=512, num_steps=10, slo_ms=1e3 * slo_ms)
    new_slo_ms, seen = 1e3 * data.draw(st.integers(100, 1000)), []
    simulation.executor.at(0.001, simulation.loop.tick)
    simulation.executor.at(
        0.002,
        lambda: seen.append(simulation.loop._snapshots.forecast(COSTS, new_request("r99", slo_ms=new_slo_ms))),
    )
    simulation.executor.at(0.003, simulation.loop.stop)
    simulation.run()
    (forecast,) = seen
    order = sorted((1e3 * slo_ms, f"r{number:02d}") for number, slo_ms in enumerate(slos_ms))
    before = [name for ms, name in order if ms <= new_slo_ms]
    after = [name for ms, name in order if ms > new_slo_ms]
    started = "r" + str(order[0][1])[1:]
    assert [view.request_id for view in forecast.snapshot.requests] == before[-4:] + after[:2]
    each_s, hidden = 10 * 0.2 + 0.005 + 0.08, before[:-4]
    assert forecast.work_before_s == pytest.approx(len(hidden) * each_s - 0.005 * (started in hidden))
