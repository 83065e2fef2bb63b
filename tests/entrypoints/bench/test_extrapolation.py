"""Degrees beyond those measured, from the library floor."""

import json
from pathlib import Path

import msgspec
import pytest

from tetrion.engine.planning.cost.profile import Profile
from tetrion.entrypoints.bench.extrapolation import FloorTable, extrapolated
from tetrion.entrypoints.bench.slo import command
from tetrion.entrypoints.errors import InputError

PROFILE = msgspec.convert(
    {
        "heads": 24,
        "meta": {"host": "h"},
        "classes": {
            "256x256": {"step_ms": {1: 20.0, 4: 12.0}, "encode_ms": 25, "decode_ms": 15},
            "1024x1024": {"step_ms": {1: 150.0, 2: 80.0}, "encode_ms": 25, "decode_ms": 120},
        },
    },
    Profile,
)
FLOORS = {"256x256": {"1": 16.0, "4": 8.0, "6": 7.0, "8": 6.0}, "1024x1024": {"2": 64.0, "4": 40.0}}


def test_a_step_is_the_floor_times_the_ratio_at_the_widest_measured_degree() -> None:
    floors = msgspec.convert({"floor_ms": FLOORS, "source": "a book"}, FloorTable, strict=False)
    profile = extrapolated(PROFILE, floors)
    assert profile.classes["256x256"].step_ms == pytest.approx({1: 20.0, 4: 12.0, 6: 7.0 * 1.5, 8: 6.0 * 1.5})
    assert profile.classes["1024x1024"].step_ms == pytest.approx({1: 150.0, 2: 80.0, 4: 40.0 * 1.25})
    marks = profile.meta["extrapolated"]
    assert profile.meta["host"] == "h" and marks["floors"] == "a book"
    assert marks["classes"]["256x256"] == {"degrees": [6, 8], "reference_degree": 4, "ratio": 1.5}
    assert "extrapolated" not in PROFILE.meta


def test_one_command_simulates_a_larger_machine_and_says_what_is_not_measured(tmp_path: Path) -> None:
    (tmp_path / "P.json").write_bytes(msgspec.json.encode(PROFILE))
    (tmp_path / "F.json").write_text(json.dumps({"floor_ms": FLOORS}))
    options = {
        "simulate": True,
        "profile": {"": tmp_path / "P.json"},
        "devices": 8,
        "policy": ["rssp"],
        "num_requests": 8,
    }
    made = command(**options, floors={"": tmp_path / "F.json"}, size=["256x256"], base_slo=[1.0])  # type: ignore[arg-type]
    plain = command(**options, size=["256x256"], base_slo=[1.0])  # type: ignore[arg-type]
    assert made["profile"]["extrapolated"]["classes"]["256x256"]["degrees"] == [6, 8]
    assert plain["profile"]["extrapolated"] is None
    assert made["rows"][0]["p50_s"] < plain["rows"][0]["p50_s"]


@pytest.mark.parametrize(
    ("floors", "complaint"),
    [
        ({"floor_ms": {"64x64": {"1": 1.0}}}, "floors: no size of the profile has a floor"),
        ({"floor_ms": {"256x256": {"4": 0.0}}}, r"F\.json: floor_ms\.256x256\.4: .*got 0\.0"),
        ({}, r"F\.json: floors: .*missing required field `floor_ms`"),
    ],
)
def test_floors_that_are_of_no_use_are_named(tmp_path: Path, floors: dict[str, object], complaint: str) -> None:
    (tmp_path / "P.json").write_bytes(msgspec.json.encode(PROFILE))
    (tmp_path / "F.json").write_text(json.dumps(floors))
    with pytest.raises(InputError, match=complaint):
        command(simulate=True, profile={"": tmp_path / "P.json"}, floors={"": tmp_path / "F.json"})
    with pytest.raises(InputError, match="floors: only with --simulate"):
        command(live=True, floors={"": tmp_path / "F.json"})
