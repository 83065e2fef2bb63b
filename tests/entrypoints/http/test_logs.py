"""What the server's log says of each picture, for people and for machines."""

import json
import logging

import pytest

from tests.entrypoints.http.live import live, until
from tetrion.entrypoints.http.logs import FIELDS, JsonFormatter, degrees_text
from tetrion.entrypoints.http.request_ids import RequestIdFilter


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.handler.addFilter(RequestIdFilter())
    caplog.handler.setFormatter(JsonFormatter())
    caplog.set_level(logging.INFO)
    return caplog


async def test_a_picture_that_was_handed_over_is_a_line_with_its_figures(lines: pytest.LogCaptureFixture) -> None:
    async with live() as served:
        answer = await served.post(
            n=2, num_inference_steps=4, size="128x144", slo_ms=60_000, headers={"x-request-id": "mine"}
        )
        assert answer.status_code == 200
        await until(lambda: "drew" in lines.text)
        await served.post(prompt="fail", headers={"x-request-id": "not-mine"})
    records = [json.loads(line) for line in lines.text.splitlines() if line.startswith("{")]
    drawn = [record for record in records if "drew" in record["message"]]
    assert len(drawn) == 2 and {record["request_id"] for record in drawn} == {"mine"}
    first = drawn[0]
    assert first["size"] == "128x144" and first["num_steps"] == 4 and first["degrees"] == [1, 2, 2, 2]
    assert first["slo_met"] is True and first["joules"] is None and first["model"] == "shapes"
    assert first["latency_s"] >= first["deliver_s"] >= 0 and first["queue_s"] == 0.1
    assert first["level"] == "info" and first["logger"] == "tetrion.http" and first["tenant"].startswith("ip-")
    assert f"{first['picture']}: drew shapes 128x144, 4 steps at degrees 1×1, 2×3; " in first["message"]
    assert ", deadline met" in first["message"]
    assert [record["level"] for record in records if record.get("request_id") == "not-mine"] == ["error"]


def test_whatever_is_logged_is_one_line_of_json() -> None:
    try:
        raise ValueError("first\nsecond")
    except ValueError:
        record = logging.getLogger("x").makeRecord(
            "x", logging.ERROR, __file__, 1, "two\nlines of %s", ("text",), exc_info=__import__("sys").exc_info()
        )
    setattr(record, FIELDS, {"size": "1x1"})
    text = JsonFormatter().format(record)
    line = json.loads(text)
    assert "\n" not in text and line["message"] == "two\nlines of text" and line["size"] == "1x1"
    assert "ValueError: first" in line["error"] and line["time"].endswith("Z") and "request_id" not in line


@pytest.mark.parametrize(
    ("degrees", "text"), [((1,), "degree 1"), ((2, 2), "degree 2"), ((1, 1, 2, 1), "degrees 1×2, 2×1, 1×1")]
)
def test_degrees_in_words(degrees: tuple[int, ...], text: str) -> None:
    assert degrees_text(degrees) == text
