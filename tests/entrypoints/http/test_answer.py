"""Answers with pictures on the real door: whoever reads slowly, goes away amid them, asks for several or for files."""

import asyncio
import base64
import io
import json
import socket
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from tests.entrypoints.conftest import draw
from tests.entrypoints.http.live import GENERATIONS, Live, head, live, until
from tetrion.engine.request import ImageRequest
from tetrion.entrypoints import pictures
from tetrion.entrypoints.http import connections, schema
from tetrion.entrypoints.http.answer import NO_PICTURE, body_parts

NUM_LARGE = 10
LARGE = {"prompt": "noise", "size": "512x512", "n": NUM_LARGE}
"""More than fits into a socket whose client does not read: 10 MB."""
LARGE_IDS = [f"r{i}" for i in range(NUM_LARGE)]


def post(**body: Any) -> bytes:
    data = json.dumps({"prompt": "noise", "seed": 1} | body).encode()
    return head("POST", GENERATIONS, f"content-length: {len(data)}") + data


async def sample(served: Live, name: str, **labels: str) -> float:
    families = text_string_to_metric_families(await served.metrics())
    found = [s.value for family in families for s in family.samples if s.name == name and s.labels == labels]
    return found[0] if found else 0.0


@settings(deadline=None)
@given(st.lists(st.binary(max_size=50), max_size=4), st.text(max_size=60), st.booleans())
def test_parts_make_up_the_body(images: list[bytes], text: str, is_mean: bool) -> None:
    base64s = [base64.b64encode(picture) for picture in images]
    text = f'"b64_json":""{text}' if is_mean else text
    result = draw(ImageRequest(prompt="x", model=text, width=16, height=16, num_steps=1, seed=1))
    entries = [schema.describe_picture(result, 100.0, 0.25, schema.Picture, b64_json=NO_PICTURE) for _ in images]
    entries.insert(1, schema.describe_picture(result, None, 0.25, schema.Picture, url=f"http://h/{text}"))
    response = schema.GenerationResponse(
        created=1,
        background="opaque",
        output_format="png",
        quality="high",
        size="16x16",
        model=text,
        data=entries,
        usage=schema.usage(1, 1),
        warnings=(text,),
    )
    body = json.loads(b"".join(body_parts(response, base64s)))
    assert [item["b64_json"].encode() for item in body["data"] if "b64_json" in item] == base64s
    for item in body["data"]:
        item.pop("b64_json", None)
    whole = json.loads(msgspec.json.encode(response))
    for item in whole["data"]:
        item.pop("b64_json", None)
    assert body == whole


async def test_several_pictures_are_in_order_and_each_is_delivered_once() -> None:
    async with live() as served:
        response = await served.post(prompt="noise", n=4, seed=5, size="128x128")
        for i, item in enumerate(response.json()["data"]):
            image = np.asarray(Image.open(io.BytesIO(base64.b64decode(item["b64_json"]))))
            assert item["seed"] == 5 + i and np.array_equal(image, draw(served.engine.handles[i].request).image)
        await until(lambda: served.engine.delivered_ids == ["r0", "r1", "r2", "r3"])
        assert not served.engine.dropped_ids
        assert await sample(served, "tetrion_picture_deliver_seconds_count", format="png") == 4


async def test_each_of_several_pictures_is_encoded_as_it_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    encode, encoded = pictures.encode, list[int]()

    def noted(image: np.ndarray, *arguments: Any) -> bytes:
        encoded.append(int(image[0, 0, 0]))
        return encode(image, *arguments)

    monkeypatch.setattr(pictures, "encode", noted)
    async with live() as served:
        posting = asyncio.create_task(served.post(prompt="slow", n=2, seed=5))
        await until(lambda: len(served.engine.handles) == 2)
        first, second = served.engine.handles
        second.finish()
        await until(lambda: encoded == [6])
        assert not posting.done()
        first.finish()
        assert [item["seed"] for item in (await posting).json()["data"]] == [5, 6]
        assert encoded == [6, 5]


@pytest.mark.parametrize("picture_format", ["png", "jpeg", "webp"])
async def test_what_becomes_of_the_picture_is_known_to_the_engine(picture_format: str) -> None:
    async with live() as served:
        response = await served.post(output_format=picture_format, response_format="url")
        assert served.engine.handles[0].request.delivery == picture_format
        await until(lambda: served.engine.delivered_ids == ["r0"])
        url = response.json()["data"][0]["url"]
        picture = await served.http.get(url)
        assert Image.open(io.BytesIO(picture.content)).size == (256, 256)
        again = await served.http.get(url)
        assert again.content == picture.content and again.headers["content-type"] == f"image/{picture_format}"
        asked = await served.http.head(url)
        assert (asked.content, asked.headers["content-length"]) == (b"", str(len(picture.content)))
        assert served.engine.delivered_ids == ["r0"]
        assert await sample(served, "tetrion_picture_deliver_seconds_count", format=picture_format) == 1


async def test_a_picture_is_delivered_when_a_slow_client_has_room_for_its_last_byte() -> None:
    async with live() as served:
        sock = narrow_socket(served)
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(sock, post(**LARGE))
        await until(lambda: len(served.engine.handles) == NUM_LARGE)
        received = bytearray(await loop.sock_recv(sock, 1000))
        await asyncio.sleep(0.1)
        assert not served.engine.delivered_ids
        body = json.loads(await read_answer(loop, sock, received))
        assert len(body["data"]) == NUM_LARGE
        await until(lambda: served.engine.delivered_ids == LARGE_IDS)
        assert not served.engine.dropped_ids


def narrow_socket(served: Live) -> socket.socket:
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.connect(("127.0.0.1", served.port))
    sock.setblocking(False)
    return sock


async def read_answer(loop: asyncio.AbstractEventLoop, sock: socket.socket, received: bytearray) -> bytes:
    """The body of the answer that has begun with `received`."""
    async with asyncio.timeout(20):
        while b"\r\n\r\n" not in received:
            received += await loop.sock_recv(sock, 1 << 16)
        headers, _, body = bytes(received).partition(b"\r\n\r\n")
        length = int(headers.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        parts, num_bytes = [body], len(body)
        while num_bytes < length:
            part = await loop.sock_recv(sock, 1 << 20)
            assert part
            parts.append(part)
            num_bytes += len(part)
    assert num_bytes == length
    return b"".join(parts)


async def test_a_client_that_goes_away_amid_the_body_has_got_nothing() -> None:
    async with live() as served:
        for i in range(3):
            sock = narrow_socket(served)
            loop = asyncio.get_running_loop()
            await loop.sock_sendall(sock, post(**LARGE))
            await loop.sock_recv(sock, 1000)
            sock.close()
            await until(lambda i=i: len(served.engine.dropped_ids) == NUM_LARGE * (i + 1))  # type: ignore[misc]
        assert not served.engine.delivered_ids and len(set(served.engine.dropped_ids)) == 3 * NUM_LARGE
        assert (await served.post()).status_code == 200


async def test_a_client_that_is_cut_off_for_not_reading_has_got_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "SWEEP_S", 0.05)
    monkeypatch.setattr(connections, "SEND_WINDOW_S", 0.3)
    async with live() as served:
        sock = narrow_socket(served)
        await asyncio.get_running_loop().sock_sendall(sock, post(**LARGE))
        await until(lambda: served.engine.dropped_ids == LARGE_IDS)
        assert not served.engine.delivered_ids
        assert await sample(served, "tetrion_http_connections_closed_total", reason="send_timeout") == 1
        sock.close()


async def test_a_client_that_closes_once_it_has_read_all_has_got_its_picture() -> None:
    async with live() as served:
        loop = asyncio.get_running_loop()
        for i in range(20):
            sock = narrow_socket(served)
            await loop.sock_sendall(sock, post(size="256x256"))
            assert json.loads(await read_answer(loop, sock, bytearray()))["data"]
            sock.close()
            await until(lambda i=i: len(served.engine.delivered_ids) + len(served.engine.dropped_ids) == i + 1)  # type: ignore[misc]
        assert len(served.engine.delivered_ids) == 20


async def test_whoever_leaves_before_the_picture_is_drawn_gets_none() -> None:
    async with live() as served:
        _, writer = await served.open(post(prompt="slow", n=2))
        await until(lambda: len(served.engine.handles) == 2)
        writer.close()
        await until(lambda: len(served.engine.dropped_ids) == 2)
        assert all(handle.is_cancelled for handle in served.engine.handles)


async def test_many_large_pictures_at_once_come_whole() -> None:
    async with live() as served:
        answers = await asyncio.gather(*(served.post(prompt="noise", size="512x512", seed=i) for i in range(20)))
        for i, answer in enumerate(answers):
            picture = base64.b64decode(answer.json()["data"][0]["b64_json"])
            assert np.asarray(Image.open(io.BytesIO(picture))).shape == (512, 512, 3)
            assert answer.json()["data"][0]["seed"] == i
        await until(lambda: len(served.engine.delivered_ids) == 20)
