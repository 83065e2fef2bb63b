"""Outcomes, pairing and arrivals, against a server that is played."""

import base64
import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.soak import connections, load

BODY = {"prompt": "a", "size": "128x128", "num_inference_steps": 2}


def answer_with(picture: bytes) -> bytes:
    return json.dumps({"data": [{"b64_json": base64.b64encode(picture).decode()}]}).encode()


RIGHT = load.Picture(body=BODY, digest=load.digest_of(answer_with(b"as it should be")))


def played(handler: Callable[[httpx.Request], httpx.Response]) -> Any:
    return SimpleNamespace(http=httpx.AsyncClient(transport=httpx.MockTransport(handler), base_url="http://x"))


def broken(request: httpx.Request) -> httpx.Response:
    raise httpx.ReadError("reset", request=request)


@pytest.mark.parametrize(
    ("handler", "outcome"),
    [
        (lambda _: httpx.Response(200, content=answer_with(b"as it should be")), "right"),
        (lambda _: httpx.Response(200, content=answer_with(b"one bit off")), "wrong"),
        (lambda _: httpx.Response(503, json={"error": {"code": "draining"}}), "503 draining"),
        (lambda _: httpx.Response(500, content=b"<html>"), "500 ?"),
        (broken, "lost"),
    ],
)
async def test_every_answer_has_an_outcome(handler: Callable[[httpx.Request], httpx.Response], outcome: str) -> None:
    assert await load.ask_for(played(handler), RIGHT) == outcome


async def test_a_load_waits_for_nobody_and_keeps_its_order() -> None:
    arrivals = load.poisson([RIGHT], rate_per_s=200.0, seconds=0.2, seed=3)
    answers = await load.run_load(
        played(lambda _: httpx.Response(200, content=answer_with(b"other"))), [RIGHT], arrivals
    )
    assert [answer.due_s for answer in answers] == [request.arrival_s for request in arrivals.trace]
    told = load.summary(answers)
    assert (told["sent"], told["wrong"], told["right"], told["lost"]) == (len(arrivals.trace), len(answers), 0, 0)


async def test_a_picture_that_is_not_the_same_twice_is_no_truth() -> None:
    numbers = iter(range(100))
    server = played(lambda _: httpx.Response(200, content=answer_with(b"%d" % next(numbers))))
    with pytest.raises(RuntimeError, match="not the same twice"):
        await load.draw_undisturbed(server, [BODY])


async def test_capacity_counts_right_pictures_only() -> None:
    good = played(lambda _: httpx.Response(200, content=answer_with(b"as it should be")))
    assert await load.capacity_per_s(good, [RIGHT], 0.1) > 12 / 0.2
    bad = played(lambda _: httpx.Response(200, content=answer_with(b"other")))
    assert await load.capacity_per_s(bad, [RIGHT], 0.1) == 0


def test_arrivals_are_the_same_for_a_seed_and_as_many_as_asked_for() -> None:
    first, again = (load.poisson([RIGHT] * 5, 10.0, 600.0, seed=1) for _ in range(2))
    assert first == again != load.poisson([RIGHT] * 5, 10.0, 600.0, seed=2)
    assert 5700 < len(first.trace) < 6300 and set(first.choices) == set(range(5))


def answer(number: int, latency_s: float, outcome: str = "right") -> load.Answer:
    return load.Answer(number=number, due_s=float(number), latency_s=latency_s, outcome=outcome)


def test_requests_are_paired_by_number_and_only_where_both_have_a_picture() -> None:
    calm = [answer(0, 1.0), answer(1, 2.0), answer(2, 3.0, "lost"), answer(3, 1.0)]
    struck = [answer(0, 1.5), answer(1, 1.0), answer(2, 9.0), answer(3, 9.0, "500 x")]
    assert load.differences_s(calm, struck) == [0.5, -1.0]


def test_a_summary_tells_outcomes_apart() -> None:
    outcomes = ["right", "wrong", "lost", "503 draining", "500 x", "429 overloaded"]
    told = load.summary([answer(number, 1.0 + number, outcome) for number, outcome in enumerate(outcomes)])
    assert (told["right"], told["wrong"], told["lost"], told["http_5xx"]) == (1, 1, 1, 2)
    assert told["others"] == {"503 draining": 1, "500 x": 1, "429 overloaded": 1}
    assert (told["p50_s"], told["max_s"]) == (1.5, 2.0)
    assert load.summary([])["p99_s"] is None


@given(st.lists(st.floats(0, 1e6), min_size=1), st.sampled_from([0.5, 0.95, 0.99]))
def test_quantiles_are_nearest_rank(values: list[float], share: float) -> None:
    assert load.quantile(values, share) == np.quantile(values, share, method="inverted_cdf")


@given(st.integers(200, 1 << 20))
def test_a_big_post_is_as_long_as_it_says(num_bytes: int) -> None:
    head, _, body = connections.big_post(num_bytes).partition(b"\r\n\r\n")
    assert len(body) == num_bytes and b"content-length: %d" % num_bytes in head and json.loads(body)["prompt"]
