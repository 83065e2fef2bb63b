"""What one request may ask for, and what all that wait may hold."""

import asyncio
import json
from collections import Counter

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.entrypoints.http.live import GENERATIONS, head, live, until
from tetrion.engine.errors import Displaced, QueueTimeout
from tetrion.entrypoints.http.errors import ApiError
from tetrion.entrypoints.http.limits import Shared, Waiting, text_bytes

JSON = {"content-type": "application/json"}


async def test_the_operators_bounds_name_field_and_bound() -> None:
    async with live(max_n=2, max_steps=6, max_pixels=256 * 256) as served:
        for body, param, bound in (
            ({"n": 3}, "n", "at most 2 pictures"),
            ({"num_inference_steps": 7}, "num_inference_steps", "at most 6 steps"),
            ({"size": "512x128", "height": None, "n": 2}, "size", ""),
            ({"size": "512x256"}, "size", "at most 65536 pixels, got 512x256"),
            ({"width": 272}, "size", "at most 65536 pixels, got 272x256"),
        ):
            response = await served.post(**body)
            if not bound:
                assert response.status_code == 200, "as many pixels, in another shape"
                continue
            error = response.json()["error"]
            assert (response.status_code, error["param"], error["code"]) == (400, param, "limit_exceeded")
            assert bound in error["message"] and error["message"].startswith(f"{param}: ")
        assert sum(not handle.is_cancelled for handle in served.engine.handles) == 2
        assert (await served.post(n=2, num_inference_steps=6, size="256x256")).status_code == 200


async def test_a_models_default_is_bound_as_well() -> None:
    async with live(max_steps=3) as served:
        response = await served.post()
        assert response.json()["error"]["message"] == "num_inference_steps: this server draws at most 3 steps, got 4"


async def test_long_users_are_refused_before_anything_is_queued() -> None:
    async with live() as served:
        response = await served.post(user="x" * 257)
        assert (response.status_code, response.json()["error"]["param"]) == (400, "user")
        assert not served.engine.handles and (await served.post(user="\U0001f600" * 256)).status_code == 200


async def test_a_request_that_got_no_slot_in_time_is_asked_to_come_back() -> None:
    async with live() as served:
        posting = asyncio.create_task(served.post(prompt="slow"))
        await until(lambda: served.engine.handles)
        served.engine.handles[0].fail(QueueTimeout("it waited for 5 s"))
        response = await posting
        assert (response.status_code, response.json()["error"]["code"]) == (503, "queue_timeout")
        assert response.headers["retry-after"] == "1"


@pytest.mark.parametrize("slo_ms", [None, 5000])
async def test_a_request_that_lost_its_place_in_the_queue_is_refused_like_one_that_got_none(slo_ms: int | None) -> None:
    async with live() as served:
        posting = asyncio.create_task(served.post(prompt="slow", n=2, slo_ms=slo_ms))
        await until(lambda: len(served.engine.handles) == 2)
        served.engine.handles[1].fail(Displaced("9 requests are queued"))
        response = await posting
        assert (response.status_code, response.json()["error"]["code"]) == (429, "engine_overloaded")
        assert ("retry-after" in response.headers) == (slo_ms is None)
        assert served.engine.handles[0].is_cancelled


async def test_bodies_that_wait_for_their_end_hold_no_more_than_they_may() -> None:
    body = b'{"prompt": "' + b"x" * 1_000_000
    async with live(max_waiting_mb=5) as served:
        held = [await served.open(head("POST", GENERATIONS, "content-length: 1040000") + body) for _ in "ab"]
        answer = None
        async with asyncio.timeout(10):
            while answer is None or answer.status_code != 503:  # as soon as both have been read
                answer = await served.http.post(GENERATIONS, content=b" " * 700_000, headers=JSON)
        error = answer.json()["error"]
        assert error["code"] == "too_many_bytes_waiting" and answer.headers["retry-after"] == "1"
        for _, writer in held:
            writer.close()
        await asyncio.sleep(0.1)
        assert (await served.post()).status_code == 200


async def test_of_a_long_body_only_its_texts_are_held_while_it_waits() -> None:
    async with live(max_waiting_mb=4) as served:
        bodies = {"prompt": "slow", "ignored": "x" * 900_000}
        posting = []
        for number in range(1, 9):
            posting.append(asyncio.create_task(served.post(**bodies)))
            await until(lambda number=number: len(served.engine.handles) == number)
        for handle in served.engine.handles:
            handle.cancel()
        statuses = {response.status_code for response in await asyncio.gather(*posting)}
        assert statuses == {503}


async def test_no_more_requests_at_once_than_allowed_but_probes() -> None:
    async with live(limit_concurrency=2) as served:
        posting = [asyncio.create_task(served.post(prompt="slow")) for _ in "ab"]
        await until(lambda: len(served.engine.handles) == 2)
        refused = await served.post()
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "too_many_requests_at_once")
        assert refused.headers["retry-after"] == "1"
        for path in ("/health", "/ready", "/metrics"):
            assert (await served.http.get(path)).status_code == 200
        for handle in served.engine.handles:
            handle.cancel()
        await asyncio.gather(*posting)
        assert (await served.post()).status_code == 200


def test_what_is_held_is_given_back() -> None:
    waiting = Waiting(max_bytes=100, max_requests=1)
    one, two = waiting.enter("a"), waiting.enter("b")
    one.hold(60)
    one.count()
    with pytest.raises(ApiError):
        two.hold(41)
    with pytest.raises(ApiError):
        two.count()
    one.hold(30)
    two.hold(70)
    one.release()
    one.release()
    two.count()
    two.release()
    assert (waiting.bytes.held, waiting.requests.held) == (0, 0)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), max_size=60), st.integers(1, 30))
def test_one_tenant_leaves_room_for_others(arrivals: list[tuple[str, bool]], at_most: int) -> None:
    shared, held = Shared(at_most), Counter[str]()
    for tenant, leaves in arrivals:
        if leaves and held[tenant]:
            shared.add(-1, tenant)
            held[tenant] -= 1
        elif shared.has(1, tenant):
            assert held.total() + 1 < at_most or held[tenant] < 8, "the last place is for others"
            shared.add(1, tenant)
            held[tenant] += 1
        assert shared.held == held.total() <= at_most
        assert shared.has(1, "newcomer") == (held.total() < at_most)
    assert Shared(None).has(10**9, "a")


async def test_a_client_with_many_requests_leaves_room_for_others() -> None:
    async with live(limit_concurrency=20) as served:
        posting = [asyncio.create_task(served.post(prompt="slow")) for _ in range(20)]
        await until(lambda: sum(task.done() for task in posting) == 2 and len(served.engine.handles) == 18)
        transport = httpx.AsyncHTTPTransport(local_address="127.0.0.2")
        async with httpx.AsyncClient(transport=transport, base_url=f"http://127.0.0.1:{served.port}") as other:
            for _ in range(3):
                assert (await other.post(GENERATIONS, json={"prompt": "a star"})).status_code == 200
        for handle in served.engine.handles:
            handle.cancel()
        assert {response.status_code for response in await asyncio.gather(*posting)} == {503}


def test_texts_are_counted_as_they_lie_in_memory() -> None:
    text = json.loads('"' + "x" * 10_000 + '\\ud83d\\ude00"')
    assert text_bytes(text, None) > 40_000
