"""The console command and checkpoints that cannot be drawn with: one line, exit code 2, nobody left behind."""

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.engine.families.folders import change, copied
from tetrion.engine.api import AsyncEngine
from tetrion.engine.config import EngineConfig
from tetrion.engine.model_spec import CheckpointError

TETRION = str(Path(sys.executable).with_name("tetrion"))


def run(command: str, *arguments: object) -> tuple[list[str], float]:
    """Lines on stderr but for the progress bar, and how long it took."""
    begun_s = time.monotonic()
    with subprocess.Popen(
        [TETRION, command, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        children: set[psutil.Process] = set()
        while process.poll() is None and time.monotonic() < begun_s + 300:
            try:
                children |= set(psutil.Process(process.pid).children(recursive=True))
            except psutil.NoSuchProcess:
                break
            time.sleep(0.02)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 2, errors
    gone, left = psutil.wait_procs(children, timeout=30)
    assert not left, f"{left} of {gone} outlive the command"
    progress = ("starting engine", "tetrion: loading", "tetrion: still loading")
    lines = [line for line in errors.splitlines() if line.strip() and not any(part in line for part in progress)]
    return lines, time.monotonic() - begun_s


def generate(folder: Path, tmp_path: Path) -> list[str]:
    return run("generate", "a circle", "--model", folder, "--devices", "cpu:2", "--output", tmp_path / "out")[0]


def test_what_files_tell_is_said_before_a_worker_starts(tmp_path: Path) -> None:
    folder = copied("shapes", tmp_path / "model")
    (folder / "tokenizer_2/tokenizer.json").unlink()
    (line,) = generate(folder, tmp_path)
    assert line == f"tetrion: error: model: '{folder}' is missing tokenizer_2/tokenizer.json (or spiece.model)"


@pytest.mark.parametrize("command", ["generate", "serve"])
def test_what_only_a_worker_finds_is_one_line_too(command: str, tmp_path: Path) -> None:
    """The libraries know which activations there are."""
    folder = copied("shapes", tmp_path / "model")
    change(folder, "text_encoder/config.json", hidden_act="no such")
    others = ("a circle", "--output", tmp_path / "out") if command == "generate" else ("--port", 0)
    (line,), _ = run(command, *others, "--model", folder, "--devices", "cpu:2")
    assert line.startswith(f"tetrion: error: model: '{folder}' cannot be loaded: ") and "no such" in line


@pytest.mark.asyncio(loop_scope="session")
async def test_an_embedded_engine_raises_it_from_start(fork_server: None, tmp_path: Path) -> None:
    folder = copied("shapes", tmp_path / "model")
    change(folder, "text_encoder/config.json", hidden_act="no such")
    engine = AsyncEngine(EngineConfig(models=(str(folder),), devices="cpu:2", num_threads=1))
    with pytest.raises(CheckpointError, match=r"cannot be loaded: .*no such"):
        await engine.start()
    assert engine.worker_pids() == {}
