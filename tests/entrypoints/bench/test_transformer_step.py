"""Ranks of diffusers and xfuser on a CPU, with a transformer of toy size."""

import contextlib
import io
import json
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from tetrion.entrypoints.bench import diffusers_step, transformer_step
from tetrion.entrypoints.bench.rank_group import run_ranks
from tetrion.entrypoints.bench.transformer_step import StepJob, step_of

MODULE = "tetrion.entrypoints.bench.diffusers_step"
TOY = {
    "_class_name": "FluxTransformer2DModel",
    "in_channels": 4,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 8,
    "pooled_projection_dim": 8,
    "guidance_embeds": True,
    "axes_dims_rope": [2, 2, 4],
}


@pytest.fixture
def job(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "config.json").write_text(json.dumps(TOY))
    return {
        "transformer": str(tmp_path),
        "device": "cpu",
        "num_text": 6,
        "sizes": [["small", 4, 4], ["wide", 8, 4]],
        "seconds": 0.05,
        "until_s": time.monotonic() + 120,
    }


def test_diffusers_times_every_size(job: dict[str, Any]) -> None:
    answers, reason = run_ranks(MODULE, job, [0], 150)
    assert reason is None and [answer["name"] for answer in answers] == ["small", "wide"]
    assert all(answer["ms"] > 0 for answer in answers)


def run_here(job: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """One rank's life in this process."""
    answers, num_threads = io.StringIO(), torch.get_num_threads()
    monkeypatch.setattr(sys, "argv", ["diffusers_step", json.dumps(job)])
    monkeypatch.setattr(transformer_step, "claim_stdout", lambda: contextlib.nullcontext(answers))
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1")):
        monkeypatch.setenv(name, value)
    transformer_step.run(diffusers_step.build)
    torch.set_num_threads(num_threads)
    return [json.loads(line) for line in answers.getvalue().splitlines()]


def test_nothing_is_begun_after_the_time_is_up(job: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_here(job | {"until_s": time.monotonic()}, monkeypatch) == []


TOY_SD3 = {
    "_class_name": "SD3Transformer2DModel",
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 8,
    "caption_projection_dim": 16,
    "pooled_projection_dim": 8,
    "pos_embed_max_size": 8,
    "qk_norm": "rms_norm",
}


TOY_FLUX2 = {
    "_class_name": "Flux2Transformer2DModel",
    "in_channels": 4,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 8,
    "guidance_embeds": True,
    "axes_dims_rope": [2, 2, 2, 2],
}
TOY_ZIMAGE = {
    "_class_name": "ZImageTransformer2DModel",
    "in_channels": 4,
    "dim": 16,
    "n_layers": 1,
    "n_refiner_layers": 1,
    "n_heads": 2,
    "n_kv_heads": 2,
    "cap_feat_dim": 8,
    "axes_dims": [2, 2, 4],
    "axes_lens": [64, 16, 16],
}


@pytest.mark.parametrize("toy", [TOY_FLUX2, TOY_ZIMAGE], ids=lambda toy: toy["_class_name"])
def test_others_are_timed_with_guidance(
    job: dict[str, Any], toy: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    (Path(job["transformer"]) / "config.json").write_text(json.dumps(toy))
    answers = run_here(job | {"num_branches": 2}, monkeypatch)
    assert [answer["name"] for answer in answers] == ["small", "wide"]
    assert all(answer["ms"] > 0 for answer in answers)


@pytest.mark.parametrize("num_branches", [1, 2])
def test_sd3_is_timed_with_guidance_and_without(
    job: dict[str, Any], num_branches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    (Path(job["transformer"]) / "config.json").write_text(json.dumps(TOY_SD3))
    answers = run_here(job | {"num_branches": num_branches}, monkeypatch)
    assert [answer["name"] for answer in answers] == ["small", "wide"]
    assert all(answer["ms"] > 0 for answer in answers)


def test_what_diffusers_cannot_split_says_so(job: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    (Path(job["transformer"]) / "config.json").write_text(json.dumps(TOY_SD3))
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="SD3Transformer2DModel knows no context parallelism"):
        diffusers_step.build(msgspec.convert(job, StepJob))


def test_a_guided_step_evaluates_both_branches_at_once_and_guides(tmp_path: Path) -> None:
    calls: list[Tensor] = []

    class Recorder(torch.nn.Module):
        config = SimpleNamespace(**TOY_SD3, patch_size=2)

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, hidden_states: Tensor, **others: Any) -> tuple[Tensor]:
            calls.append(hidden_states)
            assert {len(value) for name, value in others.items() if name != "return_dict"} == {2}
            return (hidden_states,)

    (tmp_path / "config.json").write_text(json.dumps(TOY_SD3))
    job = StepJob(transformer=str(tmp_path), device="cpu", num_text=6, sizes=[], seconds=1, until_s=0, num_branches=2)
    step_of(Recorder(), job, 4, 3)()
    (batch,) = calls
    assert batch.shape == (2, 4, 6, 8) and torch.equal(batch[0], batch[1])


@pytest.mark.skipif(find_spec("xfuser") is not None, reason="xfuser is installed")
def test_a_system_that_is_not_installed_says_so(job: dict[str, Any]) -> None:
    answers, reason = run_ranks("tetrion.entrypoints.bench.xfuser_step", job, [0], 150)
    assert answers == [] and reason is not None and "No module named 'xfuser'" in reason
