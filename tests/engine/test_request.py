import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.engine.specs import make_spec
from tetrion.engine.errors import EngineOverloaded, RequestError
from tetrion.engine.loop.requests import LEGAL_TRANSITIONS, TERMINAL_STATES, Request, RequestState, RequestTable
from tetrion.engine.request import ImageRequest
from tetrion.engine.resolve import resolve_request

SPEC = make_spec()


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
            following = sorted(LEGAL_TRANSITIONS[request.state] - {RequestState.WAITING}, key=lambda s: s.value)
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
