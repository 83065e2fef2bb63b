"""`tetrion bench serve` against servers of several kinds, over real sockets."""

import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from email.parser import BytesParser
from email.policy import HTTP
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tetrion.entrypoints.bench.serve import Load, times
from tetrion.entrypoints.cli import run

Reply = Callable[["Handler", dict[str, Any], int], None]


class Handler(BaseHTTPRequestHandler):
    """Answers a POST as its server's `reply` does, which is given the body (fields of a form: texts and counts of
    files) and the number of the request."""

    protocol_version = "HTTP/1.1"
    server: "Server"

    def do_GET(self) -> None:
        if self.server.models is None:
            self.send_error(404)
        else:
            self.as_json(200, {"data": [{"id": model} for model in self.server.models]})

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers["content-length"]))
        content_type = self.headers["content-type"]
        if content_type.startswith("multipart/"):
            form = BytesParser(policy=HTTP).parsebytes(f"content-type: {content_type}\r\n\r\n".encode() + data)
            parts = [(part.get_param("name", header="content-disposition"), part) for part in form.iter_parts()]
            body: dict[str, Any] = {name: part.get_payload(decode=True).decode("latin-1") for name, part in parts}  # type: ignore[union-attr]
            body |= {f"number of {name}": n for name, n in Counter(name for name, _ in parts).items()}
        else:
            body = json.loads(data)
        with self.server.lock:
            number = len(self.server.bodies)
            self.server.bodies.append(body)
            self.server.paths.append(self.path)
            self.server.keys.append(self.headers.get("authorization"))
            self.server.now += 1
            self.server.most = max(self.server.most, self.server.now)
        try:
            self.server.reply(self, body, number)
        finally:
            with self.server.lock:
                self.server.now -= 1

    def as_json(self, status: int, content: Any) -> None:
        self.as_bytes(status, json.dumps(content).encode(), "application/json")

    def as_bytes(self, status: int, data: bytes, content_type: str) -> None:
        self.send_response(status)
        self.send_header("content-type", content_type)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None: ...


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock = threading.Lock()
        self.reply: Reply = plain
        self.models: list[str] | None = ["painter", "other"]
        self.bodies: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.keys: list[str | None] = []
        self.now = self.most = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


def plain(handler: Handler, body: dict[str, Any], number: int) -> None:
    """As OpenAI answers, and nothing beside."""
    handler.as_json(200, {"created": 1, "data": [{"b64_json": "aGFsbG8="}] * int(body.get("n", 1))})


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def measure(server: Server, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    def measure(*options: str) -> dict[str, Any]:
        output = tmp_path / "result.json"
        assert run(["bench", "serve", "--url", server.url, "--output", str(output), "--timeout", "60", *options]) == 0
        made: dict[str, Any] = json.loads(output.read_text())
        return made

    return measure


def test_a_server_that_says_nothing_of_itself(
    server: Server, measure: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    server.models = None
    made = measure("--num-requests", "6", "--n", "2", "--size", "256x256", "--size", "512x512", "--slo", "60")
    everything, small, large = made["rows"]
    assert [row["size"] for row in made["rows"]] == ["all", "256x256", "512x512"]
    assert (everything["requests"], everything["answered"], everything["pictures"]) == (6, 6, 12)
    assert small["requests"] == large["requests"] == 3 and everything["within_slo"] == 1.0
    assert everything["latency_s"]["p50"] >= everything["last_byte_s"]["p50"] >= everything["first_byte_s"]["p50"] > 0
    assert made["model"] is None and everything["beside_s"] is None and everything["joules"] is None
    assert set(everything["said_s"].values()) == {None} and everything["first_partial_s"] is None
    assert len(server.bodies) == 6 + 2, "one of each size warms up"
    assert len({body["prompt"] for body in server.bodies[2:]}) == 6
    assert all("model" not in body and body["n"] == 2 for body in server.bodies)
    assert "256x256" in capsys.readouterr().out


def test_what_an_answer_says_of_its_time_is_shown(
    server: Server, measure: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    def reply(handler: Handler, body: dict[str, Any], number: int) -> None:
        said = {"queue_s": 0.001, "encode_s": 0.002, "denoise_s": 0.003, "decode_s": 0.004, "deliver_s": 0.005}
        energy = {"active_j": 3.0, "idle_share_j": 0.5}
        handler.as_json(200, {"data": [{"b64_json": "", "latency_s": 0.015, "energy": energy} | said]})

    server.reply = reply
    (row,) = measure("--num-requests", "3")["rows"]
    assert row["said_s"]["decode_s"] == 0.004 and row["joules"] == 3.5
    assert row["beside_s"] == pytest.approx(row["latency_s"]["p50"] - 0.015)
    assert "decode 4.0" in capsys.readouterr().out
    assert all(body["model"] == "painter" for body in server.bodies)


def test_a_closed_loop_keeps_as_many_clients_waiting(server: Server, measure: Callable[..., dict[str, Any]]) -> None:
    all_here = threading.Barrier(3)

    def reply(handler: Handler, body: dict[str, Any], number: int) -> None:
        all_here.wait(30)
        plain(handler, body, number)

    server.reply = reply
    (row,) = measure("--num-requests", "9", "--concurrency", "3", "--warm-up", "0")["rows"]
    assert row["answered"] == 9 and server.most == 3


def test_an_open_loop_counts_from_when_a_request_was_due(
    server: Server, measure: Callable[..., dict[str, Any]]
) -> None:
    """Nobody is answered before the last has come."""
    all_here = threading.Barrier(8)

    def reply(handler: Handler, body: dict[str, Any], number: int) -> None:
        all_here.wait(30)
        plain(handler, body, number)

    server.reply = reply
    made = measure("--num-requests", "8", "--rate", "1200", "--warm-up", "0", "--arrivals", "gamma")
    (row,) = made["rows"]
    due_s = times(Load(num_requests=8, process="gamma"), 60 / 1200)
    assert row["answered"] == 8 and row["latency_s"]["mean"] >= due_s[-1] - due_s.mean()


def test_arrivals_have_their_rate_and_their_seed() -> None:
    for process in ("poisson", "gamma", "production"):
        load = Load(num_requests=4000, process=process)  # type: ignore[arg-type]
        at_s = times(load, 0.5)
        assert np.all(np.diff(at_s) >= 0) and at_s[-1] / 4000 == pytest.approx(0.5, rel=0.2)
        assert np.array_equal(at_s, times(load, 0.5))


def test_refusals_and_failures_are_counted_apart(
    server: Server, measure: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    def reply(handler: Handler, body: dict[str, Any], number: int) -> None:
        match number:
            case 1:
                handler.as_json(429, {"error": {"message": "too many"}})
            case 2:
                handler.as_bytes(500, b"<html>", "text/html")
            case 3:
                handler.as_json(400, {"detail": "no such size"})
            case 4:
                handler.as_json(200, {"data": []})
            case 5:
                handler.as_bytes(200, b"\xff\xfe", "application/json")
            case 6:
                handler.connection.shutdown(socket.SHUT_RDWR)
                handler.close_connection = True
            case _:
                plain(handler, body, number)

    server.reply = reply
    made = measure("--num-requests", "8", "--slo", "60")
    (row,) = made["rows"]
    assert (row["answered"], row["refused"], row["failed"]) == (2, 1, 5) and row["within_slo"] == 2 / 8
    assert made["errors"] | {"too many": 1, "HTTP 500": 1, "no such size": 1} == made["errors"]
    assert made["errors"]["the answer holds no pictures"] == 2 and sum(made["errors"].values()) == 6
    assert "1 × too many" in capsys.readouterr().out


def events(handler: Handler, *sent: object) -> None:
    handler.send_response(200)
    handler.send_header("content-type", "text/event-stream; charset=utf-8")
    handler.send_header("connection", "close")
    handler.end_headers()
    for event in sent:
        if callable(event):
            event()
        else:
            handler.wfile.write(event if isinstance(event, bytes) else f"data: {json.dumps(event)}\n\n".encode())
            handler.wfile.flush()
    handler.close_connection = True


def test_the_first_preview_of_a_stream_is_timed(server: Server, measure: Callable[..., dict[str, Any]]) -> None:
    def reply(handler: Handler, body: dict[str, Any], number: int) -> None:
        partial = {"type": "image_generation.partial_image", "partial_image_index": 0, "b64_json": "aGFsbG8="}
        done = {"type": "image_generation.completed", "b64_json": "aGFsbG8=", "latency_s": 0.01}
        pause = lambda: time.sleep(0.05)  # noqa: E731
        events(
            handler, b": awake\n\n", partial, pause, b"event: image_generation.completed\n", done, b"data: [DONE]\n\n"
        )

    server.reply = reply
    (row,) = measure("--num-requests", "2", "--stream", "--partial-images", "1")["rows"]
    assert row["answered"] == 2 and row["beside_s"] is not None
    assert row["first_byte_s"]["p50"] <= row["first_partial_s"]["p50"] <= row["last_byte_s"]["p50"] - 0.045
    assert all(body["stream"] is True and body["partial_images"] == 1 for body in server.bodies)


@pytest.mark.parametrize(
    ("sent", "error"),
    [
        ((), "the stream ended without a picture"),
        (({"type": "error", "error": {"message": "no memory"}},), "no memory"),
        ((b"data: {\n\n",), "an event is no JSON"),
        ((b"data: 3\n\n",), "the stream ended without a picture"),
    ],
)
def test_a_stream_without_a_picture_is_a_failure(
    server: Server, measure: Callable[..., dict[str, Any]], sent: tuple[object, ...], error: str
) -> None:
    server.reply = lambda handler, body, number: events(handler, *sent)
    made = measure("--num-requests", "1", "--warm-up", "0", "--stream")
    assert made["errors"] == {error: 1} and made["rows"][0]["latency_s"] is None


def test_pictures_are_sent_as_the_official_client_sends_them(
    server: Server, measure: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    files = [tmp_path / name for name in ("one.png", "two.webp")]
    for file in files:
        file.write_bytes(b"\x89PNG")
    measure("--num-requests", "1", "--warm-up", "0", "--image", str(files[0]), "--field", 'style={"a":1}')
    images = [word for file in files for word in ("--image", str(file))]
    measure("--num-requests", "1", "--warm-up", "0", "--prompt", "make it blue", *images)
    one, two = server.bodies
    assert one["number of image"] == 1 and one["style"] == '{"a": 1}'
    assert two["number of image[]"] == 2 and two["prompt"] == "make it blue"
    assert server.paths == ["/v1/images/edits"] * 2


def test_the_key_is_sent_and_not_recorded(server: Server, measure: Callable[..., dict[str, Any]]) -> None:
    made = measure("--num-requests", "1", "--api-key", "sk-secret", "--field", "slo_ms=2000", "--field", "tier=a b")
    assert server.keys == ["Bearer sk-secret"] * 2 and "sk-secret" not in json.dumps(made)
    assert server.bodies[0]["slo_ms"] == 2000 and server.bodies[0]["tier"] == "a b"
    assert "--num-requests 1" in made["command"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--rate", "5", "--concurrency", "2"), "concurrency: of a closed loop"),
        (("--arrivals", "gamma"), "arrivals: of an open loop"),
        (("--burstiness", "2"), "burstiness: of an open loop"),
        (("--rate", "5", "--burstiness", "2"), "burstiness: only with --arrivals gamma"),
        (("--partial-images", "1"), "partial_images: only with --stream"),
        (("--size", "big"), "size: expected WIDTHxHEIGHT"),
        (("--field", "slo"), "field: expected KEY=VALUE, got 'slo'"),
        (("--image", "/nowhere.png"), "image: cannot read /nowhere.png: No such file"),
        (("--output", "/"), "output: / is there and is not a file"),
        (("--url", "ftp://somewhere"), "url: expected http://HOST:PORT"),
        (("--url", "http://127.0.0.1:9"), "url: http://127.0.0.1:9 does not answer"),
    ],
)
def test_what_cannot_be_measured_is_said(
    options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["bench", "serve", "--url", "http://127.0.0.1:9", *options]) == 2
    assert f"tetrion: error: {message}" in capsys.readouterr().err


def test_a_server_that_refuses_the_first_request_is_not_measured(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    server.reply = lambda handler, body, number: handler.as_json(401, {"error": {"message": "no key"}})
    assert run(["bench", "serve", "--url", server.url + "/v1/"]) == 2
    assert "url: the first request came to nothing: no key" in capsys.readouterr().err
    assert len(server.bodies) == 1 and server.paths == ["/v1/images/generations"]
