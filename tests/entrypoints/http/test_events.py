"""Streams of events on the real door: each picture as it is done, by whoever reads, goes away, or is cut off."""

import asyncio
import base64
import io
import json
import os
import signal
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.entrypoints.conftest import draw
from tests.entrypoints.http.live import GENERATIONS, Live, head, live, until
from tetrion.entrypoints.http import events

Event = tuple[str, dict[str, Any]]


def parse(text: str) -> list[Event]:
    """The events of a whole stream; comments left out."""
    found = []
    for block in text.split("\n\n"):
        lines = [line for line in block.splitlines() if line and not line.startswith(":")]
        if lines:
            fields = dict(line.split(": ", 1) for line in lines)
            assert list(fields) == ["event", "data"]
            found.append((fields["event"], json.loads(fields["data"])))
    return found


def post(**body: Any) -> bytes:
    data = json.dumps({"prompt": "noise", "seed": 1, "stream": True} | body).encode()
    return head("POST", GENERATIONS, f"content-length: {len(data)}") + data


async def outcomes(served: Live) -> dict[str, float]:
    prefix = 'tetrion_pictures_total{model="shapes",outcome="'
    lines = [line for line in (await served.metrics()).splitlines() if line.startswith(prefix)]
    return {line.removeprefix(prefix).split('"')[0]: float(line.split()[-1]) for line in lines}


async def test_each_picture_is_an_event_with_all_that_an_answer_says_of_it() -> None:
    async with live() as served:
        fields = {"prompt": "noise a", "n": 3, "seed": 5, "size": "128x128"}
        answer = await served.post(**fields, stream=True)
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["cache-control"] == "no-store" and answer.text.startswith(": drawing\n\n")
        found = parse(answer.text)
        assert [name for name, _ in found] == ["image_generation.completed"] * 3
        in_one_piece = (await served.post(**fields)).json()
        assert sorted(event["index"] for _, event in found) == [0, 1, 2]
        for name, event in found:
            image = np.asarray(Image.open(io.BytesIO(base64.b64decode(event["b64_json"]))))
            assert np.array_equal(image, draw(served.engine.handles[event["index"]].request).image)
            assert event["seed"] == 5 + event["index"] and event["type"] == name and event["size"] == "128x128"
            picture = in_one_piece["data"][event["index"]]
            assert picture.keys() <= event.keys()
            assert event.keys() - picture.keys() == {
                *("type", "created_at", "background", "output_format", "quality", "size", "model", "index", "usage")
            }
        totals = [sum(event["usage"][name] for _, event in found) for name in ("input_tokens", "output_tokens")]
        assert totals == [in_one_piece["usage"]["input_tokens"], in_one_piece["usage"]["output_tokens"]]
        await until(lambda: sorted(served.engine.delivered_ids) == [f"r{i}" for i in range(6)])
        assert not served.engine.dropped_ids and await outcomes(served) == {"drawn": 6}


async def test_a_picture_is_sent_before_the_next_is_done() -> None:
    async with live() as served:
        body = {"prompt": "slow", "n": 2, "stream": True}
        async with served.http.stream("POST", GENERATIONS, json=body) as answer:
            lines = answer.aiter_lines()
            assert await anext(lines) == ": drawing", "before anything is drawn"
            served.engine.handles[1].finish()
            async for line in lines:
                if line.startswith("data: "):
                    break
            assert json.loads(line.removeprefix("data: "))["index"] == 1
            await until(lambda: served.engine.delivered_ids == ["r1"])
            served.engine.handles[0].finish()
            assert '"index":0' in "".join([line async for line in lines])


async def test_a_quiet_stream_is_kept_awake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "KEEP_AWAKE_S", 0.02)
    async with live() as served, served.http.stream("POST", GENERATIONS, json={"prompt": "slow", "stream": True}) as it:
        lines, comments = it.aiter_lines(), 0
        while comments < 4:
            comments += (await anext(lines)).startswith(":")
        served.engine.handles[0].finish()
        assert "completed" in "".join([line async for line in lines])


async def test_a_client_that_goes_away_cancels_what_it_has_not_got() -> None:
    async with live() as served:
        reader, writer = await served.open(post(prompt="slow", n=2))
        await reader.readuntil(b": drawing\n\n")
        served.engine.handles[0].finish()
        await reader.readuntil(b"\n\n")
        await until(lambda: served.engine.delivered_ids == ["r0"])
        writer.close()
        await until(lambda: served.engine.handles[1].is_cancelled)
        await until(lambda: "r1" in served.engine.dropped_ids)
        assert "r0" not in served.engine.delivered_ids[1:]
        assert await outcomes(served) == {"drawn": 1, "cancelled": 1}


async def test_what_fails_after_the_first_byte_is_an_event_and_the_last_one() -> None:
    async with live() as served:
        answer = await served.post(prompt="fail", n=2, stream=True)
        ((name, event),) = parse(answer.text)
        assert answer.status_code == 200 and name == event["type"] == "error"
        assert event["error"]["code"] == "generation_failed" and "worker 1 was lost" in event["error"]["message"]
        assert await outcomes(served) == {"failed": 2}


async def test_a_defect_is_an_event_without_its_details_and_gives_the_others_up() -> None:
    async with live() as served:
        reader, writer = await served.open(post(prompt="crash"))
        async with asyncio.timeout(10):
            served_text = await reader.read()
        writer.close()
        assert b'"code":"internal_error"' in served_text and b"secret" not in served_text
        await until(lambda: "r0" in served.engine.dropped_ids)
        assert await outcomes(served) == {"failed": 1}


async def test_what_is_wrong_from_the_start_is_an_answer_as_ever() -> None:
    async with live(max_n=2) as served:
        for fields, status, param in (
            ({"prompt": "full"}, 429, None),
            ({"size": "1x1"}, 400, "size"),
            ({"n": 3}, 400, "n"),
            ({"response_format": "url"}, 400, "response_format"),
            ({"partial_images": 4}, 400, "partial_images"),
            ({"partial_images": "1"}, 400, "partial_images"),
            ({"stream": "yes"}, 400, "stream"),
        ):
            answer = await served.post(**({"stream": True} | fields))
            assert answer.status_code == status and answer.json()["error"]["param"] == param, fields


async def test_previews_that_are_not_drawn_are_named() -> None:
    async with live() as served:
        ((_, event),) = parse((await served.post(stream=True, partial_images=2)).text)
        assert event["warnings"] == ["partial_images: no previews are drawn; a stream has each finished picture"]
        assert "warnings" not in (await served.post(partial_images=0)).json()


async def test_a_stream_that_is_cut_off_says_so() -> None:
    async with live() as served:
        reader, writer = await served.open(post(prompt="slow"))
        await reader.readuntil(b": drawing\n\n")
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.sleep(0.1)
        async with asyncio.timeout(10):
            assert b'"code":"cancelled"' in await reader.read()
        await until(lambda: served.engine.handles[0].is_cancelled)
        writer.close()


async def test_a_client_that_reads_slowly_gets_all_of_it_and_another_one_meanwhile_too() -> None:
    async with live() as served:
        reader, writer = await served.open(post(size="512x512", n=10))
        await until(lambda: len(served.engine.handles) == 10)
        assert (await served.post()).status_code == 200
        async with asyncio.timeout(20):
            data = b""
            while data.count(b"image_generation.completed\n") < 10 or not data.endswith(b"0\r\n\r\n"):
                data += await reader.read(1 << 18)
                await asyncio.sleep(0)
        writer.close()
        await until(lambda: len(served.engine.delivered_ids) == 11)


async def test_an_http_1_0_client_gets_a_stream_that_ends_with_the_connection() -> None:
    async with live() as served:
        data = json.dumps({"prompt": "a star", "stream": True}).encode()
        lines = [f"POST {GENERATIONS} HTTP/1.0", "host: localhost", "content-type: application/json"]
        request = "\r\n".join([*lines, f"content-length: {len(data)}", "", ""]).encode() + data
        assert b"event: image_generation.completed\ndata: {" in await served.raw(request)


async def test_editing_has_events_of_its_own_name() -> None:
    async with live() as served:
        png = io.BytesIO()
        Image.new("RGB", (128, 128)).save(png, "PNG")
        form = {"prompt": "a star", "stream": "true", "partial_images": "0"}
        answer = await served.http.post("/v1/images/edits", data=form, files={"image": ("a.png", png.getvalue())})
        if answer.status_code == 400:  # of a model that takes no pictures
            assert answer.json()["error"]["param"] == "image"
        else:
            assert [name for name, _ in parse(answer.text)] == ["image_edit.completed"]
