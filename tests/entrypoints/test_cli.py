"""Exit codes, one-line errors, and how little `--help` imports."""

import json
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from tests.entrypoints.conftest import FakeFactory
from tetrion.engine.config import EngineConfig
from tetrion.engine.energy.early_check import MeteringError
from tetrion.engine.energy.meters.base import MeterUnavailable
from tetrion.engine.errors import DeadlineUnmeetable, GenerationError
from tetrion.engine.model_spec import CheckpointError
from tetrion.engine.planning.horizon_options import HorizonOptions
from tetrion.engine.transport.segment import SharedMemoryError
from tetrion.entrypoints.cli import run

Tetrion = Callable[..., int]
Capture = pytest.CaptureFixture[str]


def error_of(capture: Capture) -> str:
    out, err = capture.readouterr()
    assert out == ""
    return err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--size", "250x256"], "width: must be a multiple of 16 from 128 to 512"),
        (["--size", "256x528"], "height: must be a multiple of 16 from 128 to 512"),
        (["--size", "256"], "size: expected WIDTHxHEIGHT"),
        (["--size", "256x-256"], "size: expected WIDTHxHEIGHT"),
        (["-n", "0"], "n: must be from 1 to 100, got 0"),
        (["-n", "101"], "n: must be from 1 to 100, got 101"),
        (["--num-steps", "0"], "num_steps: must be from 1 to 1000, got 0"),
        (["--num-steps", "1001"], "num_steps: must be from 1 to 1000, got 1001"),
        (["--seed", "-1"], "seed: must be from 0 to"),
        (["--seed", str(2**63)], "seed: must be from 0 to"),
        (["--seed", str(2**63 - 1), "-n", "2"], "seed: must be from 0 to"),
        (["--guidance", "nan"], "guidance: must be from 0 to 100"),
        (["--negative-prompt", "blue"], "negative_prompt: takes a true_cfg_scale above 1"),
        (["--true-cfg-scale", "3"], "true_cfg_scale: above 1 takes a negative_prompt"),
        (["--slo-ms", "0"], "slo_ms: must be above 0"),
        (["--force-degrees", "1,x"], "force_degrees: expected whole numbers"),
        (["--force-degrees", "5"], "force_degrees: 5 is not one of 1, 2"),
        (["--devices", "cpu:0"], "devices: expected cpu:N with N from 1 to 64"),
        (["--devices", "tpu"], "devices: expected cpu:N"),
        (["--num-threads", "0"], "--num-threads"),
        (["--planner", "late_worth"], "planner: expected KEY=VALUE"),
        (["--planner", "drop=largest"], "planner.options.drop: "),
        (["--planner", "pace=2"], "planner: there is no option 'pace'; policy horizon has drop, late_worth"),
        (
            ["--policy", "fixed-1", "--planner", "late_worth=2"],
            "planner: there is no option 'late_worth'; policy fixed-1 has none, every planner lead_s, chunk_s",
        ),
        (["--planner", 'tenant_weights={"gold": 0}'], "planner.tenant_weights"),
        (["--carbon", "hours.csv"], "'hours.csv' is not a valid float"),
        (["--carbon", ""], "'' is not a valid float"),
        (["--meter", "watt"], "metering.meter: "),
        (["--num-steps", "many"], "--num-steps"),
        (["--prompts", "missing.txt"], "prompts: cannot read 'missing.txt'"),
    ],
)
def test_bad_input_names_field_and_bound(
    tetrion: Tetrion, tmp_path: Path, capsys: Capture, arguments: list[str], says: str
) -> None:
    output = tmp_path / "out"
    devices = [] if "--devices" in arguments else ["--devices", "cpu:2"]
    assert tetrion("generate", "a red circle", "--output", output, *devices, *arguments) == 2
    err = error_of(capsys)
    assert says in err and "Traceback" not in err
    assert not output.exists()


def test_no_prompt_empty_prompt_and_over_long_prompt(tetrion: Tetrion, tmp_path: Path, capsys: Capture) -> None:
    for arguments, says in (
        ([], "prompt: give at least one"),
        (["  "], "prompt: must not be empty"),
        (["x" * 32_001], "prompt: has 32001 characters, at most 32000"),
        (["bad \udcff byte"], "prompt: must be valid Unicode"),
    ):
        assert tetrion("generate", *arguments, "--output", tmp_path / "out") == 2
        assert says in error_of(capsys)
    assert not (tmp_path / "out").exists()


def test_unwritable_output_is_known_before_the_engine_starts(
    tetrion: Tetrion, factory: FakeFactory, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "file").write_text("")
    assert tetrion("generate", "a red circle", "--output", tmp_path / "file" / "out") == 2
    assert "output: cannot write to folder" in error_of(capsys)
    assert factory.last.num_starts == 0


@pytest.mark.parametrize(
    ("error", "exit_code", "says"),
    [
        (GenerationError("worker 0 did not start"), 1, "generation failed: worker 0 did not start"),
        (
            DeadlineUnmeetable(5.0, 900.0),
            1,
            "deadline cannot be met: slo_ms: 5 cannot be met now, the earliest",
        ),
        (MeteringError("meter: NVML shows no GPU GPU-a"), 2, "meter: NVML shows no GPU GPU-a"),
        (SharedMemoryError("slab-0", 9, 3, "MemAvailable"), 2, "wanted 9 bytes, 3 bytes are available"),
        (OSError(24, "Too many open files"), 1, "Too many open files"),
    ],
)
def test_an_engine_that_does_not_start_is_one_line(
    tetrion: Tetrion, factory: FakeFactory, tmp_path: Path, capsys: Capture, error: Exception, exit_code: int, says: str
) -> None:
    factory.start_error = error
    assert tetrion("generate", "a red circle", "--output", tmp_path) == exit_code
    lines = [line for line in error_of(capsys).splitlines() if line.startswith("tetrion: error:")]
    assert len(lines) == 1 and says in lines[0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["generate", "batch", "serve"])
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--carbon", "-5"], "carbon: grams per kWh must be at least 0 and finite, got -5.0"),
        (["--carbon", "-1e3"], "carbon: grams per kWh must be at least 0 and finite, got -1000.0"),
        (["--carbon", "1e400"], "carbon: grams per kWh must be at least 0 and finite, got inf"),
        (["--meter", "replay:/nonexistent"], "meter: cannot read '/nonexistent'"),
        (["--meter", "nvml"], "meter: NVML does not start"),
    ],
)
def test_a_bad_meter_or_carbon_is_one_line_before_anything_starts(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, command: str, arguments: list[str], says: str
) -> None:
    def not_there() -> None:
        raise MeterUnavailable("NVML does not start: no driver")

    def start(*_: object) -> None:
        raise AssertionError("workers were started")

    monkeypatch.setattr("tetrion.engine.energy.meters.nvml._import_nvml", not_there)
    monkeypatch.setattr("tetrion.engine.executors.processes.ProcessExecutor.start", start)
    (tmp_path / "requests.jsonl").write_text('{"prompt": "a red circle"}\n')
    output = ["--output", str(tmp_path / "out")]
    what = {"generate": ["a", *output], "batch": [str(tmp_path / "requests.jsonl"), *output], "serve": ["--port", "0"]}
    assert run([command, *what[command], "--devices", "cpu:1", *arguments]) == 2
    (line,) = error_of(capsys).splitlines()
    assert line.startswith(f"tetrion: error: {says}")
    assert not (tmp_path / "out").exists()


def test_a_bad_checkpoint_is_bad_input(tmp_path: Path, capsys: Capture) -> None:
    def refuse(config: object) -> None:
        raise CheckpointError("model: '/nowhere' is not a folder")

    assert run(["generate", "a", "--output", str(tmp_path / "out")], refuse) == 2  # type: ignore[arg-type]
    assert "model: '/nowhere' is not a folder" in error_of(capsys)


def test_a_defect_keeps_its_traceback(tetrion: Tetrion, tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="secret detail"):
        tetrion("generate", "crash", "--output", tmp_path)


def test_ctrl_c_is_130(tetrion: Tetrion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    def interrupt(main: object) -> int:
        main.close()  # type: ignore[attr-defined]
        raise KeyboardInterrupt

    monkeypatch.setattr("tetrion.entrypoints.session.run_async", interrupt)
    assert tetrion("generate", "a red circle", "--output", tmp_path) == 130
    assert "interrupted" in error_of(capsys)


def test_the_planners_settings_reach_the_engine(tetrion: Tetrion, factory: FakeFactory, tmp_path: Path) -> None:
    settings = ("admission=reject-hopeless", "late_worth=2", 'tenant_weights={"gold": 4}', "chunk_s=0.2")
    arguments = [word for setting in settings for word in ("--planner", setting)]
    assert tetrion("generate", "a red circle", *arguments, "--output", tmp_path) == 0
    planner = factory.last.config.planner
    assert (planner.policy, planner.admission) == ("horizon", "reject-hopeless")
    assert planner.options == HorizonOptions(late_worth=2.0)
    assert (planner.tenant_weights, planner.chunk_s) == ({"gold": 4.0}, 0.2)


@pytest.mark.parametrize(
    ("arguments", "admission", "timeout_s"),
    [
        ([], "reject-hopeless", 600.0),
        (["--admission", "all", "--queue-timeout-s", "7"], "all", 7.0),
        (["--planner", "admission=all", "--planner", "late_worth=2"], "all", 600.0),
        (["--planner", "admission=all", "--admission", "reject-hopeless"], "reject-hopeless", 600.0),
    ],
)
def test_a_server_refuses_what_is_hopeless_and_lets_nobody_wait_for_ever(
    arguments: list[str], admission: str, timeout_s: float
) -> None:
    seen: list[EngineConfig] = []

    def make(config: EngineConfig) -> Any:
        seen.append(config)
        raise CheckpointError("none is needed")

    assert run(["serve", "--port", "0", *arguments], make) == 2
    assert (seen[0].planner.admission, seen[0].queue_timeout_s) == (admission, timeout_s)


def test_the_options_of_metering_reach_the_engine(tetrion: Tetrion, factory: FakeFactory, tmp_path: Path) -> None:
    arguments = ("--meter", "none", "--carbon", "350")
    assert tetrion("generate", "a red circle", *arguments, "--output", tmp_path) == 0
    metering = factory.last.config.metering
    assert (metering.meter, metering.carbon) == ("none", 350.0)


def test_unknown_command_and_option(tetrion: Tetrion, capsys: Capture) -> None:
    assert tetrion("paint") == 2
    assert tetrion("generate", "a", "--colour", "red") == 2
    assert "No such command 'paint'" in capsys.readouterr().err


def test_version(tetrion: Tetrion, capsys: Capture) -> None:
    assert tetrion("--version") == 0
    assert version("tetrion") in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["generate", "--help"], ["batch", "--help"], ["serve", "--help"], ["bench", "step", "--help"]],
)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys, json; from tetrion.entrypoints.cli import run\n"
        f"code = run({arguments!r})\n"
        "print(json.dumps([code, sorted({name.partition('.')[0] for name in sys.modules})]), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True, timeout=60)
    exit_code, modules = json.loads(done.stderr)
    assert exit_code == 0 and done.stdout.startswith("Usage: tetrion")
    assert not {"torch", "numpy", "PIL", "rich", "uvicorn", "starlette", "uvloop", "asyncio"} & set(modules)


def test_no_command_here_imports_torch() -> None:
    code = (
        "import sys\n"
        "import tetrion.entrypoints.batch.run, tetrion.entrypoints.generate, tetrion.entrypoints.http.server\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True, timeout=60)
