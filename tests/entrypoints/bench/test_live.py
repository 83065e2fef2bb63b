"""Traces on the wall clock: open loop, over HTTP, and on a real engine."""

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import msgspec
import pytest

from benchmarks.research.replay import command as replay_command
from tetrion.engine.config import EngineConfig, PlannerConfig
from tetrion.engine.executors.base import Executor
from tetrion.engine.messages import Command, Denoise, EncodePrompt
from tetrion.entrypoints.bench import live
from tetrion.entrypoints.bench.live import HttpSystem, open_loop
from tetrion.entrypoints.bench.recording import Recorder, read_recordings
from tetrion.entrypoints.bench.slo import command
from tetrion.entrypoints.bench.workloads import TraceRequest, write_trace
from tetrion.entrypoints.errors import InputError


def trace(arrivals_s: list[float], px: int = 128, slo_s: float = 60.0) -> tuple[TraceRequest, ...]:
    return tuple(
        TraceRequest(arrival_s=arrival_s, width=px, height=px, num_steps=2, slo_s=slo_s) for arrival_s in arrivals_s
    )


async def test_arrivals_do_not_wait_for_answers() -> None:
    """The first answer comes only once the last request has been started."""
    started: list[int] = []
    all_started = asyncio.Event()

    async def draw(request: TraceRequest, number: int) -> tuple[int, ...] | None:
        started.append(number)
        if len(started) == 4:
            all_started.set()
        await all_started.wait()
        return None if number == 2 else (1, 1)

    finished, lag_s = await open_loop(trace([0.0, 0.02, 0.04, 0.2]), time.monotonic(), draw)
    assert started == [0, 1, 2, 3] and lag_s >= 0
    assert finished[2] == (None, ())
    assert all(time_s is not None and time_s >= 0.2 and degrees == (1, 1) for time_s, degrees in finished[:2])


async def test_an_arrival_after_a_long_silence_is_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock of its own, where every wait ends as late as the kernel may let it."""
    now_s, lags_s = 0.0, []

    async def sleep_late(seconds: float) -> None:
        nonlocal now_s
        now_s += max(0.0, seconds) + min(0.001 * max(0.0, seconds), 0.1)

    async def draw(request: TraceRequest, _: int) -> tuple[int, ...]:
        lags_s.append(now_s - request.arrival_s)
        return (1,)

    monkeypatch.setattr(live, "time", SimpleNamespace(monotonic=lambda: now_s))
    monkeypatch.setattr(live, "asyncio", SimpleNamespace(sleep=sleep_late, gather=asyncio.gather))
    await open_loop(trace([30.0, 330.0]), 0.0, draw)
    assert all(0 <= lag_s < 0.001 for lag_s in lags_s)


class Server(BaseHTTPRequestHandler):
    """Answers like ours; refuses every request for 256 pixels and fails at those for 512."""

    bodies: ClassVar[list[dict[str, object]]] = []

    def do_GET(self) -> None:
        self._answer(200, {"status": "ready", "num_devices": 3, "models": ["shapes"]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.bodies.append(body)
        status = {"256x256": 429, "512x512": 503}.get(str(body["size"]), 200)
        picture = {"degrees": [1, 2], "energy": {"active_j": 40.0, "idle_share_j": 2.0}}
        self._answer(status, {"data": [picture]} if status == 200 else {})

    def _answer(self, status: int, value: object) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.fixture
def url() -> Iterator[str]:
    Server.bodies = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_server_is_sent_the_trace_and_its_refusals_count_as_missed(url: str) -> None:
    requests = (*trace([0.0, 0.01]), *trace([0.02], px=256), *trace([0.03], px=512))
    system = HttpSystem(url + "/")
    run, chunks = system.run(requests, "horizon", 0)
    assert system.num_devices == run.num_devices == 3 and chunks == ()
    assert "weights and tenants" in system.facts["not_sent"]
    assert [outcome.is_met for outcome in run.outcomes] == [True, True, False, False]
    assert [outcome.refused for outcome in run.outcomes] == [False, False, True, False]
    assert run.outcomes[0].degrees == (1, 2) and run.gpu_s is None and run.utilisation is None
    body = next(body for body in Server.bodies if body["seed"] == 1)
    assert (body["size"], body["num_inference_steps"], body["slo_ms"]) == ("128x128", 2, 60_000.0)


def test_rows_of_a_server_leave_out_what_it_does_not_say(url: str, tmp_path: Path) -> None:
    write_trace(tmp_path / "T.jsonl", trace([0.0, 0.01]))
    record = command(url=url, trace=[tmp_path / "T.jsonl"])
    (row,), (beside,) = record["rows"], record["diagnostics"]
    assert (row["mode"], row["devices"], row["attainment"], row["gpu_s_per_image"]) == ("live", 3, 1.0, None)
    assert row["joules_per_image"] == 42.0 and "by receipts" in beside["notes"]["joules_per_image"]
    assert beside["notes"]["gpu_s_per_image"] == "the server does not say" and beside["num_decisions"] == 0
    with pytest.raises(InputError, match="record: a server over HTTP"):
        command(url=url, trace=[tmp_path / "T.jsonl"], record=tmp_path / "r.jsonl")
    with pytest.raises(InputError, match="profile: needed, since a server over HTTP does not tell its own"):
        command(url=url, trace=[tmp_path / "T.jsonl"], compress=2)


def test_no_server_is_said_in_one_line() -> None:
    with pytest.raises(InputError, match=r"url: http://127\.0\.0\.1:9 is not a server that is ready"):
        HttpSystem("http://127.0.0.1:9")


class Watch(Recorder):
    """Notes which devices ran which degree in the warm-up, and the prompts after it."""

    def wrap_executor(self, executor: Executor) -> Executor:
        self.warmed: set[tuple[int, int]] = set()
        self.prompts: list[str] = []
        self.submit = executor.submit
        executor.submit = self.note  # type: ignore[method-assign]
        return super().wrap_executor(executor)

    def note(self, command: Command, members: tuple[int, ...]) -> bool:
        if isinstance(command, Denoise) and command.request_id.startswith("warm-up"):
            self.warmed |= {(len(members), device) for device in members}
        if isinstance(command, EncodePrompt) and not command.request_id.startswith("warm-up"):
            self.prompts.append(command.prompt)
        return self.submit(command, members)


def test_an_embedded_engine_runs_every_policy_and_its_record_replays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = Watch()
    monkeypatch.setattr(live, "Recorder", lambda: watch)
    (hopeless,) = trace([0.3])
    hopeless = msgspec.structs.replace(hopeless, slo_s=0.001, tenant="B")
    write_trace(tmp_path / "T.jsonl", [*trace([0.0, 0.1, 0.2]), hopeless])
    record = command(
        live=True,
        engine=EngineConfig(devices="cpu:2", num_threads=1, planner=PlannerConfig(admission="reject-hopeless")),
        trace=[tmp_path / "T.jsonl"],
        policy=["fixed-1", "fixed-2", "tetriserve-g1"],
        record=tmp_path / "r.jsonl",
    )
    assert watch.warmed == {(degree, device) for degree in (1, 2) for device in (0, 1)}
    assert len(set(watch.prompts)) == len(watch.prompts) == 9, "no policy has its prompts encoded by another's run"
    assert [(row["mode"], row["devices"], row["attainment"]) for row in record["rows"]] == [("live", 2, 0.75)] * 3
    assert [(row["refused"], row["by_tenant"]["B"]["refused"]) for row in record["rows"]] == [(1, 1)] * 3
    assert all(row["gpu_s_per_image"] > 0 for row in record["rows"])
    assert all(0 < beside["utilisation"] <= 1 for beside in record["diagnostics"])
    assert all(beside["engine_cpu_ms_per_command"] > 0 for beside in record["diagnostics"])
    assert all(row["joules_per_image"] is None for row in record["rows"]), "CPU workers have no meter"
    narrow, wide, in_rounds = read_recordings(tmp_path / "r.jsonl")
    assert {o.degrees for o in narrow.run.outcomes} == {(1, 1), ()}
    assert {o.degrees for o in wide.run.outcomes} == {(2, 2), ()}
    for recording in (narrow, wide, in_rounds):
        assert (loop := recording.run.loop) is not None
        assert loop.num_ticks < 100 * loop.num_commands, "a loop that waits for a round's start does not spin"
        steps = [chunk.chunk_steps for chunk in recording.chunks]
        assert sum(steps) == 6 and recording.facts["model"] == "shapes"
        assert all(chunk.start_s <= chunk.joined_s <= chunk.end_s and chunk.net_s > 0 for chunk in recording.chunks)
    rows = replay_command(recordings=tmp_path / "r.jsonl", as_json=True)["rows"]
    assert all(row["attainment"] == {"recorded": 0.75, "simulated": 0.75} for row in rows)


def test_a_size_that_the_model_does_not_draw_is_refused_before_anything_runs(tmp_path: Path) -> None:
    write_trace(tmp_path / "T.jsonl", trace([0.0], px=1024))
    with pytest.raises(InputError, match="trace: request 1: width: must be a multiple of 16 from 128 to 512"):
        command(live=True, engine=EngineConfig(devices="cpu:1"), trace=[tmp_path / "T.jsonl"])
