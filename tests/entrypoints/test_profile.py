"""`tetrion profile` on CPU workers: a table that is a `Profile`, and an engine that plans with it."""

from pathlib import Path

import pytest

from tests.engine.specs import make_spec
from tetrion.engine.api import AsyncEngine
from tetrion.engine.config import EngineConfig
from tetrion.engine.planning.profile import read_profile
from tetrion.entrypoints.cli import run
from tetrion.entrypoints.errors import InputError
from tetrion.entrypoints.profile import checked_degrees, checked_sizes

Capture = pytest.CaptureFixture[str]


async def test_the_table_is_what_an_engine_plans_with(tmp_path: Path, capsys: Capture) -> None:
    import asyncio

    path = tmp_path / "table.json"
    arguments = ["profile", "--devices", "cpu:2", "--num-threads", "1", "--sizes", "128x128,256x128", "--steps", "1"]
    assert await asyncio.to_thread(run, [*arguments, "--output", str(path)]) == 0
    profile = read_profile(path)
    assert (profile.heads, profile.model, list(profile.classes)) == (12, "shapes", ["128x128", "256x128"])
    assert profile.degrees(256, 128) == (1, 2)
    assert profile.command == f"tetrion {' '.join(arguments[:1] + arguments[5:])} --output {path} " + " ".join(
        arguments[1:3] + arguments[3:5]
    )
    assert profile.meta["inexact_degrees"] == [] and len(profile.meta["self_test"]) == 4
    assert profile.meta["step_j"] is None and "not metered" in profile.meta["step_j_reason"]
    assert sum(profile.meta["memory"]["weights_bytes"].values()) > 60e6
    printed = capsys.readouterr().out
    assert "model 'shapes' takes" in printed and str(path) in printed
    config = EngineConfig(devices="cpu:2", num_threads=1, profile=str(path))
    async with AsyncEngine(config) as engine:
        assert engine.stats().profile == profile


def test_sizes_and_degrees_as_typed() -> None:
    spec = make_spec()
    usual = ((256, 256), (512, 512), (1024, 1024))
    assert checked_sizes(spec, None, usual) == ((256, 256), (512, 512))
    assert checked_sizes(spec, None, ((1024, 1024),)) == ((256, 256),)
    assert checked_sizes(spec, "128x256,512x512", usual) == ((128, 256), (512, 512))
    assert checked_degrees(spec, 5, None) == (1, 2, 3, 4)
    assert checked_degrees(spec, 5, "4,1") == (1, 4)
    with pytest.raises(InputError, match="sizes: sides must be multiples of 16 from 128 to 512"):
        checked_sizes(spec, "520x512", usual)
    with pytest.raises(InputError, match="degrees: 5 is not one of 1, 2, 3, 4"):
        checked_degrees(spec, 5, "1,5")
