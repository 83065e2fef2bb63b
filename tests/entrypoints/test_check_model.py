"""`tetrion check-model` on tiny random checkpoints: equal is what diffusers draws, and what differs is told."""

import json
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from tests.engine.families.pipelines import CASES, NEGATIVE, PROMPT
from tetrion.engine.families.registry import FAMILIES, read_model_spec
from tetrion.engine.request import ImageRequest
from tetrion.engine.resolve import resolve_request
from tetrion.entrypoints import check_model
from tetrion.entrypoints.check_model import TOLERANCES, Ours, begun_by_us, compare, drawn_by_diffusers
from tetrion.entrypoints.cli import run

CPU, EXACT = torch.device("cpu"), TOLERANCES["float32"]
NOT_LOADED_HERE = ("krea-2-turbo", "qwen-image-2.1")
"""Their pipelines take accelerate and torchvision to be loaded."""
NAMES = ("flux1-dev", "sd3-medium", "sd3-without-t5", "z-image", "flux2-klein", "qwen-image", *NOT_LOADED_HERE)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def saved(name: str, folder: Path) -> tuple[Path, DiffusionPipeline]:
    case = next(case for case in CASES if case.name == name)
    with torch.no_grad():
        pipeline = case.pipeline()
        case.save(pipeline, folder)
    return folder, pipeline


@pytest.mark.parametrize("name", NAMES)
def test_what_is_equal_and_what_differs_is_told_of_every_family(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, pipeline = saved(name, tmp_path)
    spec = read_model_spec(folder)
    if name in NOT_LOADED_HERE:
        monkeypatch.setattr(DiffusionPipeline, "from_pretrained", lambda *_, **__: pipeline)
    params = resolve_request(ImageRequest(prompt=PROMPT, num_steps=2, seed=3), spec, 1).params
    theirs = drawn_by_diffusers(spec, params, PROMPT, CPU, torch.float32)
    ours = Ours(*begun_by_us(spec, params, PROMPT, CPU), theirs.picture)
    rows = {row.what: row.is_equal for row in compare(spec, ours, theirs, params, EXACT)}
    assert rows == dict.fromkeys(
        ("text rows", "embeddings", "start noise", "noise levels", "picture, mean", "picture, most"), True
    )
    text, *_ = begun_by_us(spec, params, NEGATIVE, CPU)
    _, noise, times = begun_by_us(spec, msgspec.structs.replace(params, seed=4), PROMPT, CPU)
    wrong = Ours(text, noise, times * 0.99, 255 - theirs.picture)
    differing = {row.what for row in compare(spec, wrong, theirs, params, EXACT) if row.is_equal is False}
    assert differing == rows.keys() - {"text rows"}


def test_every_family_says_where_diffusers_has_its_text() -> None:
    assert set(FAMILIES.values()) == set(check_model.TEXT_OUTPUT)


def test_the_command_draws_with_both_and_ends_with_0_or_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(saved("flux1-dev", tmp_path)[0])
    arguments = ["check-model", folder, "--device", "cpu", "--num-steps", "2", "--size", "56x72"]
    assert run([*arguments, "--json"]) == 0
    made = capsys.readouterr()
    assert json.loads(made.out)["is_equal"] and "GB of memory for weights" in made.err
    monkeypatch.setattr(check_model, "run_async_picture", lambda *_: np.zeros((72, 56, 3), np.uint8))
    assert run(arguments) == 1
    assert "DIFFERS" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["no-such-folder"], "no-such-folder"),
        (["shapes", "--device", "cpu:2"], "device: takes one device"),
        (["shapes", "--device", "tpu"], "device: expected cpu:N"),
        (["shapes", "--size", "17x64"], "width"),
    ],
)
def test_what_cannot_be_checked_is_refused(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["check-model", *arguments]) == 2
    assert says in capsys.readouterr().err
