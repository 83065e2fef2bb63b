"""`tetrion generate` and `tetrion batch` with real workers and the embedded model; once as the console command."""

import gc
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from tetrion.engine.api import AsyncEngine
from tetrion.entrypoints.batch.manifest import Entry, Manifest
from tetrion.entrypoints.cli import run

TETRION = str(Path(sys.executable).with_name("tetrion"))
START_S = 150
ONE_THREAD = ("--num-threads", "1")
"""Per worker: more of them than cores would wait for each other."""
Tetrion = Callable[..., tuple[str, str]]
pytestmark = pytest.mark.usefixtures("fork_server")


@pytest.fixture
def tetrion(capfd: pytest.CaptureFixture[str]) -> Iterator[Tetrion]:
    """The command in this process: arguments in, stdout and stderr out."""

    def command(*arguments: object, exit_code: int = 0) -> tuple[str, str]:
        capfd.readouterr()
        code = run([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        assert code == exit_code, err
        assert "Traceback" not in err
        return out, err

    yield command
    gc.unfreeze()


def generate(tetrion: Tetrion, output: Path, *arguments: object) -> list[dict[str, Any]]:
    out, _ = tetrion("generate", *arguments, "--output", output, "--json")
    images: list[dict[str, Any]] = json.loads(out)["images"]
    return images


def share_of(image: np.ndarray, colour: tuple[int, int, int]) -> float:
    """The share of pixels within 40 of `colour` in every channel."""
    return float((np.abs(image.astype(int) - colour) <= 40).all(axis=2).mean())


def test_a_prompt_becomes_its_picture(tetrion: Tetrion, tmp_path: Path) -> None:
    (image,) = generate(
        tetrion, tmp_path, "a large red circle on a navy background", "--seed", 7, "--devices", "cpu:2", *ONE_THREAD
    )
    picture = np.asarray(Image.open(image["file"]))
    assert picture.shape == (256, 256, 3) and len(image["degrees"]) == image["num_steps"] == 16
    expected = np.pi / 4 * 0.45**2
    assert share_of(picture, (0xE5, 0x39, 0x35)) == pytest.approx(expected, rel=0.35)
    assert share_of(picture, (0x0D, 0x1B, 0x4C)) == pytest.approx(1 - expected, rel=0.1)


def test_the_degrees_do_not_show_in_the_picture(tetrion: Tetrion, tmp_path: Path) -> None:
    request = ("a blue star left of a green ring", "--size", "256x128", "--seed", 3, "--num-steps", 6)
    (alone,) = generate(tetrion, tmp_path / "1", *request, "--devices", "cpu:1", *ONE_THREAD)
    (resized,) = generate(
        tetrion, tmp_path / "2", *request, "--devices", "cpu:2", *ONE_THREAD, "--force-degrees", "1,2,2,1,2,1"
    )
    assert (alone["degrees"], resized["degrees"]) == ([1] * 6, [1, 2, 2, 1, 2, 1])
    assert resized["degrees_compact"] == "1×1 2×2 1×1 2×1 1×1"
    pictures = [np.asarray(Image.open(image["file"])).astype(int) for image in (alone, resized)]
    assert np.abs(pictures[0] - pictures[1]).max() <= 1


def test_several_prompts_make_a_sheet(tetrion: Tetrion, tmp_path: Path) -> None:
    request = ("a red circle", "a cyan cross", "-n", 2, "--size", "128x128", "--seed", 5, "--num-steps", 3)
    out, _ = tetrion("generate", *request, "--devices", "cpu:1", *ONE_THREAD, "--output", tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [
        "a-cyan-cross-5.png",
        "a-cyan-cross-6.png",
        "a-red-circle-5.png",
        "a-red-circle-6.png",
        "sheet.png",
    ]
    assert f"sheet: {tmp_path / 'sheet.png'}" in out and "latency" in out


def test_bad_input_is_found_before_anything_starts(
    tetrion: Tetrion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(AsyncEngine, "start")
    (tmp_path / "model").mkdir()
    (tmp_path / "file").write_text("")
    output = ("--output", tmp_path / "out")
    for arguments, says in (
        (("a", "--size", "100x100", *output), "width: must be a multiple of 16 from 128 to 512"),
        (("a", "--model", tmp_path / "model", *output), "is missing model_index.json"),
        (("a", "--model", tmp_path / "nowhere", *output), "model: "),
        (("a", "--policy", "best", *output), "best"),
        (("a", "--output", tmp_path / "file"), "output: cannot write"),
        (("a", "--carbon", "-5", *output), "carbon: grams per kWh must be at least 0 and finite"),
        (("a", "--meter", "replay:/nonexistent", *output), "meter: cannot read '/nonexistent'"),
    ):
        _, err = tetrion("generate", *arguments, exit_code=2)
        assert says in err
    assert not (tmp_path / "out").exists()


def test_ctrl_c_leaves_no_process_and_no_half_written_file(tmp_path: Path) -> None:
    command = [
        TETRION,
        "generate",
        "a red circle",
        "-n",
        "100",
        "--size",
        "128x128",
        *ONE_THREAD,
        "--output",
        str(tmp_path),
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True) as process:
        wait_for_file(tmp_path, process)
        workers = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers too
        assert process.wait(60) == 130
        assert process.stderr is not None and b"Traceback" not in process.stderr.read()
    assert workers and not psutil.wait_procs(workers, timeout=20)[1]
    for path in tmp_path.iterdir():
        assert path.suffix == ".png"
        Image.open(path).load()


@pytest.fixture
def ctrl_c_after_a_line(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A batch is interrupted, once, as by Ctrl-C, when its manifest has the first picture's line."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    append = Manifest.append

    def appended(manifest: Manifest, entry: Entry) -> None:
        append(manifest, entry)
        if entry.status == "finished":
            monkeypatch.setattr(Manifest, "append", append)
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Manifest, "append", appended)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c_after_a_line")
def test_an_interrupted_batch_goes_on(tetrion: Tetrion, tmp_path: Path) -> None:
    requests, output = tmp_path / "requests.jsonl", tmp_path / "out"
    asked = {"prompt": "a red circle", "size": "128x128", "num_steps": 4}
    requests.write_text("\n".join([*(json.dumps(asked | {"id": f"p{i}"}) for i in range(12)), "{broken"]))
    command = ("batch", requests, "--output", output, "--devices", "cpu:2", *ONE_THREAD)
    _, err = tetrion(*command, exit_code=130)
    assert "the same command goes on from here" in err
    finished = {path.name: path.stat().st_mtime_ns for path in output.glob("*.png")}
    assert 1 <= len(finished) < 12

    out, err = tetrion(*command, exit_code=1)
    assert f"{12 - len(finished)} drawn, {len(finished)} already there, 1 failed" in out
    assert f"{requests}:13: not valid JSON" in err
    entries = [json.loads(line) for line in (output / "manifest.jsonl").read_text().splitlines()]
    assert sorted(entry["id"] for entry in entries if entry["id"]) == sorted(f"p{i}" for i in range(12))
    assert {name: (output / name).stat().st_mtime_ns for name in finished} == finished
    assert len(list(output.glob("*.png"))) == 12 and not list(output.glob(".*"))


def wait_for_file(folder: Path, process: subprocess.Popen[bytes]) -> None:
    """Until the first picture is there."""
    end = time.monotonic() + START_S
    while not list(folder.glob("[!.]*.png")):
        assert process.poll() is None, "ended before its first picture"
        assert time.monotonic() < end, "no picture in time"
        time.sleep(0.02)
