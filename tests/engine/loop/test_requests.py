from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.engine.specs import make_spec
from tetrion.engine.errors import Displaced, EngineOverloaded, QueueTimeout, RequestError
from tetrion.engine.loop.requests import LEGAL_TRANSITIONS, TERMINAL_STATES, Request, RequestState, RequestTable
from tetrion.engine.request import ImageRequest
from tetrion.engine.resolve import resolve_request

SPEC = make_spec()
NOT_MOVED_TO = {RequestState.WAITING, RequestState.QUEUED}
IDLE_STATES = (RequestState.WAITING, RequestState.READY)


def make_request(request_id: str, arrival_s: float = 0.0, **fields: object) -> Request:
    asked = ImageRequest(prompt="x", request_id=request_id, seed=1, **fields)  # type: ignore[arg-type]
    return Request(resolve_request(asked, SPEC, 4), arrival_s)


def test_slots_go_to_the_earliest_deadline_and_patience_counts_as_one() -> None:
    table = RequestTable(num_slots=2, max_queued=10, patience_s=60)
    patient = make_request("patient", arrival_s=0.0)
    relaxed = make_request("relaxed", arrival_s=1.0, slo_ms=100_000)
    urgent = make_request("urgent", arrival_s=2.0, slo_ms=1000)
    for request in (relaxed, patient, urgent):
        table.add(request)
    table.admit()
    assert [request.request_id for request in table.admitted()] == ["urgent", "patient"]
    assert relaxed.state is RequestState.QUEUED and table.num_queued == 1


def test_a_full_queue_and_a_used_id_are_refused() -> None:
    table = RequestTable(num_slots=1, max_queued=1, patience_s=60)
    table.add(make_request("a"))
    with pytest.raises(RequestError, match="in use"):
        table.add(make_request("a"))
    with pytest.raises(EngineOverloaded):
        table.add(make_request("b"))


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


def settle(table: RequestTable) -> int:
    """As the loop does: set aside and admit until nothing is left to do. Returns how many were set aside."""
    num_set_aside = 0
    table.admit()
    while (request := table.next_to_set_aside(anything_goes)) is not None:
        table.set_aside(request)
        assert [admitted.asked.tenant for admitted in table.admit()] != [request.asked.tenant]
        num_set_aside += 1
    return num_set_aside


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
    victim = table.next_to_set_aside(anything_goes)
    assert victim is not None and victim.asked.tenant == "hogs"
    table.set_aside(victim)
    assert table.admit() == [small] and small.slot >= 0
    assert (victim.state, victim.slot, victim.step_index) == (RequestState.QUEUED, -1, 3)
    assert table.next_to_set_aside(anything_goes) is None
    table.move(small, RequestState.CANCELLED)
    assert table.admit() == [victim], "it has the slot again, before those that have never had one"
    assert (victim.state, victim.step_index) == (RequestState.WAITING, 3), "to be encoded again"


def test_a_lone_tenant_may_take_all_slots_and_gives_up_what_is_beyond_its_share() -> None:
    table = RequestTable(num_slots=8, max_queued=100, patience_s=60)
    for number in range(20):
        table.add(make_request(f"a{number}", arrival_s=number, tenant="a"))
    assert settle(table) == 0 and num_held(table) == {"a": 8}
    for number in range(20):
        table.add(make_request(f"b{number}", arrival_s=100 + number, tenant="b"))
    assert settle(table) == 4 and num_held(table) == {"a": 4, "b": 4}
    table.add(make_request("c", arrival_s=200, tenant="c"))
    assert settle(table) == 1 and sorted(num_held(table).values()) == [1, 3, 4]


def test_the_least_urgent_of_those_with_nothing_in_flight_is_set_aside() -> None:
    table = RequestTable(num_slots=4, max_queued=100, patience_s=60)
    for number in (1, 3, 2, 0):
        table.add(make_request(f"a{number}", slo_ms=1000.0 * (1 + number), tenant="a"))
    table.admit()
    table.add(make_request("b", arrival_s=100, tenant="b"))
    running = {"a3"}
    victim = table.next_to_set_aside(lambda request: request.request_id not in running)
    assert victim is not None and victim.request_id == "a2"
    assert table.next_to_set_aside(lambda request: False) is None
    a2 = table.get("a2")
    assert a2 is not None
    table.cancel(a2)
    victim = table.next_to_set_aside(lambda request: request.request_id not in running)
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
    victim = table.next_to_set_aside(anything_goes)
    assert victim is not None and victim.request_id == "u3", "although those of v are less urgent"


def test_a_request_that_was_set_aside_has_had_its_slot() -> None:
    """It does not fail for having waited too long for one."""
    table = RequestTable(num_slots=1, max_queued=100, patience_s=60)
    first, second = make_request("first", tenant="a"), make_request("second", arrival_s=1.0, tenant="a")
    table.add(first)
    table.admit()
    table.add(second)
    table.set_aside(first)
    assert table.oldest_queued() is second
    assert list(table.queued()) == [second, first] and table.num_queued == 2 and table.all() == [second, first]
    assert table.get("first") is first and "first" in table
    table.move(first, RequestState.CANCELLED)
    assert "first" not in table and table.admit() == [second]


@given(st.data())
def test_slots_are_shared_without_going_to_and_fro(data: st.DataObject) -> None:
    num_slots = data.draw(st.integers(1, 8))
    table = RequestTable(
        num_slots, max_queued=1000, patience_s=60, is_patient=lambda request: "p" in request.asked.user
    )
    living: list[Request] = []
    for number in range(data.draw(st.integers(1, 30))):
        request = make_request(
            f"r{number}",
            arrival_s=number,
            tenant=data.draw(st.sampled_from("abc")),
            user=data.draw(st.sampled_from(("", "u", "p"))),
            slo_ms=data.draw(st.sampled_from((None, 1000.0, 90_000.0))),
        )
        table.add(request)
        living.append(request)
        before, num_patient = num_held(table), sum(r.asked.user == "p" for r in table.queued())
        num_set_aside = settle(table)
        after, waiting = num_held(table), Counter(r.asked.tenant for r in table.queued() if r.asked.user != "p")
        assert num_set_aside <= max(1, num_patient + (request.asked.user != "p")), (
            "one more request needs one slot at most; for it a patient one may go, and so let another patient one in"
        )
        assert sum(after.values()) <= num_slots and (sum(after.values()) == num_slots or not waiting)
        assert all(after[tenant] >= before[tenant] for tenant in waiting if before[tenant] < num_slots // 3)
        for tenant in waiting:
            for other in after:
                assert after[other] - after[tenant] <= 1 or after[tenant] >= num_slots // 3
        assert settle(table) == 0
        slots = [request.slot for request in table.admitted()]
        assert len(set(slots)) == len(slots) and set(slots) <= set(range(num_slots))
        patient = [request for request in table.admitted() if request.asked.user == "p"]
        assert len(patient) <= max(1, num_slots // 2)
        if data.draw(st.booleans()):
            ended = living.pop(data.draw(st.integers(0, len(living) - 1)))
            table.move(ended, RequestState.CANCELLED)
    assert len(table) == len(living) and all(table.get(request.request_id) is request for request in living)


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
