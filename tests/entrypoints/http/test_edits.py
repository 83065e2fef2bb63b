"""`POST /v1/images/edits` on a test double, over a real socket: OpenAI's client, JSON, and what strangers send."""

import base64
import io
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from tests.entrypoints.conftest import BEGINNER, EDITOR
from tests.entrypoints.http.test_app import Served, error_of, serving
from tetrion.entrypoints.http.body import MAX_FORM_BYTES

EDITS = "/v1/images/edits"


def png(width: int = 64, height: int = 32, value: int = 100, alpha: int | None = None) -> bytes:
    layers = [value] * 3 + ([] if alpha is None else [alpha])
    file = io.BytesIO()
    Image.fromarray(np.full((height, width, len(layers)), layers, np.uint8)).save(file, "PNG")
    return file.getvalue()


def data_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


@pytest.fixture
async def editor() -> AsyncIterator[Served]:
    async with serving(spec=EDITOR) as running:
        yield running


@pytest.fixture
async def beginner() -> AsyncIterator[Served]:
    async with serving(spec=BEGINNER) as running:
        yield running


async def test_the_openai_client_edits_one_or_many(editor: Served) -> None:
    async with openai.AsyncOpenAI(base_url=f"{editor.url}/v1", api_key="none") as client:
        one = await client.images.edit(
            model="editor", image=("a.png", png()), prompt="make it blue", n=2, size="256x128", user="someone",
            output_format="webp", output_compression=80, extra_body={"seed": 7, "num_inference_steps": 3},
        )  # fmt: skip
        many = await client.images.edit(image=[("a.png", png()), ("b.png", png(64, 64))], prompt="both")
    assert one.data is not None and [item.seed for item in one.data] == [7, 8]  # type: ignore[attr-defined]
    assert one.output_format == "webp" and one.size == "256x128" and one.data[0].b64_json
    assert one.usage is not None and one.usage.input_tokens_details.image_tokens == 192 * 192 // 256
    assert many.data is not None and len(many.data) == 1
    first, _, both = [handle.request for handle in editor.engine.handles]
    assert [picture.size for picture in first.pictures] == [(192, 192)], "the known size nearest in shape"
    assert len(both.pictures) == 2 and first.num_steps == 3 and first.user == "someone"


async def test_a_mask_and_a_strength(beginner: Served) -> None:
    async with openai.AsyncOpenAI(base_url=f"{beginner.url}/v1", api_key="none") as client:
        await client.images.edit(
            image=png(256, 128), mask=png(256, 128, alpha=0), prompt="more", extra_body={"strength": 0.75}
        )
    (request,) = [handle.request for handle in beginner.engine.handles]
    assert request.strength == 0.75 and (request.mask == 255).all()
    assert (request.width, request.height) == (256, 128), "as large as the picture"


async def test_json_brings_pictures_as_data_urls(editor: Served) -> None:
    url = data_url(png())
    for value in ({"image": url}, {"image": [url]}, {"images": [{"image_url": url}]}, {"images": [url, url]}):
        response = await editor.http.post(EDITS, json={"prompt": "a star", "seed": 3, **value})
        assert response.status_code == 200, response.text
        assert response.json()["data"][0]["seed"] == 3
    assert [len(handle.request.pictures) for handle in editor.engine.handles] == [1, 1, 1, 2]


async def test_numbers_of_forms_are_numbers(editor: Served) -> None:
    fields = {"prompt": "3", "n": "1", "seed": "4", "slo_ms": "900.5", "guidance_scale": "2", "stream": "False"}
    fields |= {"energy[budget_j]": "500", "energy[mode]": "balanced", "made_up": "x", "width": ""}
    response = await editor.http.post(EDITS, data=fields, files={"image": png()})
    assert response.status_code == 200, response.text
    request = editor.engine.handles[0].request
    assert (request.prompt, request.seed, request.slo_ms, request.guidance) == ("3", 4, 900.5, 2.0)
    assert (request.energy.budget_j, request.energy.mode) == (500, "balanced")


async def test_a_model_that_takes_no_pictures_says_so() -> None:
    async with serving() as served:
        response = await served.http.post(EDITS, data={"prompt": "a star"}, files={"image": png()})
        assert response.status_code == 400
        error = error_of(response)
        assert error["message"] == "image: is no input of model 'shapes'" and error["param"] == "image"


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({}, "image", "image: is required"),
        ({"image": "http://127.0.0.1/a.png"}, "image", "nothing is fetched from other URLs"),
        ({"image": "file:///etc/passwd"}, "image", "must be a data URL"),
        ({"image": "/etc/passwd"}, "image", "must be a data URL"),
        ({"image": {"file_id": "a"}}, "image", "must be a data URL"),
        ({"image": "data:image/png;base64,@@"}, "image", "is not valid base64"),
        ({"image": data_url(b"GIF89a")}, "image", "is no PNG or JPEG or WEBP file"),
        ({"image": [data_url(png())] * 3}, "image", "has 3 pictures, at most 2 are taken"),
        ({"image": [data_url(png())] * 17}, "image", "has 17 pictures, at most 16 are read"),
        ({"image": data_url(png()), "images": data_url(png())}, "images", "image are both given"),
        ({"image": data_url(png()), "mask": data_url(png())}, "mask", "is no input of model"),
        ({"image": data_url(png()), "prompt": None}, "prompt", "must be text"),
        ({"image": data_url(png()), "n": 0}, "n", "must be from 1 to 10"),
        ({"image": data_url(png()), "strength": 2}, "strength", "must be"),
    ],
)
async def test_bad_json_is_refused_by_field(editor: Served, fields: dict[str, Any], param: str, says: str) -> None:
    response = await editor.http.post(EDITS, json={"prompt": "a star", **fields})
    assert response.status_code == 400 and error_of(response)["param"] == param
    assert says in error_of(response)["message"]
    assert not editor.engine.handles


async def test_no_path_is_opened_whatever_a_client_writes(editor: Served, tmp_path: Path) -> None:
    """A form's text, a file's name, a file that holds a path: none is one."""
    secret = tmp_path / "secret.png"
    secret.write_bytes(png())
    path = str(secret)
    tries: list[dict[str, Any]] = [
        {"data": {"prompt": "a", "image": path}, "files": {"other": b""}},
        {"data": {"prompt": "a"}, "files": {"image": (path, b"")}},
        {"data": {"prompt": "a"}, "files": {"image": (path, path.encode())}},
        {"json": {"prompt": "a", "image": path}},
        {"json": {"prompt": "a", "pictures": [path]}},
        {"json": {"prompt": "a", "image": data_url(path.encode())}},
    ]
    for sent in tries:
        response = await editor.http.post(EDITS, **sent)
        assert response.status_code == 400 and error_of(response)["param"] == "image"
    response = await editor.http.post("/v1/images/generations", json={"prompt": "a", "pictures": [path], "image": path})
    assert response.status_code == 200 and not editor.engine.handles[0].request.pictures


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-origin"}, 200),
        ({"origin": "https://friend.example"}, 200),
    ],
)
async def test_pages_of_other_origins_post_no_forms(headers: dict[str, str], status: int) -> None:
    async with serving(spec=EDITOR, allowed_origins=("https://friend.example",)) as served:
        sent = {"data": {"prompt": "a star"}, "files": {"image": png()}, "headers": headers}
        response = await served.http.post(EDITS, **sent)  # type: ignore[arg-type]
        assert response.status_code == status, response.text
        own = await served.http.post(EDITS, **(sent | {"headers": {"origin": served.url}}))  # type: ignore[arg-type]
        assert own.status_code == 200


async def test_bodies_have_a_bound_and_a_type(editor: Served) -> None:
    headers = {"content-type": "multipart/form-data; boundary=x"}
    response = await editor.http.post(EDITS, content=b"a", headers={"content-type": "text/plain"})
    assert response.status_code == 415 and "multipart/form-data" in error_of(response)["message"]
    response = await editor.http.post(EDITS, content=b"a", headers={"content-type": "multipart/form-data"})
    assert response.status_code == 400 and error_of(response)["code"] == "invalid_form"

    async def endless() -> AsyncIterator[bytes]:
        for _ in range(MAX_FORM_BYTES // (1 << 20) + 2):
            yield bytes(1 << 20)

    try:
        response = await editor.http.post(EDITS, content=endless(), headers=headers)
    except httpx.WriteError:
        return  # it was closed meanwhile
    assert response.status_code == 413
