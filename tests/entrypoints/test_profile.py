"""`tetrion profile` on CPU workers: a table that is a `Profile`, and an engine that plans with it."""

from pathlib import Path

import pytest

from tests.engine.specs import make_spec
from tetrion.engine.api import AsyncEngine
from tetrion.engine.config import EngineConfig
from tetrion.engine.energy.metering import CPU_ONLY
from tetrion.engine.energy.meters.base import EnergyMeter, NoMeter, Reading
from tetrion.engine.planning.cost.profile import read_profile
from tetrion.entrypoints.cli import run
from tetrion.entrypoints.errors import InputError
from tetrion.entrypoints.profile import checked_degrees, checked_sizes
from tetrion.entrypoints.profile_energy import StageMeter

Capture = pytest.CaptureFixture[str]


@pytest.mark.usefixtures("fork_server")
async def test_the_table_is_what_an_engine_plans_with(tmp_path: Path, capsys: Capture) -> None:
    import asyncio

    path = tmp_path / "table.json"
    arguments = ["profile", "--devices", "cpu:2", "--num-threads", "1", "--sizes", "128x128,256x128", "--steps", "1"]
    assert await asyncio.to_thread(run, [*arguments, "--output", str(path)]) == 0
    profile = read_profile(path)
    assert (profile.heads, profile.model, list(profile.classes)) == (12, "shapes", ["128x128", "256x128"])
    assert profile.degrees("256x128") == (1, 2)
    assert profile.command == f"tetrion {' '.join(arguments[:1] + arguments[5:])} --output {path} " + " ".join(
        arguments[1:3] + arguments[3:5]
    )
    assert profile.meta["inexact_degrees"] == [] and len(profile.meta["self_test"]) == 4
    assert profile.meta["step_j_reason"] == CPU_ONLY and profile.meta["step_j_source"] is None
    assert all(not cost.step_j and cost.encode_j is None for cost in profile.classes.values())
    assert sum(profile.meta["memory"]["weights_bytes"].values()) > 60e6
    printed = capsys.readouterr().out
    assert "shapes takes" in printed and str(path) in printed and f"joules: not metered: {CPU_ONLY}" in printed
    config = EngineConfig(devices="cpu:2", num_threads=1, profiles={"shapes": str(path)})
    async with AsyncEngine(config) as engine:
        assert engine.stats().profiles == {"shapes": profile}


@pytest.mark.usefixtures("fork_server")
async def test_a_guided_model_is_priced_by_its_branches(tmp_path: Path) -> None:
    import asyncio

    path = tmp_path / "table.json"
    arguments = ["profile", "--model", "shapes-sd3", "--devices", "cpu:2", "--num-threads", "1", "--steps", "1"]
    assert await asyncio.to_thread(run, [*arguments, "--sizes", "128x128", "--output", str(path)]) == 0
    profile = read_profile(path)
    assert list(profile.classes) == ["128x128*2"] and profile.degrees("128x128*2") == (1, 2)
    assert [row["size"] for row in profile.meta["self_test"]] == ["128x128*2"] * 2


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


class Gpus(NoMeter):
    """Three GPUs at 100, 200 and 400 W on a clock that only `work` moves, and a probe whose steps take 50 ms."""

    source, reason, resolution_s = "counters", "", 0.0
    uuids = ("GPU-a", "GPU-b", "GPU-c")

    def __init__(self, known: int = 3) -> None:
        self.now_s, self.known = 0.0, known

    def read(self, counters: bool = True) -> Reading:
        watts = dict(zip(self.uuids[: self.known], (100, 200, 400), strict=False))
        return Reading(time_s=self.now_s, joules={uuid: w * self.now_s for uuid, w in watts.items()}, watts={})

    async def runs(self, size: object, num_steps: int, chunk: tuple[object, int], count: int) -> None:
        self.now_s += 0.05 * chunk[1] * count

    async def work(self) -> None:
        self.now_s += 0.2


def stage_meter(gpus: Gpus, meter: EnergyMeter | None = None) -> StageMeter:
    return StageMeter(gpus, meter or gpus, dict(enumerate(Gpus.uuids)))  # type: ignore[arg-type]


async def test_joules_are_those_of_the_gpus_at_work_over_a_whole_window() -> None:
    gpus = Gpus()
    meter = stage_meter(gpus)
    assert await meter.step_j((512, 512), (0, 2), 8, 0.05) == pytest.approx(500 * 0.05)
    assert gpus.now_s >= 5.0
    assert await meter.repeated_j(gpus.work, 1, 0.2) == pytest.approx(200 * 0.2)
    assert gpus.now_s >= 10.0 and meter.reason == ""


async def test_joules_that_are_not_told_are_unknown_with_the_reason() -> None:
    blind = stage_meter(Gpus(), NoMeter("there is no counter"))
    assert await blind.step_j((512, 512), (0,), 8, 0.05) is None and blind.reason == "there is no counter"
    partly = stage_meter(Gpus(known=2))
    assert await partly.repeated_j(Gpus().work, 0, 0.2) is None and "GPU-c did not tell" in partly.reason
