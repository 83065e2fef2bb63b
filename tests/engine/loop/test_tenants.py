"""Nobody takes the house: slots are taken back, and device time is shared, between tenants."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.loop.test_loop import Simulation
from tetrion.engine.loop.device_shares import DeviceShares
from tetrion.engine.loop.requests import Request


def hogs(simulation: Simulation, num_requests: int = 70, **fields: object) -> None:
    for number in range(num_requests):
        simulation.request(f"hog-{number}", width=512, height=512, num_steps=1000, tenant="hog", **fields)


@pytest.mark.parametrize("policy", ["horizon", "edf-best-fit", "tetriserve"])
@pytest.mark.parametrize("slo_ms", [None, 2000.0])
def test_seven_hogs_keep_nobody_waiting(policy: str, slo_ms: float | None) -> None:
    simulation = Simulation(2, policy=policy)
    hogs(simulation)
    names = [f"small-{number}" for number in range(8)]
    for number, name in enumerate(names):
        simulation.request(name, at_s=5 + 7.0 * number, num_steps=4, tenant="small", slo_ms=slo_ms)
    simulation.executor.at(70.0, simulation.loop.stop)
    simulation.run()
    assert all(simulation.results[name].latency_s < 1.0 for name in names)


def test_what_was_set_aside_goes_on_from_where_it_was() -> None:
    """Two slots, of which the other tenants want one or both again and again."""
    simulation = Simulation(1, max_inflight=2)
    for number in range(2):
        simulation.request(f"long-{number}", width=512, height=512, num_steps=60, tenant="a")
    for number in range(6):
        simulation.request(f"b-{number}", at_s=0.5 + number, num_steps=10, tenant="b")
        simulation.request(f"c-{number}", at_s=0.6 + number, num_steps=10, tenant="c")
    steps, set_aside = Counter[str](), Counter[str]()
    table, submit = simulation.loop.table, simulation.executor.submit
    original = table.set_aside

    def note(request: Request) -> None:
        set_aside[request.request_id] += 1
        original(request)

    def count(command: object, members: tuple[int, ...]) -> bool:
        steps[getattr(command, "request_id", "")] += getattr(command, "chunk_steps", 0)
        return submit(command, members)  # type: ignore[arg-type]

    table.set_aside, simulation.executor.submit = note, count  # type: ignore[method-assign]
    simulation.run()
    assert len(simulation.results) == 14 and set_aside["long-0"] + set_aside["long-1"] >= 1
    assert steps["long-0"] == steps["long-1"] == 60, "no step is done twice"


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_every_request_of_every_tenant_ends_whatever_happens(data: st.DataObject) -> None:
    num_devices = data.draw(st.integers(1, 3))
    simulation = Simulation(num_devices, max_inflight=data.draw(st.integers(1, 5)))
    num_requests = data.draw(st.integers(1, 15))
    for number in range(num_requests):
        simulation.request(
            f"{number}",
            at_s=data.draw(st.floats(0, 2)),
            num_steps=data.draw(st.integers(1, 30)),
            tenant=data.draw(st.sampled_from("abc")),
            slo_ms=data.draw(st.one_of(st.none(), st.floats(10, 5000))),
        )
    for device_id in range(num_devices - 1):
        if data.draw(st.booleans()):
            at_s = data.draw(st.floats(0, 3))
            simulation.executor.at(at_s, lambda device_id=device_id: simulation.executor.lose(device_id))
    simulation.run()
    assert len(simulation.results) == num_requests and len(simulation.loop.table) == 0
    assert simulation.loop.table.slots.num_free == simulation.loop.table.slots.num_slots


def test_two_tenants_without_deadlines_get_as_much_whoever_asks_for_more() -> None:
    simulation = Simulation(2)
    for number in range(40):
        simulation.request(f"many-{number}", width=512, height=512, num_steps=100, tenant="many")
    for number in range(4):
        simulation.request(f"few-{number}", at_s=1.0, width=512, height=512, num_steps=100, tenant="few")
    simulation.executor.at(20.0, simulation.loop.stop)
    done = Counter[str]()
    submit = simulation.executor.submit

    def count(command: object, members: tuple[int, ...]) -> bool:
        done[getattr(command, "request_id", "").partition("-")[0]] += getattr(command, "chunk_steps", 0)
        return submit(command, members)  # type: ignore[arg-type]

    simulation.executor.submit = count  # type: ignore[method-assign]
    simulation.run()
    assert 0.8 < done["few"] / done["many"] < 1.25


def test_clocks_go_by_weight_and_a_newcomer_begins_with_the_least() -> None:
    shares = DeviceShares({"heavy": 2.0})
    assert not shares.are({"light"})
    shares.ran("light", 100.0)
    assert shares.are({"light", "heavy"}) and shares.lead_s("light") == shares.lead_s("heavy") == 0.0
    shares.ran("light", 1.0)
    shares.ran("heavy", 1.0)
    assert (shares.lead_s("light"), shares.lead_s("heavy")) == (0.5, 0.0)
    assert not shares.are({"heavy"}) and shares.lead_s("heavy") == 0.0
    assert shares.are({"light", "heavy"}) and shares.lead_s("light") == 0.0, "what it had had is forgotten"
