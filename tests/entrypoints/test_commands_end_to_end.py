"""`tetrion generate` and `tetrion batch` as a user runs them: the console command, real workers, the embedded model."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

TETRION = str(Path(sys.executable).with_name("tetrion"))
START_S = 150


def tetrion(*arguments: object, exit_code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([TETRION, *map(str, arguments)], capture_output=True, text=True, timeout=400)
    assert done.returncode == exit_code, done.stderr
    assert "Traceback" not in done.stderr
    return done


def generate(output: Path, *arguments: object) -> list[dict[str, Any]]:
    done = tetrion("generate", *arguments, "--output", output, "--json")
    return json.loads(done.stdout)["images"]


def share_of(image: np.ndarray, colour: tuple[int, int, int]) -> float:
    """The share of pixels within 40 of `colour` in every channel."""
    return float((np.abs(image.astype(int) - colour) <= 40).all(axis=2).mean())


def test_a_prompt_becomes_its_picture(tmp_path: Path) -> None:
    (image,) = generate(tmp_path, "a large red circle on a navy background", "--seed", 7, "--devices", "cpu:2")
    picture = np.asarray(Image.open(image["file"]))
    assert picture.shape == (256, 256, 3) and len(image["degrees"]) == image["num_steps"] == 16
    expected = np.pi / 4 * 0.45**2
    assert share_of(picture, (0xE5, 0x39, 0x35)) == pytest.approx(expected, rel=0.35)
    assert share_of(picture, (0x0D, 0x1B, 0x4C)) == pytest.approx(1 - expected, rel=0.1)


def test_the_degrees_do_not_show_in_the_picture(tmp_path: Path) -> None:
    request = ("a blue star left of a green ring", "--size", "256x128", "--seed", 3, "--num-steps", 6)
    (alone,) = generate(tmp_path / "1", *request, "--devices", "cpu:1")
    (resized,) = generate(tmp_path / "2", *request, "--devices", "cpu:2", "--force-degrees", "1,2,2,1,2,1")
    assert (alone["degrees"], resized["degrees"]) == ([1] * 6, [1, 2, 2, 1, 2, 1])
    assert resized["degrees_compact"] == "1×1 2×2 1×1 2×1 1×1"
    pictures = [np.asarray(Image.open(image["file"])).astype(int) for image in (alone, resized)]
    assert np.abs(pictures[0] - pictures[1]).max() <= 1


def test_several_prompts_make_a_sheet(tmp_path: Path) -> None:
    done = tetrion(
        "generate",
        "a red circle",
        "a cyan cross",
        "-n",
        2,
        "--seed",
        5,
        "--num-steps",
        3,
        "--devices",
        "cpu:1",
        "--output",
        tmp_path,
    )
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [
        "a-cyan-cross-5.png",
        "a-cyan-cross-6.png",
        "a-red-circle-5.png",
        "a-red-circle-6.png",
        "sheet.png",
    ]
    assert f"sheet: {tmp_path / 'sheet.png'}" in done.stdout and "latency" in done.stdout


def test_bad_input_is_found_before_anything_starts(tmp_path: Path) -> None:
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
        assert says in tetrion("generate", *arguments, exit_code=2).stderr
    assert not (tmp_path / "out").exists()


def test_ctrl_c_leaves_no_process_and_no_half_written_file(tmp_path: Path) -> None:
    command = [TETRION, "generate", "a red circle", "-n", "100", "--size", "192x192", "--output", str(tmp_path)]
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


def test_an_interrupted_batch_goes_on(tmp_path: Path) -> None:
    requests, output = tmp_path / "requests.jsonl", tmp_path / "out"
    lines = [json.dumps({"prompt": f"a red circle number {i}", "size": "128x128", "id": f"p{i}"}) for i in range(12)]
    requests.write_text("\n".join([*lines, "{broken"]))
    command = [TETRION, "batch", str(requests), "--output", str(output), "--devices", "cpu:2"]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True
    ) as process:
        wait_for_file(output, process)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(60) == 130
        assert process.stderr is not None and b"the same command goes on from here" in process.stderr.read()
    finished = {path.name: path.stat().st_mtime_ns for path in output.glob("*.png")}
    assert 1 <= len(finished) < 12

    done = tetrion("batch", requests, "--output", output, "--devices", "cpu:2", exit_code=1)
    assert f"{12 - len(finished)} drawn, {len(finished)} already there, 1 failed" in done.stdout
    assert f"{requests}:13: not valid JSON" in done.stderr
    entries = [json.loads(line) for line in (output / "manifest.jsonl").read_text().splitlines()]
    assert sorted(entry["id"] for entry in entries if entry["id"]) == sorted(f"p{i}" for i in range(12))
    assert {name: (output / name).stat().st_mtime_ns for name in finished} == finished
    assert len(list(output.glob("*.png"))) == 12 and not list(output.glob(".*"))


def wait_for_file(folder: Path, process: subprocess.Popen[bytes]) -> None:
    """Until the first picture, and for a batch its manifest line, is there."""
    end = time.monotonic() + START_S
    while not _has_first(folder):
        assert process.poll() is None, "ended before its first picture"
        assert time.monotonic() < end, "no picture in time"
        time.sleep(0.02)


def _has_first(folder: Path) -> bool:
    if not list(folder.glob("[!.]*.png")):
        return False
    manifest = folder / "manifest.jsonl"
    return not manifest.exists() or manifest.stat().st_size > 0
