"""`tetrion serve` as a user runs it: the console command, real workers, OpenAI's own client over a loopback socket."""

import asyncio
import base64
import io
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import openai
import psutil
import pytest
from openai.types import ImagesResponse
from PIL import Image

TETRION = str(Path(sys.executable).with_name("tetrion"))
WITH_LITTLE_PATIENCE = """
import sys
import msgspec
from tetrion.engine.api import AsyncEngine
from tetrion.entrypoints.cli import run
sys.exit(run(sys.argv[1:], lambda config: AsyncEngine(msgspec.structs.replace(config, no_worker_timeout_s=5.0))))
"""
SIZES = ("128x128", "144x128", "128x160", "208x128", "160x144")


class Server:
    """A `tetrion serve` process that is ready."""

    def __init__(self, *arguments: str, program: tuple[str, ...] = (TETRION,)) -> None:
        command = [*program, "serve", "--port", "0", "--num-threads", "1", *arguments]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
        self.stderr: list[str] = []
        self._is_ready = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        if not self._is_ready.wait(200) or self.process.poll() is not None:
            self.process.kill()
            raise AssertionError("the server did not start:\n" + "".join(self.stderr))
        match = re.search(r"serving .* on (http://\S+)", "".join(self.stderr))
        assert match is not None
        self.url = match[1]

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.stderr.append(line)
            if line.startswith("serving "):
                self._is_ready.set()
        self._is_ready.set()

    def client(self, max_retries: int = 0) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=max_retries, timeout=300)

    def children(self) -> list[psutil.Process]:
        """Its fork server and workers."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def workers(self) -> list[psutil.Process]:
        (fork_server,) = psutil.Process(self.process.pid).children()
        return fork_server.children()

    def num_fds(self) -> int:
        return psutil.Process(self.process.pid).num_fds()

    def stop(self, signum: int = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signum)
        code = self.process.wait(90)
        self._reader.join(10)
        return code


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """Whatever the tests have asked of it and done to it, it ends well and leaves nothing behind."""
    running = Server("--devices", "cpu:2")
    try:
        yield running
        children = running.children()
        segments = named_segments([psutil.Process(running.process.pid), *children])
        assert running.stop() == 0
        assert not any("Traceback" in line for line in running.stderr)
        assert children and not psutil.wait_procs(children, timeout=20)[1]
        assert not [path for path in segments if path.exists()]
    finally:
        running.stop(signal.SIGKILL)


async def until_admitted(url: str, num_requests: int) -> None:
    """Until as many requests hold a state slot."""
    async with asyncio.timeout(60), httpx.AsyncClient() as http:
        while f"tetrion_requests_admitted {num_requests}.0\n" not in (await http.get(f"{url}/metrics")).text:
            await asyncio.sleep(0.01)


def named_segments(processes: list[psutil.Process]) -> set[Path]:
    """Shared memory with a name, which could outlive its processes, that any of `processes` maps."""
    maps = {entry.path for process in processes for entry in process.memory_maps()}
    return {Path(path) for path in maps if path.startswith("/dev/shm/") and not path.endswith(" (deleted)")}


def picture_of(response: ImagesResponse, index: int = 0) -> np.ndarray:
    assert response.data is not None
    data = response.data[index].b64_json
    assert data is not None
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


async def test_the_openai_client_draws_a_picture(server: Server) -> None:
    async with server.client() as client:
        response = await client.images.generate(
            model="shapes",
            prompt="a large red circle on a navy background",
            size="256x256",
            response_format="b64_json",
            extra_body={"seed": 7},
        )
    picture = picture_of(response)
    assert picture.shape == (256, 256, 3)
    red, navy = np.array([0xE5, 0x39, 0x35]), np.array([0x0D, 0x1B, 0x4C])
    assert np.abs(picture[4:12, 4:12].astype(int) - navy).mean() < 30
    assert 0.08 < (np.abs(picture.astype(int) - red) <= 40).all(axis=2).mean() < 0.25
    assert response.usage is not None and response.usage.output_tokens == 256
    async with asyncio.timeout(10):
        while not any("drew shapes 256x256, 16 steps at degree" in line for line in server.stderr):
            await asyncio.sleep(0.01)
    assert any(line.startswith("  shapes: ") and "pixels a side" in line for line in server.stderr)


async def test_the_openai_client_streams_pictures(server: Server) -> None:
    async with server.client() as client:
        stream = await client.images.generate(
            prompt="a red circle", size="128x128", n=2, stream=True, partial_images=0, extra_body={"seed": 3}
        )
        events = [event async for event in stream]
        whole = await client.images.generate(prompt="a red circle", size="128x128", n=2, extra_body={"seed": 3})
    assert [event.type for event in events] == ["image_generation.completed"] * 2
    assert whole.data is not None
    for event in events:
        index = event.index  # type: ignore[union-attr]
        assert event.b64_json == whole.data[index].b64_json and event.usage.output_tokens == 64  # type: ignore[union-attr]


async def test_the_same_seed_is_the_same_picture_and_urls_work(server: Server) -> None:
    extra = {"seed": 11, "num_inference_steps": 4}
    async with server.client() as client, httpx.AsyncClient() as http:
        alone = await client.images.generate(prompt="a green star", extra_body=extra)
        several = await client.images.generate(prompt="a green star", n=3, response_format="url", extra_body=extra)
        assert several.data is not None and len(several.data) == 3
        fetched = await http.get(several.data[0].url or "")
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(fetched.content))), picture_of(alone))
    assert fetched.headers["content-type"] == "image/png"


async def test_a_picture_is_edited_by_a_form_and_by_json_with_the_same_bits(server: Server) -> None:
    prompt, extra = "a large red circle on a navy background", {"seed": 7, "strength": 0.5}
    async with server.client() as client, httpx.AsyncClient(timeout=200) as http:
        drawn = await client.images.generate(prompt=prompt, size="128x128", extra_body={"seed": 7})
        assert drawn.data is not None and drawn.data[0].b64_json is not None
        png = base64.b64decode(drawn.data[0].b64_json)
        edited = await client.images.edit(image=("drawn.png", png), prompt=prompt, extra_body=extra)
        url = f"data:image/png;base64,{drawn.data[0].b64_json}"
        body = {"image": url, "prompt": prompt, "size": "128x128", **extra}
        again = await http.post(f"{server.url}/v1/images/edits", json=body)
    picture = picture_of(edited)
    assert np.array_equal(picture_of(ImagesResponse.model_validate_json(again.content)), picture)
    assert again.json()["data"][0]["num_inference_steps"] == 8, "half of the model's 16"
    assert picture.shape == (128, 128, 3) and not np.array_equal(picture, picture_of(drawn))
    assert np.abs(picture.astype(int) - picture_of(drawn)).mean() < 40, "it still looks like it"


async def test_bodies_are_strictly_of_the_clients_own_types(server: Server) -> None:
    async with httpx.AsyncClient(timeout=200) as http:
        body = {"prompt": "a blue ring", "num_inference_steps": 2, "slo_ms": 60_000, "output_format": "webp"}
        response = await http.post(f"{server.url}/v1/images/generations", json=body)
    assert response.status_code == 200, response.text
    ImagesResponse.model_validate_json(response.content, strict=True)


async def test_errors_over_the_wire(server: Server) -> None:
    async with server.client() as client:
        with pytest.raises(openai.BadRequestError) as size:
            await client.images.generate(prompt="a", size="100x100")
        with pytest.raises(openai.BadRequestError) as steps:
            await client.images.generate(prompt="a", extra_body={"num_inference_steps": 0})
        with pytest.raises(openai.BadRequestError) as stream:
            await client.images.generate(prompt="a", stream=True, response_format="url")
    assert (size.value.param, steps.value.param) == ("size", "num_inference_steps")
    assert stream.value.param == "response_format"


async def test_a_port_in_use_is_told_at_once(server: Server) -> None:
    port = server.url.rpartition(":")[2]
    process = await asyncio.create_subprocess_exec(TETRION, "serve", "--port", port, stderr=asyncio.subprocess.PIPE)
    _, stderr = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 2
    assert f"port: cannot listen on 127.0.0.1 port {port}" in stderr.decode()


async def test_concurrent_requests_of_mixed_sizes_leave_no_descriptor_behind(server: Server) -> None:
    async with server.client() as client:

        async def draw(i: int) -> tuple[int, ...]:
            size, extra = SIZES[i % len(SIZES)], {"seed": i, "num_inference_steps": 1 + i % 2}
            response = await client.images.generate(prompt=f"a red circle {i}", size=size, extra_body=extra)
            return picture_of(response).shape

        await asyncio.gather(*map(draw, range(4)))
        num_fds = server.num_fds()
        shapes = await asyncio.gather(*map(draw, range(40)))
    wanted = [tuple(map(int, reversed(SIZES[i % len(SIZES)].split("x")))) for i in range(40)]
    assert [shape[:2] for shape in shapes] == wanted
    async with asyncio.timeout(30):
        while server.num_fds() > num_fds:
            await asyncio.sleep(0.1)


async def test_a_killed_worker_means_an_error_or_a_picture_but_no_hang(server: Server) -> None:
    async with server.client() as client:
        extra = {"seed": 1, "num_inference_steps": 40}
        drawing = [
            asyncio.create_task(client.images.generate(prompt=f"a star {i}", size="128x128", extra_body=extra))
            for i in range(2)
        ]
        await until_admitted(server.url, 2)
        server.workers()[0].kill()
        async with asyncio.timeout(240):
            outcomes = await asyncio.gather(*drawing, return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, ImagesResponse):
                assert picture_of(outcome).shape == (128, 128, 3)
            else:
                assert isinstance(outcome, openai.InternalServerError) and outcome.code, repr(outcome)
    assert (await asyncio.to_thread(httpx.get, f"{server.url}/health")).status_code == 200


async def test_a_server_without_workers_is_unhealthy_then_exits_with_1() -> None:
    """Its fork server is stopped, so that none can be started again."""
    program = (sys.executable, "-P", "-c", WITH_LITTLE_PATIENCE)
    server = await asyncio.to_thread(Server, "--devices", "cpu:2", program=program)
    try:
        (fork_server,) = psutil.Process(server.process.pid).children()
        workers = server.workers()
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as http:
            assert (await http.get("/health")).status_code == 200
            body = {"prompt": "a star", "num_inference_steps": 1000, "size": "512x512"}
            posting = asyncio.create_task(http.post("/v1/images/generations", json=body))
            fork_server.suspend()
            for worker in workers:
                worker.kill()
            async with asyncio.timeout(5):
                while (response := await http.get("/health")).status_code == 200:
                    await asyncio.sleep(0.01)
            assert (response.status_code, response.json()["error"]["code"]) == (503, "no_worker")
            assert int(response.headers["retry-after"]) > 0
            answer = await posting
        assert answer.status_code == 500 and "no worker has been alive for 5 s" in answer.json()["error"]["message"]
        assert await asyncio.to_thread(server.process.wait, 60) == 1
        assert "tetrion: error: generation failed: no worker has been alive for 5 s" in server.stderr[-1]
        assert not any("Traceback" in line for line in server.stderr)
        assert not psutil.wait_procs([fork_server, *workers], timeout=20)[1]
    finally:
        server.stop(signal.SIGKILL)


async def test_ctrl_c_twice_answers_what_it_cuts_off_and_leaves_no_process() -> None:
    server = await asyncio.to_thread(Server, "--devices", "cpu:1")
    children = server.children()
    try:
        async with httpx.AsyncClient(timeout=60) as http:
            body = {"prompt": "a star", "num_inference_steps": 1000, "size": "512x512"}
            posting = asyncio.create_task(http.post(f"{server.url}/v1/images/generations", json=body))
            await until_admitted(server.url, 1)
            os.killpg(server.process.pid, signal.SIGINT)
            await until_refused(server.url)
            os.killpg(server.process.pid, signal.SIGINT)
            response = await posting
        assert (response.status_code, response.json()["error"]["code"]) == (503, "cancelled")
        assert await asyncio.to_thread(server.process.wait, 60) == 130
        assert children and not psutil.wait_procs(children, timeout=20)[1]
        assert not any("Traceback" in line for line in server.stderr)
    finally:
        server.stop(signal.SIGKILL)


async def until_refused(url: str) -> None:
    """Until it takes no new connection."""
    async with asyncio.timeout(60):
        with pytest.raises(httpx.ConnectError):
            while True:
                async with httpx.AsyncClient() as http:
                    await http.get(f"{url}/health")
                await asyncio.sleep(0.01)
