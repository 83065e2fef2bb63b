"""The HTTP surface on a test double, over a real socket: read with OpenAI's client and with plain HTTP."""

import asyncio
import base64
import io
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import uvicorn
from openai.types import ImagesResponse
from PIL import Image

from tests.entrypoints.conftest import FakeEngine
from tetrion.engine.config import EngineConfig
from tetrion.engine.model_spec import ModelSpec
from tetrion.engine.request import EnergyOptions, ImageRequest
from tetrion.entrypoints import pictures
from tetrion.entrypoints.errors import InputError
from tetrion.entrypoints.http.app import create_app, parse_origin
from tetrion.entrypoints.http.body import MAX_BODY_BYTES
from tetrion.entrypoints.http.drawing import max_encoded_bytes
from tetrion.entrypoints.http.schema import GenerationBody
from tetrion.entrypoints.http.service import ImageService
from tetrion.entrypoints.http.store import PictureStore

GENERATIONS = "/v1/images/generations"


class Served:
    """A running server around a fake engine."""

    def __init__(self, engine: FakeEngine, service: ImageService, store: PictureStore, url: str) -> None:
        self.engine, self.service, self.store, self.url = engine, service, store, url
        self.http = httpx.AsyncClient(base_url=url, timeout=20)

    async def post(self, **body: Any) -> httpx.Response:
        return await self.http.post(GENERATIONS, json={"prompt": "a star"} | body)

    async def post_raw(self, content: Any, **headers: str) -> httpx.Response:
        named = {"content-type": "application/json"} | {key.replace("_", "-"): text for key, text in headers.items()}
        return await self.http.post(GENERATIONS, content=content, headers=named)


@asynccontextmanager
async def serving(
    store_bytes: int = 1 << 24,
    public_url: str | None = None,
    allowed_origins: tuple[str, ...] = (),
    spec: ModelSpec | None = None,
    **config: Any,
) -> AsyncIterator[Served]:
    sock = socket.create_server(("127.0.0.1", 0))
    store = PictureStore(store_bytes)
    async with FakeEngine(EngineConfig(devices="cpu:2", **config), spec=spec) as engine:
        service = ImageService(engine, store, public_url)  # type: ignore[arg-type]
        service.is_ready = True
        server = uvicorn.Server(uvicorn.Config(create_app(service, allowed_origins), lifespan="off", log_config=None))
        task = asyncio.create_task(server.serve([sock]))
        served = Served(engine, service, store, f"http://127.0.0.1:{sock.getsockname()[1]}")
        try:
            yield served
        finally:
            await served.http.aclose()
            server.should_exit = True
            await task


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    async with serving() as running:
        yield running


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def error_of(response: httpx.Response) -> dict[str, Any]:
    assert response.headers["content-type"] == "application/json" and response.headers["x-request-id"]
    body = response.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    return body["error"]


async def test_the_openai_client_draws(served: Served) -> None:
    async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none") as client:
        response = await client.images.generate(
            model="shapes",
            prompt="a red circle",
            n=2,
            size="256x256",
            quality="high",
            response_format="b64_json",
            user="someone",
            extra_body={
                "seed": 7,
                "num_inference_steps": 3,
                "guidance_scale": 2.5,
                "slo_ms": 900,
                "priority": 2,
                "negative_prompt": "blue",
                "true_cfg_scale": 2.0,
                "made_up": {"deep": [1]},
            },
        )
    assert response.data is not None and [item.seed for item in response.data] == [7, 8]  # type: ignore[attr-defined]
    for item in response.data:
        assert item.b64_json is not None
        seed = item.seed  # type: ignore[attr-defined]
        assert (pixels(base64.b64decode(item.b64_json)) == (seed, 0, 128)).all()
    assert response.size == "256x256" and response.output_format == "png" and response.background == "opaque"
    assert response.usage is not None
    assert (response.usage.input_tokens, response.usage.output_tokens, response.usage.total_tokens) == (3, 512, 515)
    sent = served.engine.handles[0].request
    assert (sent.num_steps, sent.guidance, sent.slo_ms, sent.priority) == (3, 2.5, 900, 2)


@pytest.mark.parametrize("body", [{}, {"n": 3}, {"response_format": "url"}, {"output_format": "jpeg"}, {"slo_ms": 100}])
async def test_the_body_is_strictly_of_the_clients_own_type(served: Served, body: dict[str, Any]) -> None:
    response = await served.post(**body)
    assert response.status_code == 200 and response.headers["content-type"] == "application/json"
    parsed = ImagesResponse.model_validate_json(response.content, strict=True)
    assert parsed.data is not None and len(parsed.data) == body.get("n", 1)


async def test_each_picture_has_a_receipt(served: Served) -> None:
    (picture,) = (await served.post(seed=5, slo_ms=100, num_inference_steps=3)).json()["data"]
    assert picture.pop("b64_json")
    energy = picture.pop("energy")
    assert energy["active_j"] is None and energy["method"] == "none" and energy["reasons"]["active_j"]
    deliver_s = picture.pop("deliver_s")
    assert deliver_s > 0 and picture.pop("latency_s") == 0.5 + deliver_s
    assert picture == {
        "request_id": "r0",
        "seed": 5,
        "num_inference_steps": 3,
        "degrees": [1, 2, 2],
        "queue_s": 0.1,
        "encode_s": 0.1,
        "denoise_s": 0.2,
        "decode_s": 0.1,
        "slo_met": False,
    }


@pytest.mark.parametrize(("output_format", "pillow_name"), [("png", "PNG"), ("webp", "WEBP"), ("jpeg", "JPEG")])
async def test_output_formats(served: Served, output_format: str, pillow_name: str) -> None:
    body = (await served.post(output_format=output_format, size="128x256", seed=0)).json()
    picture = Image.open(io.BytesIO(base64.b64decode(body["data"][0]["b64_json"])))
    assert (picture.format, picture.size, body["output_format"]) == (pillow_name, (128, 256), output_format)


async def test_sizes(served: Served) -> None:
    for body, size in (
        ({"size": "auto"}, "256x256"),
        ({"size": None}, "256x256"),
        ({"width": 512}, "512x256"),
        ({"width": 128, "height": 512}, "128x512"),
        ({"size": "128x128", "width": 128}, "128x128"),
    ):
        assert (await served.post(**body)).json()["size"] == size


async def test_seeds_are_drawn_at_random_and_count_up(served: Served) -> None:
    seeds = [[item["seed"] for item in (await served.post(n=2)).json()["data"]] for _ in range(2)]
    assert seeds[0] != seeds[1] and all(b == a + 1 < 2**32 for a, b in seeds)


async def test_pictures_by_url(served: Served) -> None:
    response = await served.post(response_format="url", n=2, seed=9, output_format="webp")
    urls = [item["url"] for item in response.json()["data"]]
    assert len(set(urls)) == 2 and all(url.startswith(f"{served.url}/v1/images/files/") for url in urls)
    fetched = await served.http.get(urls[1])
    assert fetched.status_code == 200 and fetched.headers["content-type"] == "image/webp"
    assert Image.open(io.BytesIO(fetched.content)).size == (256, 256)
    assert served.store.used_bytes == len(fetched.content) + len((await served.http.get(urls[0])).content)
    assert error_of(await served.http.get("/v1/images/files/guess.png"))["code"] == "not_found"


async def test_urls_behind_a_proxy() -> None:
    async with serving(public_url="https://pictures.example/") as served:
        url = (await served.post(response_format="url")).json()["data"][0]["url"]
        assert url.startswith("https://pictures.example/v1/images/files/")


async def test_a_full_store_refuses_urls_but_not_b64() -> None:
    room = max_encoded_bytes(ImageRequest(prompt="a star", width=256, height=256))
    async with serving(store_bytes=room) as served:
        assert (await served.post(response_format="url")).status_code == 200
        refused = await served.post(response_format="url")
        error = error_of(refused)
        assert (refused.status_code, error["param"], error["code"]) == (503, "response_format", "picture_store_full")
        assert 3500 < int(refused.headers["retry-after"]) <= 3600 and refused.headers["x-should-retry"] == "false"
        too_many = await served.post(response_format="url", n=2)
        assert (too_many.status_code, error_of(too_many)["param"]) == (400, "n")
        assert (await served.post()).status_code == 200
        assert served.engine.handles[1].is_cancelled


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({"prompt": None}, "prompt", "must be text"),
        ({"prompt": ""}, "prompt", "must not be empty"),
        ({"prompt": "x" * 32_001}, "prompt", "at most 32000"),
        ({"n": 0}, "n", "from 1 to 10"),
        ({"n": 11}, "n", "from 1 to 10"),
        ({"n": 2.5}, "n", "whole number from 1 to 10, got 2.5"),
        ({"n": "2"}, "n", "whole number from 1 to 10"),
        ({"n": True}, "n", "whole number from 1 to 10"),
        ({"model": ["flux"]}, "model", "must be text"),
        ({"width": "256"}, "width", "whole number and a multiple of 16"),
        ({"size": "100x100"}, "size", "multiple of 16 from 128 to 512"),
        ({"size": "1024x1024"}, "size", "multiple of 16 from 128 to 512"),
        ({"size": "large"}, "size", "expected WIDTHxHEIGHT"),
        ({"size": 256}, "size", "must be text"),
        ({"size": "256x256", "width": 128}, "size", "contradicts"),
        ({"width": 100}, "width", "multiple of 16"),
        ({"height": -16}, "height", "from 128 to 512"),
        ({"seed": -1}, "seed", "from 0 to"),
        ({"seed": 3.5}, "seed", "whole number from 0 to 9223372036854775807, got 3.5"),
        ({"seed": 1e30}, "seed", "from 0 to"),
        ({"seed": "3"}, "seed", "whole number from 0 to"),
        ({"seed": []}, "seed", "whole number from 0 to"),
        ({"seed": 2**63}, "seed", "from 0 to"),
        ({"seed": 10**30}, "seed", ""),
        ({"seed": 2**63 - 1, "n": 2}, "seed", "from 0 to"),
        ({"num_inference_steps": 0}, "num_inference_steps", "from 1 to 1000"),
        ({"num_inference_steps": 1001}, "num_inference_steps", "from 1 to 1000"),
        ({"guidance_scale": -1}, "guidance_scale", "from 0 to 100"),
        ({"negative_prompt": "blue"}, "negative_prompt", "takes a true_cfg_scale above 1"),
        ({"true_cfg_scale": 3}, "true_cfg_scale", "takes a negative_prompt"),
        ({"slo_ms": 0}, "slo_ms", "above 0"),
        ({"priority": 10**9}, "priority", "from -1000000 to 1000000"),
        ({"energy": "least-energy"}, "energy", "must be an EnergyOptions"),
        ({"energy": {"mode": "cheap"}}, "energy.mode", "'cheap'"),
        ({"energy": {"budget_j": 0}}, "energy.budget_j", "above 0"),
        ({"energy": {"joules": 5}}, "energy", "unknown key 'joules', known are mode and budget_j"),
        ({"response_format": "file"}, "response_format", "'file'"),
        ({"output_format": "gif"}, "output_format", "'gif'"),
        ({"output_compression": 101, "output_format": "webp"}, "output_compression", "from 0 to 100"),
        ({"output_compression": 50}, "output_compression", "png is lossless"),
        ({"stream": True, "response_format": "url"}, "response_format", "as b64_json"),
        ({"partial_images": 4}, "partial_images", "from 0 to 3"),
        ({"stream": "yes"}, "stream", "expected `bool"),
        ({"user": "x" * 257}, "user", "at most 256"),
    ],
)
async def test_bad_values_name_the_field(served: Served, body: dict[str, Any], param: str, says: str) -> None:
    response = await served.post(**body)
    error = error_of(response)
    assert (response.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert error["message"].startswith(f"{param}: ") and says in error["message"]
    assert all(handle.is_cancelled for handle in served.engine.handles)


async def test_whole_numbers_as_tables_write_them_and_nulls(served: Served) -> None:
    floats = {"n": 2.0, "seed": 7.0, "num_inference_steps": 3.0, "width": 256.0, "height": 128.0, "priority": 2.0}
    response = await served.post(**floats)
    assert [picture["seed"] for picture in response.json()["data"]] == [7, 8]
    assert (await served.post(output_compression=100.0, size="256x128", **floats)).status_code == 200
    sent = served.engine.handles[0].request
    assert (sent.num_steps, sent.width, sent.height, sent.priority) == (3, 256, 128, 2)
    optional = [name for name in GenerationBody.__struct_fields__ if name != "prompt"]
    assert (await served.post(**dict.fromkeys(optional))).status_code == 200


@pytest.mark.parametrize("content", [b"", b"{", b"{'prompt': 1}", b"\xff\xfe", b'{"a":' + b"[" * 100_000])
async def test_malformed_json(served: Served, content: bytes) -> None:
    response = await served.post_raw(content)
    assert (response.status_code, error_of(response)["code"]) == (400, "invalid_json")


async def test_a_body_that_is_no_object_and_one_without_prompt(served: Served) -> None:
    response = await served.post_raw(b"[1]")
    assert (response.status_code, error_of(response)["param"]) == (400, None)
    response = await served.post_raw(b"{}")
    assert (response.status_code, error_of(response)["param"]) == (400, "prompt")
    response = await served.post_raw(rb'{"prompt": "\ud800"}')
    assert response.status_code == 400 and error_of(response)


async def test_a_body_too_large(served: Served) -> None:
    async def endless() -> AsyncIterator[bytes]:
        for _ in range(40):
            yield b" " * 65_536

    for content in (b" " * (MAX_BODY_BYTES + 1), endless()):
        response = await served.post_raw(content)
        assert (response.status_code, error_of(response)["code"]) == (413, "body_too_large")


async def test_unknown_paths_and_methods(served: Served) -> None:
    for method, path, status, code in (
        ("GET", "/", 404, "unknown_url"),
        ("GET", "/v1/models/", 404, "model_not_found"),
        ("POST", "/v1/images/variations", 404, "unknown_url"),
        ("GET", "/v1/images/edits", 405, "method_not_allowed"),
        ("GET", GENERATIONS, 405, "method_not_allowed"),
        ("DELETE", "/health", 405, "method_not_allowed"),
    ):
        response = await served.http.request(method, path)
        assert (response.status_code, error_of(response)["code"]) == (status, code)
    assert response.headers["allow"]


async def test_overload_asks_to_come_back_unless_there_is_a_deadline(served: Served) -> None:
    response = await served.post(prompt="full")
    assert (response.status_code, error_of(response)["type"]) == (429, "rate_limit_error")
    assert response.headers["retry-after"] == "1" and "x-should-retry" not in response.headers
    response = await served.post(prompt="full", slo_ms=100)
    assert response.status_code == 429 and response.headers["x-should-retry"] == "false"
    assert "retry-after" not in response.headers


async def test_a_failed_generation_is_an_error_object(served: Served) -> None:
    response = await served.post(prompt="fail")
    error = error_of(response)
    assert (response.status_code, error["type"], error["code"]) == (500, "server_error", "generation_failed")
    assert "worker 1 was lost" in error["message"]


async def test_a_defect_tells_nothing_of_itself(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    response = await served.post(prompt="crash")
    assert response.status_code == 500 and error_of(response)["code"] == "internal_error"
    assert "secret detail" not in response.text and "Traceback" not in response.text
    assert "secret detail" in caplog.text


async def test_the_clients_errors_are_filled_in(served: Served) -> None:
    async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        with pytest.raises(openai.BadRequestError) as bad:
            await client.images.generate(prompt="a star", n=99)
        with pytest.raises(openai.RateLimitError) as full:
            await client.images.generate(prompt="full")
        with pytest.raises(openai.NotFoundError):
            await client.models.retrieve("dall-e-9")
    assert (bad.value.param, bad.value.type, bad.value.code) == ("n", "invalid_request_error", "invalid_value")
    assert full.value.code == "engine_overloaded" and bad.value.request_id


async def test_a_hopeless_deadline_is_refused_with_one_that_is_not(served: Served) -> None:
    async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none") as client:
        with pytest.raises(openai.RateLimitError) as refused:
            await client.images.generate(prompt="hopeless", extra_body={"slo_ms": 5}, user="gold")
    error = refused.value
    assert (error.param, error.code) == ("slo_ms", "deadline_unmeetable") and "slo_ms: 5 cannot be met" in error.message
    assert error.body["earliest_slo_ms"] == 1234.0  # type: ignore[index]
    assert error.response.headers["x-should-retry"] == "false"


async def test_an_energy_budget_is_refused_with_the_cheapest_plan(served: Served) -> None:
    async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none") as client:
        energy = {"mode": "least-energy", "budget_j": 5}
        with pytest.raises(openai.BadRequestError) as refused:
            await client.images.generate(prompt="a dear star", extra_body={"energy": energy})
        await client.images.generate(prompt="a star", extra_body={"energy": energy})
    error = refused.value
    assert (error.param, error.code) == ("energy.budget_j", "energy_budget_unmeetable")
    assert "5 J cannot be met: the cheapest plan takes 9 J in 2 s" in error.message
    cheapest = {"joules": 9, "seconds": 2, "degrees": [2, 1, 1], "uncounted": [], "in_time": None}
    assert error.body["cheapest_plan"] == cheapest  # type: ignore[index]
    assert served.engine.handles[-1].request.energy == EnergyOptions(mode="least-energy", budget_j=5)


async def test_the_user_is_not_the_tenant(served: Served) -> None:
    async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none") as client:
        await client.images.generate(prompt="a star", user="gold")
    request = served.engine.handles[-1].request
    assert (request.tenant, request.user) == ("ip:127.0.0.1", "gold")


async def test_the_model_is_the_one_that_the_body_names() -> None:
    async with serving(models=("flux", "sd3"), model_aliases={"gpt-image-1": "sd3"}) as served:
        for named, drew in ((None, "flux"), ("flux", "flux"), ("sd3", "sd3"), ("gpt-image-1", "sd3")):
            response = (await served.post(**({} if named is None else {"model": named}), n=2)).json()
            assert response["model"] == drew and "warnings" not in response
            assert [handle.request.model for handle in served.engine.handles[-2:]] == [drew, drew]


async def test_several_models_are_listed_and_no_other_is_found() -> None:
    async with serving(models=("flux", "sd3"), model_aliases={"a/b": "sd3"}) as served:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none") as client:
            assert [model.id async for model in client.models.list()] == ["flux", "sd3"]
            assert (await client.models.retrieve("a/b")).id == "sd3"
            for ask in (client.models.retrieve("dall-e-3"), client.images.generate(prompt="a", model="dall-e-3")):
                with pytest.raises(openai.NotFoundError) as refused:
                    await ask
                assert (refused.value.param, refused.value.code) == ("model", "model_not_found")
                assert "'dall-e-3' is not served here; served: flux, sd3" in refused.value.message
        assert (await served.http.get("/ready")).json()["models"] == ["flux", "sd3"]
        assert not served.engine.handles


async def test_a_server_of_one_model_draws_under_any_name_and_says_so(served: Served) -> None:
    async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none") as client:
        response = await client.images.generate(prompt="a star", model="dall-e-3")
    assert response.model == "shapes"  # type: ignore[attr-defined]
    (warning,) = response.warnings  # type: ignore[attr-defined]
    assert warning.startswith("model: 'dall-e-3' is not served here; shapes drew")
    refused = await served.post(model=3)
    assert refused.status_code == 400 and error_of(refused)["param"] == "model"


async def test_models_health_and_ready(served: Served) -> None:
    async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none") as client:
        assert [model.id async for model in client.models.list()] == ["shapes"]
        assert (await client.models.retrieve("shapes")).owned_by == "tetrion"
    assert (await served.http.get("/health")).json() == {"status": "ok"}
    ready = (await served.http.get("/ready")).json()
    assert ready["status"] == "ready" and ready["models"] == ["shapes"] and ready["num_alive"] == 2
    assert ready["roles"] == "all"


async def test_a_server_is_not_ready_while_nobody_serves_a_stage(served: Served) -> None:
    served.engine.unserved = ("encode",)
    response = await served.http.get("/ready")
    assert (response.status_code, error_of(response)["code"]) == (503, "not_ready")
    assert "No device that serves encode" in error_of(response)["message"]
    assert 'tetrion_stage_served{stage="encode"} 0.0' in (await served.http.get("/metrics")).text
    served.engine.unserved = ()
    assert 'tetrion_stage_served{stage="encode"} 1.0' in (await served.http.get("/metrics")).text


async def test_before_the_engine_is_ready(served: Served) -> None:
    served.service.is_ready = False
    assert (await served.http.get("/health")).status_code == 200
    for response in (await served.http.get("/ready"), await served.post()):
        assert (response.status_code, error_of(response)["code"]) == (503, "not_ready")
        assert response.headers["retry-after"] == "1"


async def test_a_dead_engine_is_not_ready(served: Served) -> None:
    served.engine.die()
    assert (await served.http.get("/metrics")).status_code == 200
    assert (await served.http.get("/health")).status_code == 503
    for response in (await served.http.get("/ready"), await served.post()):
        assert (response.status_code, error_of(response)["code"]) == (503, "not_ready")


async def test_without_a_worker_the_server_is_not_healthy_until_one_is_back(served: Served) -> None:
    served.engine.num_alive = 0
    response = await served.http.get("/health")
    assert (response.status_code, error_of(response)["code"], response.headers["retry-after"]) == (
        503,
        "no_worker",
        "5",
    )
    assert error_of(response)["type"] == "server_error"
    assert (await served.http.get("/ready")).status_code == 503
    assert (await served.post()).status_code == 200, "requests wait for a worker"
    served.engine.num_alive = 1
    assert (await served.http.get("/health")).json() == {"status": "ok"}


async def test_request_ids(served: Served) -> None:
    own = await served.http.get("/health", headers={"x-request-id": "my-id.1"})
    assert own.headers["x-request-id"] == "my-id.1"
    given = [{"x-request-id": "spaces and <tags>"}, {"x-request-id": "x" * 101}, {}]
    ids = [(await served.http.get("/health", headers=headers)).headers["x-request-id"] for headers in given]
    assert len(set(ids)) == 3 and all(name.startswith("req_") for name in ids)


def preflight(origin: str, method: str = "POST", headers: str = "authorization,content-type") -> dict[str, str]:
    asks = {"access-control-request-method": method, "access-control-request-headers": headers}
    return {"origin": origin} | asks


async def test_pages_of_other_origins_get_no_answer_by_default(served: Served) -> None:
    refused = await served.http.options(GENERATIONS, headers=preflight("http://localhost:3000"))
    assert refused.status_code == 405
    answered = await served.http.get("/v1/models", headers={"origin": "http://localhost:3000"})
    assert answered.status_code == 200 and not any(name.startswith("access-control") for name in answered.headers)


async def test_pages_of_allowed_origins_may_ask_and_read() -> None:
    ours, theirs = "http://localhost:3000", "https://elsewhere.example"
    async with serving(allowed_origins=(ours, "http://b")) as served:
        asked = await served.http.options(GENERATIONS, headers=preflight(ours))
        assert asked.status_code == 200 and asked.headers["access-control-allow-origin"] == ours
        assert "POST" in asked.headers["access-control-allow-methods"]
        assert "authorization" in asked.headers["access-control-allow-headers"]
        refused = await served.http.options(GENERATIONS, headers=preflight(theirs))
        assert refused.status_code == 400 and "access-control-allow-origin" not in refused.headers
        posts = (
            ({"prompt": "a star"}, 200),
            ({"prompt": ""}, 400),
            ({"prompt": "full"}, 429),
            ({"prompt": "crash"}, 500),
        )
        for body, status in posts:
            response = await served.http.post(GENERATIONS, json=body, headers={"origin": ours})
            assert response.status_code == status and response.headers["access-control-allow-origin"] == ours
            assert "x-request-id" in response.headers["access-control-expose-headers"]
        other = await served.http.post(GENERATIONS, json={"prompt": "a"}, headers={"origin": theirs})
        assert other.status_code == 200 and "access-control-allow-origin" not in other.headers
    async with serving(allowed_origins=("*",)) as served:
        asked = await served.http.options(GENERATIONS, headers=preflight(theirs))
        assert asked.status_code == 200 and asked.headers["access-control-allow-origin"] == "*"
        assert "access-control-allow-credentials" not in asked.headers


def test_origins_are_read_as_browsers_write_them() -> None:
    for text, origin in (
        ("*", "*"),
        ("null", "null"),
        ("http://localhost:3000/", "http://localhost:3000"),
        ("HTTPS://Example.ORG:443", "https://example.org"),
        ("http://[::1]:80", "http://[::1]"),
    ):
        assert parse_origin(text) == origin
    for text in ("", "localhost:3000", "http://", "http://a/b", "http://a?b", "http://u@a", "http://a:x", "http://a:99999",
                 "ftp://a", "http://*.a", "http://ä", "http://a http://b", "http://[::1", "a" * 9999):  # fmt: skip
        with pytest.raises(InputError, match="allow_origin: expected an origin such as") as caught:
            parse_origin(text)
        assert len(str(caught.value)) < 300


async def test_a_closed_connection_cancels_its_requests(served: Served) -> None:
    body = json.dumps({"prompt": "slow", "n": 3}).encode()
    _, writer = await asyncio.open_connection(*served.url.removeprefix("http://").split(":"))
    writer.write(
        b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s"
        % (GENERATIONS.encode(), len(body), body)
    )
    await wait_until(lambda: len(served.engine.handles) == 3)
    assert not any(handle.is_cancelled for handle in served.engine.handles)
    writer.close()
    await wait_until(lambda: all(handle.is_cancelled for handle in served.engine.handles))
    assert (await served.post()).status_code == 200


async def test_one_failed_picture_cancels_its_siblings(served: Served) -> None:
    task = asyncio.create_task(served.post(prompt="slow", n=2))
    await wait_until(lambda: len(served.engine.handles) == 2)
    served.engine.handles[0].cancel()
    response = await task
    assert (response.status_code, error_of(response)["code"]) == (503, "cancelled")
    assert served.engine.handles[1].is_cancelled


async def wait_until(condition: Any) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


def test_no_encoding_needs_more_room_than_is_reserved() -> None:
    for size in (128, 256):
        image = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
        request = ImageRequest(prompt="ж" * 32_000, width=size, height=size)
        text = {"prompt": request.prompt, "model": "m" * 200}
        for picture_format in ("png", "webp", "jpeg"):
            encoded = pictures.encode(image, picture_format, 100 if picture_format != "png" else None, text)
            assert len(encoded) <= max_encoded_bytes(request)
