"""Requests through a server of its own, a real one; and one that cannot start."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks.proof import served


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["served", *arguments])
    served.main()


def test_a_server_is_started_asked_and_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "made for it" / "served.json"
    line = ("--devices", "cpu:2", "--size", "128x128", "--num-steps", "3", "--num-requests", "4", "--rate", "600")
    run(monkeypatch, str(output), *line, "--slo-s", "60")
    record = json.loads(output.read_bytes())
    (row,) = record["rows"]
    assert (row["px"], row["requests"], row["answered"], row["in_time"]) == ("128x128", 4, 4, 4)
    assert set(row["degrees"]) <= {1, 2} and row["mean_s"] > 0 and 0 <= row["resized"] <= 4
    assert record["system"]["num_devices"] == 2 and record["system"]["ready_s"] > 0
    assert record["mean_joules"] is None
    assert 0 < record["loop"]["cpu_ms_per_command"] < 100 and 0 <= record["loop"]["lost_share"] < 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--profile", "nosuch.json"), "the server ended"),
        (("--model", "nosuch"), "nosuch"),
        (("--size", "128x1024"), "height: must be a multiple of 16 from 128 to 512 for model 'shapes', got 1024"),
        (("--num-requests", "0"), "num_requests: must be at least 1"),
        (("--rate", "-1"), "rate_per_min: must be from 0.001 to 1000000"),
    ],
)
def test_what_cannot_be_served_leaves_no_file(
    arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match=message):
        run(monkeypatch, str(tmp_path / "served.json"), "--devices", "cpu:1", "--size", "128x128", *arguments)
    assert not list(tmp_path.iterdir())
