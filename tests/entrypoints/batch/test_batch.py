"""`tetrion batch` on a test double: ids, seeds, bad lines, resuming, interruption."""

import asyncio
import fcntl
import gzip
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from tests.entrypoints.conftest import BEGINNER, SPEC, FakeFactory
from tetrion.engine.config import EngineConfig
from tetrion.engine.families.served import serving
from tetrion.engine.request import EnergyOptions, ImageRequest
from tetrion.entrypoints import pictures as pictures_module
from tetrion.entrypoints.batch.lines import RequestLine, seed_of_id
from tetrion.entrypoints.batch.run import batch

Tetrion = Callable[..., int]
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def lines(*entries: object) -> Path:
        path = tmp_path / "requests.jsonl"
        path.write_text(
            "".join((e if isinstance(e, str) else json.dumps(e)) + "\n" for e in entries),
            encoding="utf-8",
            errors="surrogateescape",
        )
        return path

    return lines


def manifest(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]


def pictures(out: Path) -> list[str]:
    return sorted(path.name for path in out.iterdir() if path.name != "manifest.jsonl")


def wait_for_entries(out: Path, number: int) -> None:
    while not (out / "manifest.jsonl").exists() or len(manifest(out)) < number:
        time.sleep(0.005)


def test_every_line_becomes_a_picture(tetrion: Tetrion, write: Callable[..., Path], out: Path, capsys: Capture) -> None:
    requests = write(
        {"prompt": "a star", "size": "128x256", "seed": 7, "num_steps": 3, "guidance": 2, "slo_ms": 900, "id": "a.1"},
        "",
        {"prompt": "a circle"},
        {"prompt": "a ring", "id": 12},
    )
    assert tetrion("batch", requests, "--output", out) == 0
    assert pictures(out) == ["12.png", "3.png", "a.1.png"]
    assert Image.open(out / "a.1.png").size == (128, 256)
    by_id = {entry["id"]: entry for entry in manifest(out)}
    first = by_id["a.1"]
    assert (first["line"], first["status"], first["file"], first["seed"]) == (1, "finished", "a.1.png", 7)
    assert first["degrees"] == [1, 2, 2] and first["latency_s"] == 0.5 and first["slo_met"] is True
    assert first["energy"]["active_j"] is None and first["energy"]["reasons"]["active_j"]
    assert by_id["3"]["seed"] == seed_of_id("3") and by_id["3"]["line"] == 3
    assert "3 drawn, 0 already there, 0 failed" in capsys.readouterr().out


def test_lines_of_a_table_with_gaps(
    tetrion: Tetrion, factory: FakeFactory, write: Callable[..., Path], out: Path
) -> None:
    """pandas and datasets write whole numbers of a column with gaps as 3.0, and gaps as null."""
    optional = [name for name in RequestLine.__struct_fields__ if name != "prompt"]
    floats = {"prompt": "a", "seed": 3.0, "num_steps": 2.0, "priority": -1.0, "id": 8.0, "size": "auto"}
    gaps = {"prompt": "b"} | dict.fromkeys(optional)
    assert tetrion("batch", write(floats, gaps), "--output", out) == 0
    assert pictures(out) == ["2.png", "8.png"]
    sent = [handle.request for handle in factory.last.handles]
    assert [(r.seed, r.num_steps, r.priority) for r in sent] == [(3, 2, -1), (seed_of_id("2"), 4, 0)]
    assert sent[1].energy == EnergyOptions()


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be", "utf-32", "utf-32-le", "gzip"])
def test_files_of_other_programs(tetrion: Tetrion, tmp_path: Path, out: Path, encoding: str) -> None:
    path, text = tmp_path / "requests.jsonl", '{"prompt": "ein grüner Stern"}\r\n{"prompt": "b"}\r\n'
    path.write_bytes(gzip.compress(text.encode(), mtime=0) if encoding == "gzip" else text.encode(encoding))
    assert tetrion("batch", path, "--output", out) == 0
    assert {entry["prompt"] for entry in manifest(out)} == {"ein grüner Stern", "b"}


@pytest.mark.parametrize("content", [b"\x1f\x8b broken", b"\xff\xfea", gzip.compress(b"{}" * 99, mtime=0)[:-9]])
def test_a_damaged_file_is_bad_input(
    tetrion: Tetrion, tmp_path: Path, out: Path, content: bytes, capsys: Capture
) -> None:
    (tmp_path / "requests.jsonl").write_bytes(content)
    assert tetrion("batch", tmp_path / "requests.jsonl", "--output", out) == 2
    assert "requests: cannot read" in capsys.readouterr().err


def test_a_rerun_draws_only_what_is_missing_or_changed(
    tetrion: Tetrion, factory: FakeFactory, write: Callable[..., Path], out: Path, capsys: Capture
) -> None:
    same, gone, changed = {"prompt": "same"}, {"prompt": "gone"}, {"prompt": "changed", "seed": 1}
    assert tetrion("batch", write(same, gone, changed), "--output", out) == 0
    before = (out / "1.png").stat().st_mtime_ns
    (out / "2.png").unlink()
    assert tetrion("batch", write(same, gone, changed | {"seed": 2}, {"prompt": "new"}), "--output", out) == 0
    assert [handle.request.prompt for handle in factory.last.handles] == ["gone", "changed", "new"]
    assert (out / "1.png").stat().st_mtime_ns == before
    assert "3 drawn, 1 already there, 0 failed" in capsys.readouterr().out
    assert sorted(entry["id"] for entry in manifest(out)) == ["1", "2", "3", "4"]
    assert (np.asarray(Image.open(out / "3.png")) == (2, 0, 128)).all()


async def test_pictures_of_another_checkpoint_of_the_same_name_are_drawn_again(
    factory: FakeFactory, write: Callable[..., Path], out: Path, tmp_path: Path
) -> None:
    requests = write({"prompt": "a star"})
    for parent, weight, num_drawn in (("a", 1.0, 1), ("copy", 1.0, 0), ("b", 1.1, 1)):
        (tmp_path / parent / "shapes" / "vae").mkdir(parents=True)
        weights = {"bias": np.full(3, weight, np.float32)}
        save_file(weights, tmp_path / parent / "shapes" / "vae" / "model.safetensors")
        engine = factory(EngineConfig(devices="cpu:1"))
        engine.models = serving(msgspec.structs.replace(SPEC, path=str(tmp_path / parent / "shapes")))
        assert await batch(requests, out, engine) == 0
        assert len(engine.handles) == num_drawn


def test_each_line_is_drawn_by_its_model(
    tetrion: Tetrion, write: Callable[..., Path], out: Path, capsys: Capture
) -> None:
    several = ("--model", "flux", "--model", "sd3", "--model-alias", "best=sd3")
    stars = [{"prompt": "a star"} | named for named in ({}, {"model": "sd3"}, {"model": "best"}, {"model": "dall-e"})]
    assert tetrion("batch", write(*stars), "--output", out, *several) == 1
    assert "model: 'dall-e' is not served here; served: flux, sd3" in capsys.readouterr().err
    drew = {entry["id"]: entry.get("model") for entry in manifest(out)}
    assert drew == {"1": "flux", "2": "sd3", "3": "sd3", "4": None}
    assert Image.open(out / "2.png").text["model"] == "sd3"  # type: ignore[attr-defined]


def test_pictures_of_random_weights_are_not_the_models(
    tetrion: Tetrion, write: Callable[..., Path], out: Path, capsys: Capture
) -> None:
    requests = write({"prompt": "a star"})
    for options in (["--load-format", "dummy"], []):
        assert tetrion("batch", requests, "--output", out, *options) == 0
        assert "1 drawn, 0 already there" in capsys.readouterr().out


def test_a_file_of_somebody_else_is_never_replaced(
    tetrion: Tetrion, factory: FakeFactory, write: Callable[..., Path], out: Path, capsys: Capture
) -> None:
    assert tetrion("generate", "a", "b", "--output", out, "--seed", 5) == 0
    before = {name: (out / name).read_bytes() for name in ("sheet.png", "a-5.png")}
    (out / "link.png").symlink_to("nowhere")
    (out / "folder.png").mkdir()
    alike = {"prompt": "a", "seed": 5, "id": "a-5"}
    others = ({"prompt": "x", "id": name} for name in ("sheet", "link", "folder", "free"))
    assert tetrion("batch", write(alike, *others), "--output", out) == 1
    captured = capsys.readouterr()
    assert f":2: id: '{out / 'sheet.png'}' exists and is not of this batch" in captured.err
    assert "1 drawn, 0 already there, 4 failed" in captured.out
    assert [handle.request.prompt for handle in factory.last.handles] == ["x"]
    assert {name: (out / name).read_bytes() for name in before} == before
    assert (out / "link.png").is_symlink() and (out / "folder.png").is_dir()
    status = {entry["id"]: entry["status"] for entry in manifest(out)}
    assert status == dict.fromkeys(("a-5", "sheet", "link", "folder"), "failed") | {"free": "finished"}


async def test_a_file_that_appears_meanwhile_is_not_replaced(
    factory: FakeFactory, write: Callable[..., Path], out: Path, capsys: Capture
) -> None:
    requests = write({"prompt": "a", "id": "sheet"}, {"prompt": "b"})
    engine = factory(EngineConfig(devices="cpu:1"))
    submit = engine.submit

    def submit_late(request: ImageRequest) -> Any:
        (out / "sheet.png").write_bytes(b"a sheet")
        return submit(request)

    engine.submit = submit_late
    assert await batch(requests, out, engine) == 1
    assert (out / "sheet.png").read_bytes() == b"a sheet"
    assert "line 1 (sheet): id: " in capsys.readouterr().err
    assert {entry["id"]: entry["status"] for entry in manifest(out)} == {"sheet": "failed", "2": "finished"}


@pytest.mark.parametrize("seed", [1, 2])
def test_a_picture_whose_run_was_killed_before_its_manifest_line_is_drawn_again(
    tetrion: Tetrion, write: Callable[..., Path], out: Path, seed: int
) -> None:
    """Also if its line has changed since: a run drops lines it is about to draw anew."""
    assert tetrion("batch", write({"prompt": "a", "seed": 1}), "--output", out) == 0
    (out / "manifest.jsonl").write_bytes(b"")
    assert tetrion("batch", write({"prompt": "a", "seed": seed}), "--output", out) == 0
    assert [entry["seed"] for entry in manifest(out)] == [seed]
    assert (np.asarray(Image.open(out / "1.png")) == (seed, 0, 128)).all()


def test_nothing_to_do_starts_no_engine(
    tetrion: Tetrion, factory: FakeFactory, write: Callable[..., Path], out: Path
) -> None:
    requests = write({"prompt": "a star"})
    assert tetrion("batch", requests, "--output", out) == 0
    kept = (out / "manifest.jsonl").read_text()
    assert tetrion("batch", requests, "--output", out) == 0
    assert [engine.num_starts for engine in factory.engines] == [1, 0]
    assert (out / "manifest.jsonl").read_text() == kept


BAD_LINES = [
    ("{", "not valid JSON", None),
    ('{"prompt": "\udcff"}', "not valid JSON", None),
    ("[1]", "Expected `object`, got `array`", None),
    ('{"prompt": 1}', "prompt: must be text, got 1", "2"),
    ('{"prompt": null}', "prompt: must be text, got None", "2"),
    ('{"seed": 1}', "prompt: is required", None),
    ('{"prompt": "a", "stepz": 1}', "'stepz' is no field of a line, which are prompt, model, size, seed", None),
    ('{"prompt": "a", "id": "../up"}', "id: expected 1 to 100 letters", None),
    ('{"prompt": "a", "id": ".hidden"}', "id: expected 1 to 100 letters", None),
    ('{"prompt": "a", "id": "a\\nb"}', "id: expected 1 to 100 letters", None),
    ('{"prompt": "a", "id": -1}', "id: must be from 0 to 999999999999999999, got -1", None),
    ('{"prompt": "a", "id": 8.5}', "id: must be a whole number from 0 to 999999999999999999, got 8.5", None),
    ('{"prompt": "a", "id": true}', "id: must be a whole number from 0", None),
    ('{"prompt": "a", "seed": 3.5}', "seed: must be a whole number from 0 to 9223372036854775807, got 3.5", "2"),
    ('{"prompt": "a", "seed": "3"}', "seed: must be a whole number", "2"),
    ('{"prompt": "a", "num_steps": false}', "num_steps: must be a whole number from 1 to 1000", "2"),
    ('{"prompt": "a", "seed": NaN}', "not valid JSON", None),
    ('{"prompt": "a", "size": 256}', "size: must be text such as 256x256", "2"),
    ('{"prompt": "a", "energy": "fastest"}', "energy: must be an EnergyOptions", "2"),
    ('{"prompt": "a", "seed": ' + "[" * 5000, "not valid JSON", None),
    ('{"prompt": " ", "id": "x"}', "prompt: must not be empty", "x"),
    ('{"prompt": "a", "size": "100x100"}', "width: must be a multiple of 16", "2"),
    ('{"prompt": "a", "size": "big"}', "size: expected WIDTHxHEIGHT", "2"),
    (
        '{"prompt": "a", "energy": {"mode": "cheap"}}',
        "energy.mode: must be one of fastest, balanced, least-energy",
        "2",
    ),
    ('{"prompt": "a", "energy": {"budget_j": 0}}', "energy.budget_j: must be above 0", "2"),
    ('{"prompt": "a", "num_steps": 0}', "num_steps: must be from 1 to 1000", "2"),
    ('{"prompt": "a", "id": "FIRST"}', "id: 'FIRST' is taken by line 1", "FIRST"),
    ("\x00\x01", "not valid JSON", None),
]


@pytest.mark.parametrize(("bad", "says", "identifier"), BAD_LINES)
def test_a_bad_line_is_reported_with_its_number_and_stops_nothing(
    tetrion: Tetrion,
    write: Callable[..., Path],
    out: Path,
    capsys: Capture,
    bad: str,
    says: str,
    identifier: str | None,
) -> None:
    requests = write({"prompt": "a", "id": "first"}, bad, {"prompt": "a", "id": "last"})
    assert tetrion("batch", requests, "--output", out) == 1
    assert pictures(out) == ["first.png", "last.png"]
    captured = capsys.readouterr()
    assert f"{requests}:2: " in captured.err and says in captured.err
    assert "2 drawn, 0 already there, 1 failed" in captured.out
    (failed,) = (entry for entry in manifest(out) if entry["status"] == "failed")
    assert failed["line"] == 2 and says in failed["error"] and failed["id"] == identifier


def test_a_failed_request_is_recorded_and_tried_again(
    tetrion: Tetrion, factory: FakeFactory, write: Callable[..., Path], out: Path, capsys: Capture
) -> None:
    requests = write({"prompt": "a star"}, {"prompt": "fail", "id": "f"}, {"prompt": "a ring"})
    for already in (0, 2):
        assert tetrion("batch", requests, "--output", out) == 1
        captured = capsys.readouterr()
        assert "line 2 (f): worker 1 was lost" in captured.err
        assert f"{2 - already} drawn, {already} already there, 1 failed" in captured.out
    assert [(e["id"], e["status"]) for e in manifest(out) if e["id"] == "f"] == [("f", "failed")]
    assert [handle.request.prompt for handle in factory.last.handles] == ["fail"]
    assert pictures(out) == ["1.png", "3.png"]


def test_lines_may_have_an_energy_mode_and_budget(
    tetrion: Tetrion, factory: FakeFactory, write: Callable[..., Path], out: Path, capsys: Capture
) -> None:
    energy = {"mode": "balanced", "budget_j": 50}
    assert (
        tetrion(
            "batch", write({"prompt": "a", "energy": energy}, {"prompt": "dear", "energy": energy}), "--output", out
        )
        == 1
    )
    assert factory.last.handles[0].request.energy == EnergyOptions(mode="balanced", budget_j=50)
    assert "line 2 (2): energy.budget_j: 50 J cannot be met: the cheapest plan" in capsys.readouterr().err
    assert pictures(out) == ["1.png"]


def test_a_torn_manifest_and_leftovers_of_a_killed_run_are_mended(
    tetrion: Tetrion, factory: FakeFactory, write: Callable[..., Path], out: Path
) -> None:
    requests = write({"prompt": "a"}, {"prompt": "b"})
    assert tetrion("batch", requests, "--output", out) == 0
    whole = (out / "manifest.jsonl").read_bytes()
    (out / "manifest.jsonl").write_bytes(whole[:-9])  # as after a power cut within the second line
    (out / ".tetrion-0123.tmp").write_bytes(b"half a pic")
    assert tetrion("batch", requests, "--output", out) == 0
    assert len(factory.last.handles) == 1
    assert sorted(entry["id"] for entry in manifest(out)) == ["1", "2"]
    assert pictures(out) == ["1.png", "2.png"]


async def test_an_interrupted_run_goes_on_where_it_stopped(
    factory: FakeFactory, write: Callable[..., Path], out: Path, capsys: Capture
) -> None:
    requests = write({"prompt": "a"}, {"prompt": "slow"}, {"prompt": "b"})
    running = asyncio.create_task(batch(requests, out, factory(EngineConfig(devices="cpu:1"))))
    await asyncio.to_thread(wait_for_entries, out, 2)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert "interrupted after 2 of 3" in capsys.readouterr().err
    assert factory.last.handles[1].is_cancelled and not factory.last.is_running
    assert sorted(entry["id"] for entry in manifest(out)) == ["1", "3"] and pictures(out) == ["1.png", "3.png"]

    faster = write({"prompt": "a"}, {"prompt": "quick"}, {"prompt": "b"})
    assert await batch(faster, out, factory(EngineConfig(devices="cpu:1"))) == 0
    assert [handle.request.prompt for handle in factory.last.handles] == ["quick"]


async def test_a_picture_in_the_writing_is_finished_and_recorded_when_interrupted(
    factory: FakeFactory, write: Callable[..., Path], out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoding, interrupted, encode = threading.Event(), threading.Event(), pictures_module.encode

    def slow_encode(*arguments: Any, **options: Any) -> bytes:
        encoding.set()
        assert interrupted.wait(20)
        return encode(*arguments, **options)

    monkeypatch.setattr(pictures_module, "encode", slow_encode)
    running = asyncio.create_task(batch(write({"prompt": "a"}), out, factory(EngineConfig(devices="cpu:1"))))
    assert await asyncio.to_thread(encoding.wait, 20)
    running.cancel()
    await asyncio.sleep(0)
    interrupted.set()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert [entry["id"] for entry in manifest(out)] == ["1"] and pictures(out) == ["1.png"]


def test_a_full_disk_is_told_with_the_manifests_name(
    tetrion: Tetrion, write: Callable[..., Path], out: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tetrion.entrypoints.batch.manifest.os.write", full)
    for requests in (write({"prompt": "a"}), write("{")):
        assert tetrion("batch", requests, "--output", out) == 1
        said = f"tetrion: error: [Errno 28] No space left on device: '{out / 'manifest.jsonl'}'"
        assert said in capsys.readouterr().err


def test_entries_of_other_request_files_are_kept(tetrion: Tetrion, write: Callable[..., Path], out: Path) -> None:
    assert tetrion("batch", write({"prompt": "a", "id": "one"}), "--output", out) == 0
    assert tetrion("batch", write({"prompt": "b", "id": "two"}), "--output", out) == 0
    assert [entry["id"] for entry in manifest(out)] == ["one", "two"]


def test_one_run_at_a_time(tetrion: Tetrion, write: Callable[..., Path], out: Path, capsys: Capture) -> None:
    out.mkdir()
    fd = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        assert tetrion("batch", write({"prompt": "a"}), "--output", out) == 2
    finally:
        os.close(fd)
    assert "output: another batch is writing to" in capsys.readouterr().err
    assert pictures(out) == []


def test_more_lines_than_may_be_in_flight(tetrion: Tetrion, write: Callable[..., Path], out: Path) -> None:
    requests = write(*({"prompt": f"picture {i}"} for i in range(150)))
    assert tetrion("batch", requests, "--output", out) == 0
    assert len(pictures(out)) == len(manifest(out)) == 150


def test_missing_file_and_empty_file(tetrion: Tetrion, write: Callable[..., Path], out: Path, capsys: Capture) -> None:
    assert tetrion("batch", "nothing.jsonl", "--output", out) == 2
    assert "requests: cannot read 'nothing.jsonl'" in capsys.readouterr().err
    assert not out.exists()
    assert tetrion("batch", write(), "--output", out) == 0


def test_seeds_of_ids_are_fixed_for_ever() -> None:
    assert [seed_of_id(name) for name in ("1", "2", "a")] == [1803989619, 3564330554, 3398926610]


# Pictures ---------------------------------------------------------------------------------------------------------


def test_pictures_lie_beside_the_file_of_lines(
    tetrion: Tetrion, factory: FakeFactory, write: Callable[..., Path], tmp_path: Path, out: Path, capsys: Capture
) -> None:
    factory.spec = BEGINNER
    (tmp_path / "in").mkdir()
    Image.new("RGB", (200, 150), "white").save(tmp_path / "in/a.png")
    Image.new("L", (200, 150), "white").save(tmp_path / "m.png")
    line = {"prompt": "a star", "image": "in/a.png", "mask": "m.png", "strength": 0.75, "id": "a"}
    requests = write(line, line | {"image": ["in/a.png"], "id": "b"})
    assert tetrion("batch", requests, "--output", out) == 0
    asked = [handle.request for handle in factory.last.handles]
    assert [request.pictures[0].size for request in asked] == [(192, 144)] * 2 and asked[0].strength == 0.75
    assert (asked[0].mask == 255).all()
    assert tetrion("batch", requests, "--output", out) == 0
    assert "0 drawn, 2 already there" in capsys.readouterr().out
    Image.new("RGB", (200, 150), "red").save(tmp_path / "in/a.png")
    assert tetrion("batch", requests, "--output", out) == 0
    assert "2 drawn, 0 already there" in capsys.readouterr().out, "another picture is in the file"


def test_no_line_names_a_file_elsewhere(
    tetrion: Tetrion, factory: FakeFactory, write: Callable[..., Path], tmp_path: Path, out: Path, capsys: Capture
) -> None:
    factory.spec = BEGINNER
    folder = tmp_path / "lines"
    folder.mkdir()
    Image.new("RGB", (200, 150)).save(tmp_path / "secret.png")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    names = ["../secret.png", str(tmp_path / "secret.png"), "link.png", "~/secret.png", "a\0b", "x/../../secret.png"]
    requests = write(*[{"prompt": "a star", "image": name} for name in names])
    requests = requests.rename(folder / "requests.jsonl")
    assert tetrion("batch", requests, "--output", out) == 1
    failed = manifest(out)
    assert [entry["status"] for entry in failed] == ["failed"] * len(names)
    assert all(entry["error"].startswith("image: ") for entry in failed)
    assert sum("must be a path in the folder" in entry["error"] for entry in failed) == 5
    assert "cannot read" in failed[3]["error"], "of a home nothing is known here"
    assert not factory.last.handles


def test_a_model_that_takes_no_pictures_says_so_of_the_line(
    tetrion: Tetrion, write: Callable[..., Path], tmp_path: Path, out: Path
) -> None:
    Image.new("RGB", (200, 150)).save(tmp_path / "a.png")
    assert tetrion("batch", write({"prompt": "a star", "image": "a.png"}), "--output", out) == 1
    assert manifest(out)[0]["error"] == "image: is no input of model 'shapes'"
