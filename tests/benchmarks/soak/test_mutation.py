import json
from collections import Counter

import h11
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.soak import mutation

VALID = {"prompt": "a star", "size": "128x128", "seed": 7, "num_inference_steps": 1}
CASES = st.integers(0, 2**32), st.integers(0, 10**6)


@settings(deadline=None)
@given(*CASES)
def test_a_case_is_the_same_again_and_its_original_is_left_alone(seed: int, number: int) -> None:
    valid = dict(VALID)
    assert mutation.body_case(valid, seed, number) == mutation.body_case(valid, seed, number)
    assert mutation.stream_case(seed, number) == mutation.stream_case(seed, number)
    assert mutation.line_case(valid, seed, number) == mutation.line_case(valid, seed, number)
    assert valid == VALID


@settings(deadline=None)
@given(*CASES)
def test_a_line_is_one_line(seed: int, number: int) -> None:
    assert b"\n" not in mutation.line_case(VALID, seed, number)


@settings(deadline=None)
@given(*CASES)
def test_a_body_fits_into_what_a_server_reads(seed: int, number: int) -> None:
    assert len(mutation.body_case(VALID, seed, number).body) < 1 << 20


def test_cases_differ_and_are_of_all_kinds() -> None:
    bodies = [mutation.body_case(VALID, 1, number) for number in range(2000)]
    assert len({case.body for case in bodies}) > 1700
    kinds: Counter[str] = Counter()
    for case in bodies:
        try:
            kinds[type(json.loads(case.body)).__name__] += 1
        except (ValueError, RecursionError):
            kinds["no JSON"] += 1
        kinds["compressed"] += "content-encoding" in case.headers
        kinds["called otherwise"] += case.headers["content-type"] != mutation.JSON_TYPE
    assert min(kinds[kind] for kind in ("dict", "list", "no JSON", "compressed", "called otherwise")) > 20
    streams = [mutation.stream_case(1, number) for number in range(500)]
    assert {len(case.pieces) for case in streams} == {1, 2, 4} and {case.ends for case in streams} == {True, False}


@pytest.mark.parametrize("data", mutation.STREAMS)
def test_what_streams_are_made_of_is_http(data: bytes) -> None:
    server = h11.Connection(h11.SERVER)
    server.receive_data(data)
    assert isinstance(server.next_event(), h11.Request)
