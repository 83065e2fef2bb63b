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


@pytest.mark.parametrize(
    ("policy", "slo_ms"), [("horizon", None), ("horizon", 2000.0), ("edf-best-fit", 2000.0), ("tetriserve", 2000.0)]
)
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
    for number in range(10):
        simulation.request(f"few-{number}", at_s=1.0, width=512, height=512, num_steps=100, tenant="few")
    simulation.executor.at(60.0, simulation.loop.stop)
    done = Counter[str]()
    submit = simulation.executor.submit

    def count(command: object, members: tuple[int, ...]) -> bool:
        done[getattr(command, "request_id", "").partition("-")[0]] += getattr(command, "chunk_steps", 0)
        return submit(command, members)  # type: ignore[arg-type]

    simulation.executor.submit = count  # type: ignore[method-assign]
    simulation.run()
    assert 0.8 < done["few"] / done["many"] < 1.25


# Ranks ------------------------------------------------------------------------------------------------------------


def test_who_has_had_more_than_the_share_is_behind() -> None:
    shares = DeviceShares(8, {})
    assert shares.ranks({("a", "")}, 0.0) == {}
    run(shares, {("a", ""): 7.0, ("b", ""): 0.5})
    assert shares.ranks({("a", ""), ("b", "")}, 100.0) == {("a", ""): 1, ("b", ""): 0}
    assert shares.ranks({("a", "")}, 100.0) == {}, "alone it may have all"


def test_those_that_have_had_about_as_much_are_equal() -> None:
    shares = DeviceShares(8, {})
    used = {("a", ""): 3.5, ("b", ""): 0.1, ("c", ""): 3.4}
    run(shares, used)
    assert shares.ranks({("b", ""), ("c", "")}, 100.0) == {("b", ""): 0, ("c", ""): 1}
    shares, used = DeviceShares(8, {}), {("a", ""): 0.2, ("b", ""): 0.1, ("c", ""): 0.0}
    run(shares, used)
    assert shares.ranks(used.keys(), 100.0) == {}


def test_of_several_beyond_their_shares_the_one_with_most_is_last() -> None:
    shares = DeviceShares(10, {})
    used = {("a", ""): 5.0, ("b", ""): 4.0, ("c", ""): 0.8}
    run(shares, used)
    assert shares.ranks(used.keys(), 100.0) == {("c", ""): 0, ("b", ""): 1, ("a", ""): 2}


def test_shares_go_by_weight() -> None:
    used = {("heavy", ""): 5.5, ("light", ""): 2.0}
    for weights, expected in (({"heavy": 3.0}, {}), ({}, {("heavy", ""): 1, ("light", ""): 0})):
        shares = DeviceShares(8, weights)
        run(shares, used)
        assert shares.ranks(used.keys(), 100.0) == expected


def test_users_divide_what_their_tenant_has() -> None:
    shares = DeviceShares(8, {})
    used = {("a", "many"): 6.0, ("a", "few"): 0.5, ("b", ""): 1.0}
    run(shares, used)
    ranks = shares.ranks(used.keys(), 100.0)
    assert ranks == {("b", ""): 0, ("a", "few"): 1, ("a", "many"): 2}


def test_what_was_idle_is_paid_for_briefly() -> None:
    """One that comes back after an hour is not ahead for long of one that has had everything meanwhile."""
    shares = DeviceShares(8, {})
    run(shares, {("a", ""): 8.0}, for_s=3600)
    both, now_s = {("a", ""), ("b", "")}, 3600.0
    ahead_s = 0.0
    while (ranks := shares.ranks(both, now_s)) and ranks["b", ""] == 0:
        shares.ran(("b", ""), 8 * 0.1, now_s)
        now_s, ahead_s = now_s + 0.1, ahead_s + 0.1
    assert 1.0 < ahead_s < 30.0


@given(
    st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from("uv"), st.floats(0, 50), st.floats(0, 20)), max_size=60)
)
def test_ranks_are_dense_and_nobody_with_less_is_behind(given: list[tuple[str, str, float, float]]) -> None:
    shares, now_s, active = DeviceShares(4, {"a": 2.0}), 0.0, set()
    for tenant, user, device_s, pause_s in given:
        now_s += pause_s
        active = active ^ {(tenant, user)} if device_s > 40 else active | {(tenant, user)}
        ranks = shares.ranks(active, now_s)
        assert not ranks or (ranks.keys() == active and set(ranks.values()) == set(range(max(ranks.values()) + 1)))
        shares.ran((tenant, user), device_s, now_s)


def run(shares: DeviceShares, devices: dict[tuple[str, str], float], for_s: float = 100.0) -> None:
    """Each has had so many devices all the time."""
    for i in range(int(for_s)):
        shares.ranks(devices.keys(), float(i))
        for holder, used in devices.items():
            shares.ran(holder, used, float(i))
