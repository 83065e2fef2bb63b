"""Ranks of diffusers and xfuser on a CPU, with a transformer of toy size."""

import contextlib
import io
import json
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from tetrion.entrypoints.bench import diffusers_step, transformer_step
from tetrion.entrypoints.bench.rank_group import run_ranks

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
    answers, reason = run_ranks("tetrion.entrypoints.bench.diffusers_step", job, [0], 150)
    assert reason is None and [answer["name"] for answer in answers] == ["small", "wide"]
    assert all(answer["ms"] > 0 for answer in answers)


def test_nothing_is_begun_after_the_time_is_up(job: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    answers, num_threads = io.StringIO(), torch.get_num_threads()
    monkeypatch.setattr(sys, "argv", ["diffusers_step", json.dumps(job | {"until_s": time.monotonic()})])
    monkeypatch.setattr(transformer_step, "claim_stdout", lambda: contextlib.nullcontext(answers))
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1")):
        monkeypatch.setenv(name, value)
    transformer_step.run(diffusers_step.build)
    torch.set_num_threads(num_threads)
    assert answers.getvalue() == ""


@pytest.mark.skipif(find_spec("xfuser") is not None, reason="xfuser is installed")
def test_a_system_that_is_not_installed_says_so(job: dict[str, Any]) -> None:
    answers, reason = run_ranks("tetrion.entrypoints.bench.xfuser_step", job, [0], 150)
    assert answers == [] and reason is not None and "No module named 'xfuser'" in reason
