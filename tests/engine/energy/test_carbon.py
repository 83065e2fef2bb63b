"""Carbon intensity from its three sources, and what is refused with the field's name."""

import contextlib
import datetime
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from tests.engine.energy.test_sampler import within
from tetrion.engine.energy.carbon import HourlyIntensity, HttpIntensity, find_intensity

GOOD = b'HTTP/1.0 200 OK\r\n\r\n{"g_per_kwh": 123}'


@pytest.mark.parametrize(("source", "g_per_kwh"), [("350.5", 350.5), ("0", 0.0), ("1e2", 100.0), (" 7 ", 7.0)])
def test_a_number_is_always_the_same(source: str, g_per_kwh: float) -> None:
    assert find_intensity(source).g_per_kwh() == g_per_kwh


@pytest.mark.parametrize(
    "source", ["-1", "-5.5", "-1e3", "nan", "NaN", "-nan", "inf", "Infinity", "-Infinity", "1e400", "-1_000"]
)
def test_what_reads_as_a_number_is_checked_as_one(source: str) -> None:
    with pytest.raises(ValueError, match=r"^carbon: grams per kWh must be at least 0 and finite, got "):
        find_intensity(source)


@pytest.mark.parametrize("source", ["", "  "])
def test_nothing_is_no_intensity(source: str) -> None:
    with pytest.raises(ValueError, match=r"^carbon: must not be empty"):
        find_intensity(source)


def test_a_file_has_hours_of_the_day_and_single_hours(tmp_path: Path) -> None:
    path = tmp_path / "intensity.csv"
    path.write_bytes("\ufeffhour,g_per_kwh\r\n13,400\r\n2026-01-05T13:00+00:00,90\r\n\r\n14,410\r\n".encode())
    now = [datetime.datetime(2026, 1, 5, 13, 59, tzinfo=datetime.UTC)]
    intensity = HourlyIntensity(path, lambda: now[0])
    assert intensity.g_per_kwh() == 90
    now[0] += datetime.timedelta(days=1)
    assert intensity.g_per_kwh() == 400
    now[0] += datetime.timedelta(hours=2)
    assert intensity.g_per_kwh() is None


@pytest.mark.parametrize("line", ["25,3", "noon,3", "3", "3,-1", "3,nan", f"4,{'x' * 200_000}"])
def test_a_bad_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "intensity.csv"
    path.write_text(f"1,100\n{line}\n")
    with pytest.raises(ValueError, match=rf"^carbon: {re.escape(str(path))}: line 2: ") as caught:
        find_intensity(str(path))
    assert len(str(caught.value)) < 300 + len(str(path))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"1,100\n2,\xff\n", "is not UTF-8 text"),
        ("1,100\n".encode("utf-16"), "is not UTF-8 text"),
        (b"", "has no line HOUR,g_per_kwh"),
        (b"hour,g_per_kwh\n", "has no line HOUR,g_per_kwh"),
    ],
)
def test_a_file_that_tells_nothing_is_named(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "intensity.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=says) as caught:
        find_intensity(str(path))
    assert str(caught.value).startswith("carbon: ") and str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "says"),
    [("none.csv", "No such file"), (".", "Is a directory"), ("a\0b", "null byte"), ("x" * 300, "long")],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str, says: str) -> None:
    with pytest.raises(ValueError, match=f"^carbon: cannot read .*{says}"):
        find_intensity(str(tmp_path / name))


@pytest.mark.parametrize(
    "url",
    [
        "http://foo:abc/",
        "http://foo:-1/",
        "http://foo:99999/",
        "http://foo:0/",
        "http://a b/",
        "http://a/b c",
        "http://a/\r\nX: y",
        "http://a/\tb",
        "http://",
        "https:///path",
        "http://:80/",
        "http://[::1/",
        "http://a..b/",
        f"http://{'x' * 64}.org/",
        "http://münchen.example/",
        "http://user:secret@host/",
        "http://host%3aabc/",
        "HTTP://foo:abc/",
    ],
)
def test_a_url_that_can_never_be_asked_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"^carbon: cannot ask "):
        find_intensity(url)


@pytest.mark.parametrize(
    "url", ["http://[::1]:80/x", "https://localhost", "HTTPS://a.example:443/x?y=%20z", "http://a:/"]
)
def test_other_urls_are_taken(url: str) -> None:
    intensity = find_intensity(url)
    assert intensity.g_per_kwh() is None
    intensity.close()


@pytest.mark.parametrize("content", [b"", b" \n", b"a\nb", b"two words", b"\xff", "schlüssel".encode(), b"a\0b"])
def test_a_token_that_fits_no_header_is_refused_and_not_shown(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "token"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"^carbon_token_file: '{re.escape(str(path))}' ") as caught:
        find_intensity("http://localhost/", str(path))
    assert "words" not in str(caught.value) and "schl" not in str(caught.value)


def test_a_token_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^carbon_token_file: cannot read .*No such file"):
        find_intensity("http://localhost/", str(tmp_path / "none"))


@contextlib.contextmanager
def serving(answer: Callable[[BaseHTTPRequestHandler], None]) -> Iterator[str]:
    """The URL of a service on this machine that answers every GET so."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer(self)

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


@contextlib.contextmanager
def asking(intensity: HttpIntensity) -> Iterator[HttpIntensity]:
    intensity.start()
    try:
        yield intensity
    finally:
        intensity.close()


@pytest.fixture
def service() -> Iterator[tuple[str, list[str]]]:
    """A service that knows at `/good`, and the header `Authorization` of all that have asked."""
    tokens: list[str] = []

    def answer(handler: BaseHTTPRequestHandler) -> None:
        tokens.append(handler.headers.get("Authorization", ""))
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(json.dumps({"g_per_kwh": 123}).encode() if handler.path == "/good" else b"{}")

    with serving(answer) as url:
        yield url, tokens


def test_a_service_is_asked_with_the_token_of_the_file(service: tuple[str, list[str]], tmp_path: Path) -> None:
    url, tokens = service
    (tmp_path / "token").write_text("secret\n")
    intensity = find_intensity(f"{url}/good", str(tmp_path / "token"))
    intensity.start()
    assert within(5, lambda: intensity.g_per_kwh() == 123)
    assert tokens[0] == "Bearer secret"
    intensity.close()


def test_a_service_that_is_only_found_is_not_asked(service: tuple[str, list[str]]) -> None:
    url, tokens = service
    intensity = find_intensity(f"{url}/good")
    intensity.close()
    with asking(HttpIntensity(f"{url}/bad")):
        assert within(5, lambda: len(tokens) == 1)
    assert intensity.g_per_kwh() is None


def test_a_service_that_does_not_tell_leaves_it_unknown(service: tuple[str, list[str]]) -> None:
    url, tokens = service
    with asking(HttpIntensity(f"{url}/bad", refresh_s=0.01)) as intensity:
        assert within(5, lambda: len(tokens) > 2)
        assert intensity.g_per_kwh() is None


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed_and_takes_the_token_nowhere(service: tuple[str, list[str]], status: int) -> None:
    elsewhere, seen_there = service
    seen: list[str] = []

    def redirect(handler: BaseHTTPRequestHandler) -> None:
        seen.append(handler.headers.get("Authorization", ""))
        handler.send_response(status)
        handler.send_header("Location", f"{elsewhere}/good")
        handler.end_headers()

    with serving(redirect) as url, asking(HttpIntensity(f"{url}/", "secret", refresh_s=0.01)) as intensity:
        assert within(5, lambda: len(seen) > 2)
        assert intensity.g_per_kwh() is None
    assert set(seen) == {"Bearer secret"} and seen_there == []


@pytest.mark.parametrize(
    "bad_answer",
    [
        b"gibberish\r\n\r\n",
        b"",
        b"HTTP/1.1 20x OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n100\r\n{",
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200 + b"\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * 70_000 + b"\r\n\r\n",
        b"HTTP/1.1 302 Found\r\nLocation: http://[/\r\n\r\n",
        b"HTTP/1.0 200 OK\r\n\r\n" + b"[" * 60_000,
        b'HTTP/1.0 200 OK\r\n\r\n{"g_per_kwh": 1' + b"0" * 400 + b"}",
        b'HTTP/1.0 200 OK\r\n\r\n{"g_per_kwh": NaN}',
        b'HTTP/1.0 200 OK\r\n\r\n{"g_per_kwh": -1}',
        b"HTTP/1.0 200 OK\r\n\r\n[1]",
        b"HTTP/1.0 200 OK\r\n\r\n\xff",
    ],
    ids=lambda answer: answer[:60].decode("latin-1").replace("\r\n", "|"),
)
def test_after_a_malformed_answer_the_next_one_counts(bad_answer: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def run() -> None:
            for answer in (bad_answer, bad_answer, GOOD):
                connection, _ = listener.accept()
                with connection, contextlib.suppress(OSError):
                    connection.recv(1 << 16)
                    connection.sendall(answer)

        threading.Thread(target=run, daemon=True).start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
        with asking(HttpIntensity(url, timeout_s=5, refresh_s=0.01)) as intensity:
            assert within(5, lambda: intensity.g_per_kwh() == 123)


def test_a_service_that_is_slow_is_given_up_and_holds_no_shutdown_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, contextlib.ExitStack() as connections:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
        with asking(HttpIntensity(url, timeout_s=0.05, refresh_s=0.01)) as hasty:
            for _ in range(2):
                connections.enter_context(listener.accept()[0])
            assert hasty.g_per_kwh() is None
        with asking(HttpIntensity(url, timeout_s=60)):
            connections.enter_context(listener.accept()[0])
            begun_s = time.monotonic()
        assert time.monotonic() - begun_s < 5
