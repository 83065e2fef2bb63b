"""Carbon intensity from its three sources, and the sampler's thread."""

import datetime
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from tetrion.engine.energy.carbon import HourlyIntensity, HttpIntensity, open_intensity
from tetrion.engine.energy.meter import NoMeter, Reading
from tetrion.engine.energy.sampler import Pace, Sampler


def within(seconds: float, is_so: Callable[[], bool]) -> bool:
    end_s = time.monotonic() + seconds
    while not is_so() and time.monotonic() < end_s:
        time.sleep(0.01)
    return is_so()


def test_a_number_is_always_the_same() -> None:
    assert open_intensity("350.5").g_per_kwh() == 350.5
    with pytest.raises(ValueError, match="at least 0"):
        open_intensity("-1")


def test_a_file_has_hours_of_the_day_and_single_hours(tmp_path: Path) -> None:
    path = tmp_path / "intensity.csv"
    path.write_text("hour,g_per_kwh\n13,400\n2026-01-05T13:00+00:00,90\n14,410\n")
    now = [datetime.datetime(2026, 1, 5, 13, 59, tzinfo=datetime.UTC)]
    intensity = HourlyIntensity(path, lambda: now[0])
    assert intensity.g_per_kwh() == 90
    now[0] += datetime.timedelta(days=1)
    assert intensity.g_per_kwh() == 400
    now[0] += datetime.timedelta(hours=2)
    assert intensity.g_per_kwh() is None


@pytest.mark.parametrize("line", ["25,3", "noon,3", "3", "3,-1", "3,nan"])
def test_a_bad_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "intensity.csv"
    path.write_text(f"1,100\n{line}\n")
    with pytest.raises(ValueError, match="line 2"):
        open_intensity(str(path))


@pytest.fixture
def service() -> Iterator[tuple[str, list[str]]]:
    tokens: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            tokens.append(self.headers.get("Authorization", ""))
            body = json.dumps({"g_per_kwh": 123}).encode() if self.path == "/good" else b"{}"
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}", tokens
    server.shutdown()
    server.server_close()


def test_a_service_is_asked_with_the_token_of_the_file(service: tuple[str, list[str]], tmp_path: Path) -> None:
    url, tokens = service
    (tmp_path / "token").write_text("secret\n")
    intensity = open_intensity(f"{url}/good", str(tmp_path / "token"))
    assert within(5, lambda: intensity.g_per_kwh() == 123)
    assert tokens[0] == "Bearer secret"
    intensity.close()


def test_a_service_that_does_not_tell_leaves_it_unknown(service: tuple[str, list[str]]) -> None:
    url, tokens = service
    intensity = HttpIntensity(f"{url}/bad", refresh_s=0.01)
    assert within(5, lambda: len(tokens) > 2)
    assert intensity.g_per_kwh() is None
    intensity.close()


class Ticking(NoMeter):
    source, reason = "ticking", ""

    def __init__(self) -> None:
        self.is_closed = False

    def read(self, counters: bool = True) -> Reading:
        return Reading(time_s=time.monotonic(), joules={"GPU-0": 0.0} if counters else {}, watts={})

    def close(self) -> None:
        self.is_closed = True


def test_the_sampler_reads_until_it_is_stopped_and_knows_its_cost() -> None:
    readings: list[Reading] = []
    meter = Ticking()
    sampler = Sampler(meter, readings.append, period_s=0.02)
    sampler.start()
    assert within(5, lambda: len(readings) >= 5)
    sampler.stop()
    num = len(readings)
    time.sleep(0.06)
    assert len(readings) == num == sampler.cost.num_readings
    assert readings[0].joules
    assert 0 < sampler.cost.cpu_s < sampler.cost.wall_s
    assert meter.is_closed


@pytest.mark.parametrize(("cpu_ms", "period_s"), [(0.1, 0.1), (0.6, 0.3), (8.2, 0.5)])
def test_powers_are_read_as_seldom_as_their_cost_demands(cpu_ms: float, period_s: float) -> None:
    pace = Pace(0.1)
    assert pace.period_s == 0.1
    for number in range(7):
        pace.took(counters=False, cpu_s=cpu_ms / 1e3, now_s=float(number))
    assert pace.period_s == pytest.approx(period_s)


@pytest.mark.parametrize(("cpu_ms", "distance_s"), [(0.1, 0.05), (8.4, 4.2), (34.0, 10.0)])
def test_counters_are_read_at_once_and_then_as_seldom_as_their_cost_demands(cpu_ms: float, distance_s: float) -> None:
    pace = Pace(0.1)
    assert pace.with_counters(7.0)
    pace.took(counters=True, cpu_s=cpu_ms / 1e3, now_s=7.0)
    assert not pace.with_counters(7.0 + 0.99 * distance_s) and pace.with_counters(7.0 + 1.01 * distance_s)
    assert pace.period_s == 0.1


def test_a_sampler_whose_receiver_fails_ends_alone() -> None:
    def fail(_: Reading) -> None:
        raise ZeroDivisionError

    meter = Ticking()
    sampler = Sampler(meter, fail, period_s=0.02)
    sampler.start()
    assert within(5, lambda: not sampler._thread.is_alive())
    sampler.stop()
    assert meter.is_closed
