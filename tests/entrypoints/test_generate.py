"""`tetrion generate` on a test double: files, sheet, report."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.entrypoints.conftest import BEGINNER, EDITOR, FakeFactory
from tetrion.engine.request import EnergyOptions

Tetrion = Callable[..., int]
Capture = pytest.CaptureFixture[str]


def report_of(capture: Capture) -> dict[str, Any]:
    return json.loads(capture.readouterr().out)


def test_one_picture(tetrion: Tetrion, tmp_path: Path, capsys: Capture) -> None:
    assert tetrion("generate", "a red circle", "--seed", 7, "--size", "256x128", "--output", tmp_path) == 0
    out = capsys.readouterr().out
    path = tmp_path / "a-red-circle-7.png"
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    picture = Image.open(path)
    assert picture.size == (256, 128)
    assert (np.asarray(picture) == (7, 0, 128)).all()
    assert picture.text == {  # type: ignore[attr-defined]
        "prompt": "a red circle",
        "seed": "7",
        "size": "256x128",
        "steps": "4",
        "model": "shapes",
        "software": "tetrion",
    }
    assert (
        str(path) in out
        and "seed 7" in out
        and "latency 0.500 s, 0.100 s of it in the queue" in out
        and "degrees 1×1 2×3" in out
    )


def test_several_pictures_get_a_sheet(tetrion: Tetrion, tmp_path: Path, capsys: Capture) -> None:
    arguments = ("a red circle", "a blue star", "-n", 2, "--seed", 7, "--output", tmp_path, "--json")
    assert tetrion("generate", *arguments) == 0
    report = report_of(capsys)
    names = [Path(image["file"]).name for image in report["images"]]
    assert names == ["a-red-circle-7.png", "a-red-circle-8.png", "a-blue-star-7.png", "a-blue-star-8.png"]
    assert [image["seed"] for image in report["images"]] == [7, 8, 7, 8]
    assert Path(report["sheet"]) == tmp_path / "sheet.png"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names, "sheet.png"])
    sheet = np.asarray(Image.open(report["sheet"]))
    for seed in (7, 8):
        assert (sheet == (seed, 0, 128)).all(axis=2).sum() == 2 * 256 * 256


def test_every_model_draws_every_prompt(tetrion: Tetrion, tmp_path: Path, capsys: Capture) -> None:
    arguments = ("a star", "--seed", 7, "--model", "a/flux", "--model", "sd3", "--output", tmp_path, "--json")
    assert tetrion("generate", *arguments) == 0
    report = report_of(capsys)
    assert report["models"] == ["a/flux", "sd3"] == [image["model"] for image in report["images"]]
    names = [Path(image["file"]).name for image in report["images"]]
    assert names == ["a-star-7-a-flux.png", "a-star-7-sd3.png"]


def test_json_is_one_object_with_everything(tetrion: Tetrion, tmp_path: Path, capsys: Capture) -> None:
    assert tetrion("generate", "a star", "--seed", 3, "--slo-ms", 400, "--output", tmp_path, "--json") == 0
    report = report_of(capsys)
    assert report["models"] == ["shapes"] and report["sheet"] is None and report["devices"]
    (image,) = report["images"]
    assert image["seed"] == 3 and image["degrees"] == [1, 2, 2, 2] and image["degrees_compact"] == "1×1 2×3"
    assert (image["width"], image["height"], image["num_steps"]) == (256, 256, 4)
    assert image["latency_s"] == 0.5 and image["slo_met"] is False and Path(image["file"]).is_file()
    assert image["energy"]["active_j"] is None and image["energy"]["reasons"]["active_j"]


def test_nothing_is_overwritten(tetrion: Tetrion, tmp_path: Path, capsys: Capture) -> None:
    for _ in range(2):
        assert tetrion("generate", "a star", "-n", 2, "--seed", 3, "--output", tmp_path) == 0
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["a-star-3-2.png", "a-star-3.png", "a-star-4-2.png", "a-star-4.png", "sheet-2.png", "sheet.png"]


def test_prompts_from_a_file(tetrion: Tetrion, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "prompts.txt").write_text("a red circle\n\n  a blue star  \n", encoding="utf-8")
    arguments = ("a cross", "--prompts", tmp_path / "prompts.txt", "--output", tmp_path / "out", "--json")
    assert tetrion("generate", *arguments) == 0
    assert [image["prompt"] for image in report_of(capsys)["images"]] == ["a cross", "a red circle", "a blue star"]


def test_a_prompts_file_that_is_not_text(tetrion: Tetrion, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "prompts.bin").write_bytes(b"\xff\xfe\x00")
    assert tetrion("generate", "--prompts", tmp_path / "prompts.bin", "--output", tmp_path / "out") == 2
    assert "is not UTF-8 text" in capsys.readouterr().err


def test_a_random_seed_is_reported_and_differs(tetrion: Tetrion, tmp_path: Path, capsys: Capture) -> None:
    seeds = []
    for _ in range(2):
        assert tetrion("generate", "a star", "--output", tmp_path, "--json") == 0
        seeds.append(report_of(capsys)["images"][0]["seed"])
    assert seeds[0] != seeds[1] and all(0 <= seed < 2**32 for seed in seeds)


def test_options_reach_the_engine(tetrion: Tetrion, factory: FakeFactory, tmp_path: Path) -> None:
    engine = ("--devices", "cpu:2", "--model", "some/folder", "--policy", "fixed-2", "--num-threads", 1)
    request = ("--num-steps", 3, "--guidance", 2.5, "--slo-ms", 900, "--force-degrees", "1,2,1")
    assert tetrion("generate", "a star", "--output", tmp_path, *engine, *request) == 0
    config, (handle,) = factory.last.config, factory.last.handles
    assert (config.devices, config.models, config.planner.policy, config.num_threads) == (
        "cpu:2",
        ("some/folder",),
        "fixed-2",
        1,
    )
    sent = handle.request
    assert (sent.num_steps, sent.guidance, sent.slo_ms, sent.force_degrees) == (3, 2.5, 900, (1, 2, 1))


def test_what_an_energy_mode_and_budget_become(
    tetrion: Tetrion, factory: FakeFactory, tmp_path: Path, capsys: Capture
) -> None:
    energy = ("--energy", "least-energy", "--budget-j", 400)
    assert tetrion("generate", "a star", "--output", tmp_path, *energy) == 0
    assert factory.last.handles[0].request.energy == EnergyOptions(mode="least-energy", budget_j=400)
    for refused, says in (
        (("a star", "--energy", "cheap"), "energy.mode: must be one of fastest, balanced, least-energy, got 'cheap'"),
        (("a star", "--budget-j", -1), "energy.budget_j: must be above 0"),
        (("a star", "--force-degrees", 1, *energy), "energy: cannot be given with force_degrees"),
        (("a dear star", *energy), "energy.budget_j: 400 J cannot be met: the cheapest plan takes"),
    ):
        assert tetrion("generate", "--output", tmp_path / "none", *refused) == 2
        assert says in capsys.readouterr().err
    assert not list((tmp_path / "none").glob("*"))


def test_a_failure_stops_the_rest_and_keeps_what_is_finished(
    tetrion: Tetrion, factory: FakeFactory, tmp_path: Path, capsys: Capture
) -> None:
    assert tetrion("generate", "slow", "fail", "--seed", 1, "--output", tmp_path) == 1
    captured = capsys.readouterr()
    assert "tetrion: error: generation failed: worker 1 was lost" in captured.err and captured.out == ""
    assert factory.last.handles[0].is_cancelled and not factory.last.is_running
    assert list(tmp_path.iterdir()) == []


def test_many_pictures_stay_in_order(tetrion: Tetrion, tmp_path: Path, capsys: Capture) -> None:
    assert (
        tetrion("generate", "a star", "-n", 80, "--seed", 0, "--size", "128x128", "--output", tmp_path, "--json") == 0
    )
    assert [image["seed"] for image in report_of(capsys)["images"]] == list(range(80))


def picture(path: Path, size: tuple[int, int] = (200, 100), mode: str = "RGB") -> Path:
    Image.new(mode, size, "white").save(path)
    return path


def test_pictures_to_work_from(tetrion: Tetrion, factory: FakeFactory, tmp_path: Path) -> None:
    factory.spec = EDITOR
    given = [picture(tmp_path / "a.png"), picture(tmp_path / "b.jpg", (100, 100))]
    options = [part for path in given for part in ("--image", path)]
    assert tetrion("generate", "make it blue", *options, "-n", 2, "--output", tmp_path / "out") == 0
    requests = [handle.request for handle in factory.last.handles]
    assert [[p.size for p in request.pictures] for request in requests] == [[(192, 192), (192, 192)]] * 2
    assert requests[0].pictures[0] is requests[1].pictures[0], "resized once"


def test_a_picture_to_begin_with(tetrion: Tetrion, factory: FakeFactory, tmp_path: Path, capsys: Capture) -> None:
    factory.spec = BEGINNER
    image, mask = picture(tmp_path / "a.png", (256, 128)), picture(tmp_path / "m.png", (256, 128), "L")
    arguments = ("generate", "more", "--image", image, "--strength", 0.75, "--output", tmp_path / "out")
    assert tetrion(*arguments, "--mask", mask, "--num-steps", 8, "--json") == 0
    (request,) = [handle.request for handle in factory.last.handles]
    assert request.strength == 0.75 and (request.mask == 255).all()
    assert report_of(capsys)["images"][0]["width"] == 256, "as large as the picture"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--image", "none.png"), "image: cannot read 'none.png': No such file or directory"),
        (("--strength", "0.5"), "strength: takes a picture to go with it"),
        (("--mask", "none.png"), "mask: takes a picture to go with it"),
    ],
)
def test_bad_pictures_are_said_by_option(
    tetrion: Tetrion, factory: FakeFactory, capsys: Capture, options: tuple[str, ...], says: str
) -> None:
    factory.spec = BEGINNER
    assert tetrion("generate", "a star", *options) == 2
    assert says in capsys.readouterr().err and not factory.last.num_starts
