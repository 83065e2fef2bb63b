import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.specs import make_spec
from tetrion.engine.errors import Displaced, EngineOverloaded, QueueTimeout, RequestError
from tetrion.engine.loop.request_table import RequestTable
from tetrion.engine.loop.requests import LEGAL_TRANSITIONS, TERMINAL_STATES, Request, RequestState
from tetrion.engine.planning.remaining import Remaining
from tetrion.engine.request import ImageRequest
from tetrion.engine.resolve import resolve_request

SPEC = make_spec()
NOT_MOVED_TO = {RequestState.WAITING, RequestState.QUEUED}
IDLE_STATES = (RequestState.WAITING, RequestState.READY)


def make_request(request_id: str, arrival_s: float = 0.0, **fields: object) -> Request:
    asked = ImageRequest(prompt="x", request_id=request_id, seed=1, **fields)  # type: ignore[arg-type]
    return Request(resolve_request(asked, SPEC, 4), arrival_s)


def test_slots_go_to_the_earliest_deadline_and_one_to_those_without() -> None:
    table = RequestTable(num_slots=3, max_queued=10, patience_s=60)
    for request in (
        make_request("relaxed", arrival_s=1.0, slo_ms=100_000),
        make_request("younger", arrival_s=1.0),
        make_request("older", arrival_s=0.0),
        make_request("calm", arrival_s=0.0, slo_ms=90_000),
        make_request("urgent", arrival_s=2.0, slo_ms=1000),
    ):
        table.add(request)
    table.admit()
    assert [request.request_id for request in table.admitted()] == ["older", "urgent", "calm"]
    assert {request.request_id for request in table.queued()} == {"relaxed", "younger"}


def test_a_full_queue_and_a_used_id_are_refused() -> None:
    table = RequestTable(num_slots=1, max_queued=1, patience_s=60)
    table.add(make_request("a"))
    with pytest.raises(RequestError, match="in use"):
        table.add(make_request("a"))
    with pytest.raises(EngineOverloaded):
        table.add(make_request("b"))


@settings(deadline=None)
@given(st.data())
def test_slots_are_neither_lost_nor_given_twice(data: st.DataObject) -> None:
    table = RequestTable(num_slots=3, max_queued=100, patience_s=60)
    living: list[Request] = []
    for number in range(data.draw(st.integers(1, 30))):
        living.append(make_request(f"r{number}"))
        table.add(living[-1])
        table.admit()
        for request in data.draw(st.lists(st.sampled_from(living), unique=True)):
            following = sorted(LEGAL_TRANSITIONS[request.state] - NOT_MOVED_TO, key=lambda s: s.value)
            if following and request.state is not RequestState.QUEUED:
                table.move(request, data.draw(st.sampled_from(following)))
        living = [request for request in living if request.state not in TERMINAL_STATES]
        slots = [request.slot for request in table.admitted()]
        assert len(set(slots)) == len(slots) <= 3 and set(slots) <= {0, 1, 2}
        assert len(table) == len(living)
    for request in living:
        table.move(request, RequestState.CANCELLED)
    assert len(table) == 0


def test_illegal_transitions_are_caught() -> None:
    table = RequestTable(num_slots=1, max_queued=1, patience_s=60)
    request = make_request("a")
    table.add(request)
    with pytest.raises(AssertionError):
        table.move(request, RequestState.DECODING)


def anything_goes(request: Request) -> bool:
    return True


def giver(table: RequestTable, is_at_rest: Callable[[Request], bool] = anything_goes) -> Request | None:
    exchange = table.next_exchange(is_at_rest)
    return None if exchange is None else exchange[0]


def set_aside_next(table: RequestTable) -> Request | None:
    """As the loop does once. Returns whose slot was taken back."""
    exchange = table.next_exchange(anything_goes)
    if exchange is None:
        return None
    table.set_aside(exchange[0])
    assert table.admit(exchange[1]) == [exchange[1]]
    return exchange[0]


def num_held(table: RequestTable) -> Counter[str]:
    return Counter(request.asked.tenant for request in table.admitted())


def with_steps(request: Request, step_index: int, table: RequestTable) -> None:
    """As if it had been encoded, and some steps done."""
    table.move(request, RequestState.ENCODING)
    table.move(request, RequestState.READY)
    request.step_index = request.planned_step_index = step_index
    request.planned_stage = "denoise"


@pytest.mark.parametrize("slo_ms", [None, 2000.0])
def test_hogs_give_a_slot_to_a_small_request_of_another_tenant_at_once(slo_ms: float | None) -> None:
    table = RequestTable(num_slots=64, max_queued=4096, patience_s=60)
    for body in range(7):
        for number in range(10):
            hog = make_request(f"hog{body}.{number}", num_steps=1000, width=512, height=512, tenant="hogs", slo_ms=1000)
            table.add(hog)
    assert len(table.admit()) == 64
    for request in list(table.admitted()):
        with_steps(request, 3, table)
    small = make_request("small", arrival_s=100.0, tenant="other", slo_ms=slo_ms)
    table.add(small)
    assert table.admit() == []
    victim = set_aside_next(table)
    assert victim is not None and victim.asked.tenant == "hogs"
    assert small.slot >= 0
    assert (victim.state, victim.slot, victim.step_index) == (RequestState.QUEUED, -1, 3)
    assert table.next_exchange(anything_goes) is None
    table.move(small, RequestState.CANCELLED)
    assert table.admit() == [victim], "it has the slot again, before those that have never had one"
    assert (victim.state, victim.step_index) == (RequestState.WAITING, 3), "to be encoded again"


def test_a_lone_tenant_may_take_all_slots_and_gives_up_what_is_beyond_its_share() -> None:
    table = RequestTable(num_slots=8, max_queued=100, patience_s=60)
    for number in range(20):
        table.add(make_request(f"a{number}", arrival_s=number, tenant="a"))
    assert exchange_all(table) == 0 and num_held(table) == {"a": 8}
    for number in range(20):
        table.add(make_request(f"b{number}", arrival_s=100 + number, tenant="b"))
    assert exchange_all(table) == 4 and num_held(table) == {"a": 4, "b": 4}
    table.add(make_request("c", arrival_s=200, tenant="c"))
    assert exchange_all(table) == 1 and sorted(num_held(table).values()) == [1, 3, 4]


def test_the_least_urgent_of_those_with_nothing_in_flight_is_set_aside() -> None:
    table = RequestTable(num_slots=4, max_queued=100, patience_s=60)
    for number in (1, 3, 2, 0):
        table.add(make_request(f"a{number}", slo_ms=1000.0 * (1 + number), tenant="a"))
    table.admit()
    table.add(make_request("b", arrival_s=100, tenant="b"))
    running = {"a3"}
    victim = giver(table, lambda request: request.request_id not in running)
    assert victim is not None and victim.request_id == "a2"
    assert table.next_exchange(lambda request: False) is None
    a2 = table.get("a2")
    assert a2 is not None
    table.cancel(a2)
    victim = giver(table, lambda request: request.request_id not in running)
    assert victim is not None and victim.request_id == "a1", "one that ends anyway need not be set aside"


def test_the_user_with_most_slots_gives_first_and_users_share_what_their_tenant_has() -> None:
    table = RequestTable(num_slots=6, max_queued=100, patience_s=60)
    for number in range(6):
        table.add(make_request(f"u{number}", tenant="a", user="u"))
    for number in range(2):
        table.add(make_request(f"v{number}", arrival_s=50, tenant="a", user="v"))
    table.admit()
    assert Counter(request.asked.user for request in table.admitted()) == {"u": 4, "v": 2}
    table.add(make_request("b", arrival_s=100, tenant="b"))
    victim = giver(table)
    assert victim is not None and victim.request_id == "u3", "although those of v are less urgent"


def test_a_request_that_was_set_aside_is_queued_behind_those_that_have_never_had_a_slot() -> None:
    table = RequestTable(num_slots=1, max_queued=100, patience_s=60)
    first, second = make_request("first", tenant="a"), make_request("second", arrival_s=1.0, tenant="a")
    table.add(first)
    table.admit()
    table.add(second)
    table.set_aside(first)
    assert list(table.queued()) == [second, first] and table.num_queued == 2 and table.all() == [second, first]
    assert table.get("first") is first and "first" in table
    table.move(first, RequestState.CANCELLED)
    assert "first" not in table and table.admit() == [second]


class Clocked:
    """A table whose requests need a given time each, `seconds` on all devices, and a clock."""

    def __init__(self, num_slots: int, **settings: Any) -> None:
        self.now_s = 0.0
        self.seconds: dict[str, float] = {}
        self.table = RequestTable(
            num_slots,
            max_queued=1000,
            patience_s=60,
            remaining=lambda request: Remaining(self.seconds[request.request_id], 1.0),
            **settings,
        )

    def add(self, request_id: str, seconds: float = 1.0, **fields: Any) -> Request:
        self.seconds[request_id] = seconds
        request = make_request(request_id, arrival_s=self.now_s, **fields)
        self.table.add(request)
        return request

    def at(self, now_s: float) -> None:
        self.now_s = now_s
        self.table.at(now_s)


def exchange_all(table: RequestTable, may_go: Callable[[Request], bool] = anything_goes) -> int:
    """As the loop does, checked: slots of tenants come to be more equal, or as equal with fewer others than feasible
    ones among their owners; so none goes to and fro."""
    table.admit()
    count, before = 0, (math.inf, 0)
    while True:
        admitted = list(table.admitted())
        others = sum(not request.is_feasible for request in admitted)
        now = sum(held * held for held in num_held(table).values()), others
        assert now < before
        exchange, before = table.next_exchange(may_go), now
        if exchange is None:
            return count
        table.set_aside(exchange[0])
        assert table.admit(exchange[1]) == [exchange[1]]
        count += 1


@settings(deadline=None)
@given(st.data())
def test_slots_are_shared_without_going_to_and_fro(data: st.DataObject) -> None:
    num_slots = data.draw(st.integers(1, 10))
    clocked = Clocked(num_slots, is_patient=lambda request: "p" in request.asked.user)
    table, living = clocked.table, list[Request]()
    for number in range(data.draw(st.integers(1, 30))):
        clocked.at(clocked.now_s + data.draw(st.floats(0, 0.5)))
        request = clocked.add(
            f"r{number}",
            tenant=data.draw(st.sampled_from("abc")),
            user=data.draw(st.sampled_from(("", "u", "p"))),
            slo_ms=data.draw(st.sampled_from((None, 500.0, 2000.0, 90_000.0))),
        )
        living.append(request)
        before = num_held(table)
        exchange_all(table)
        after, waiting = num_held(table), Counter(r.asked.tenant for r in table.queued() if r.asked.user != "p")
        assert sum(after.values()) <= num_slots and (sum(after.values()) == num_slots or not waiting)
        assert all(after[tenant] >= before[tenant] for tenant in waiting if before[tenant] < num_slots // 3)
        for tenant in waiting:
            for other in after:
                assert after[other] - after[tenant] <= 1 or after[tenant] >= num_slots // 3
        assert exchange_all(table) == 0
        slots = [request.slot for request in table.admitted()]
        assert len(set(slots)) == len(slots) and set(slots) <= set(range(num_slots))
        patient = [request for request in table.admitted() if request.asked.user == "p"]
        assert len(patient) <= max(1, num_slots // 2)
        if data.draw(st.booleans()):
            ended = living.pop(data.draw(st.integers(0, len(living) - 1)))
            table.move(ended, RequestState.CANCELLED)
    assert len(table) == len(living) and all(table.get(request.request_id) is request for request in living)


@settings(deadline=None)
@given(st.data())
def test_feasible_ones_of_a_lone_user_own_the_slots_and_turn_late_at_their_time(data: st.DataObject) -> None:
    num_slots = data.draw(st.integers(1, 12))
    num_for_others = num_slots // 8 or int(num_slots > 1)
    clocked = Clocked(num_slots)
    table, running = clocked.table, set[str]()
    for number in range(data.draw(st.integers(1, 30))):
        clocked.at(clocked.now_s + data.draw(st.floats(0, 2)))
        slo_ms = data.draw(st.sampled_from((None, 500.0, 1500.0, 4000.0, 90_000.0)))
        clocked.add(f"r{number}", seconds=data.draw(st.sampled_from((0.1, 1.0, 3.0))), slo_ms=slo_ms)
        exchange_all(table, may_go=lambda request: request.request_id not in running)
        for request in table.all():
            has_time = (
                request.deadline_s is not None
                and request.deadline_s - clocked.seconds[request.request_id] >= clocked.now_s
            )
            assert request.is_feasible == has_time or request.cancelled
        owners = list(table.admitted())
        others = [request for request in owners if not request.is_feasible]
        waiting = [request for request in table.queued() if request.is_feasible and not request.cancelled]
        assert len(owners) == num_slots or all(request.cancelled for request in table.queued())
        if waiting:
            could_go = [request for request in others if request.request_id not in running and not request.cancelled]
            assert len(others) <= num_for_others or not could_go
        what = data.draw(st.sampled_from(("nothing", "run", "rest", "end", "cancel")))
        if owners and what != "nothing":
            request = data.draw(st.sampled_from(owners))
            if what == "run":
                running.add(request.request_id)
            elif what == "rest":
                running.discard(request.request_id)
            elif what == "end":
                table.move(request, RequestState.CANCELLED)
            else:
                table.cancel(request)
    for request in table.all():
        table.move(request, RequestState.CANCELLED)
    assert table.slots.num_free == num_slots and not len(table._feasible) and not table._others


def test_a_full_queue_is_shared_by_tenants() -> None:
    table = RequestTable(num_slots=1, max_queued=4, patience_s=60)
    for number in range(5):
        table.add(make_request(f"a{number}", tenant="a"))
        table.admit()
    with pytest.raises(EngineOverloaded, match="4 requests are queued already"):
        table.add(make_request("a5", tenant="a"))
    for number in range(2):
        table.add(make_request(f"b{number}", tenant="b"))
    with pytest.raises(EngineOverloaded, match="max_queued"):
        table.add(make_request("b2", tenant="b"))
    displaced = table.cancelled()
    assert [request.request_id for request in displaced] == ["a4", "a3"]
    assert all(isinstance(request.error, Displaced) for request in displaced)
    for request in displaced:
        table.move(request, RequestState.FAILED)
    assert sorted(request.request_id for request in table.queued()) == ["a1", "a2", "b0", "b1"]
    with pytest.raises(EngineOverloaded):
        table.add(make_request("a6", tenant="a"))


def test_what_is_cancelled_while_it_is_queued_gets_no_slot() -> None:
    table = RequestTable(num_slots=1, max_queued=2, patience_s=60)
    requests = [make_request(f"r{number}") for number in range(3)]
    for request in requests[:2]:
        table.add(request)
    table.cancel(requests[0], QueueTimeout("too long"))
    table.add(requests[2])
    assert table.admit() == [requests[1]]
    assert table.cancelled() == [requests[0]] and table.get("r0") is requests[0]
