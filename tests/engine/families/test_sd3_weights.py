"""SD3's own on workers: checkpoints that are refused, weights' names and shapes at real sizes, noise levels."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import save_file

import tetrion.configs.models as models
from tetrion.engine.families.plan import WeightsPlan
from tetrion.engine.model_spec import CheckpointError, SchedulerSpec
from tetrion.engine.models.dummy import DummyFiles
from tetrion.engine.models.loading import Component, ComponentFiles, load_to_device, planned_shapes
from tetrion.engine.models.sd3 import positions, read_config, transformer_shapes, weights_plan
from tetrion.engine.sampling.flow_match import euler_schedule

FOLDER = Path(next(iter(models.__path__)))
BILLIONS = {"sd3-medium": 2.03, "sd3.5-medium": 2.24, "sd3.5-large": 8.06}
"""Parameters of the published transformers, positions not counted."""


@pytest.mark.parametrize("name", BILLIONS)
def test_real_transformers_have_their_size_and_every_tensor_is_used(name: str) -> None:
    folder = FOLDER / name / "transformer"
    shapes = transformer_shapes(folder)
    count = sum(math.prod(shape) for tensor, shape in shapes.items() if tensor != "pos_embed.pos_embed")
    assert count / 1e9 == pytest.approx(BILLIONS[name], abs=0.005)
    plan = weights_plan(read_config(folder / "config.json"))
    assert {source for part in plan.values() for source in part.sources} == set(shapes)
    planned = planned_shapes({"transformer": Component(DummyFiles(folder, shapes), plan)})
    assert sum(map(math.prod, planned.values())) == sum(map(math.prod, shapes.values()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qk_norm": "layer_norm"}, r"qk_norm"),
        ({"patch_size": 4}, r"patch_size"),
        ({"pos_embed_max_size": None}, r"pos_embed_max_size"),
        ({"pos_embed_max_size": 100_000}, r"4096.*pos_embed_max_size"),
        ({"num_layers": 0}, r"num_layers"),
        ({"out_channels": 32}, r"out_channels 32 must equal in_channels 16"),
        ({"caption_projection_dim": 1152}, r"caption_projection_dim 1152 must equal .* = 1536"),
        ({"dual_attention_layers": [3, 24]}, r"dual_attention_layers \[24\] are not below num_layers 24"),
    ],
)
def test_what_is_not_covered_is_refused_by_name(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    config = json.loads((FOLDER / "sd3-medium/transformer/config.json").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(CheckpointError, match=f"config.json.*{message}"):
        read_config(tmp_path / "config.json")


@pytest.mark.parametrize("shift", [1.0, 1.5, 2.0, 3.0, 3.3, 6.0])
@pytest.mark.parametrize("num_steps", [1, 2, 7, 28, 50, 1000])
def test_noise_levels_are_the_schedulers_to_the_bit(shift: float, num_steps: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(num_steps)
    schedule = euler_schedule(SchedulerSpec(shift=shift), num_steps, 4096, "trained")
    assert torch.equal(schedule.times, scheduler.timesteps)
    assert torch.equal(schedule.coefficients[:, 0, 1], scheduler.sigmas.diff())


def test_positions_are_the_middle_of_the_table() -> None:
    table = torch.arange(25.0).view(5, 5, 1)
    assert positions(table, 2, 3).flatten().tolist() == [6, 7, 8, 11, 12, 13]
    assert positions(table, 5, 5).flatten().tolist() == list(range(25))


def test_patches_become_tokens_channel_by_channel(tmp_path: Path) -> None:
    """A token is (c, p, q), whatever the order in the checkpoint."""
    torch.manual_seed(0)
    conv, linear = torch.nn.Conv2d(3, 8, 2, 2), torch.nn.Linear(8, 12)
    tensors = {f"conv.{name}": p for name, p in conv.named_parameters()}
    save_file(tensors | {f"out.{name}": p for name, p in linear.named_parameters()}, tmp_path / "model.safetensors")
    plan = WeightsPlan()
    plan.patches_in("first", "conv", 8, 3, 2)
    plan.patches_out("last", "out", 3, 2, 8)
    component = {"it": Component(ComponentFiles(tmp_path), plan)}
    loaded = load_to_device(component, torch.device("cpu"), torch.float32)
    patch_cpq = torch.randn(3, 2, 2)
    hidden = torch.nn.functional.linear(patch_cpq.flatten(), loaded["it/first.weight"], loaded["it/first.bias"])
    torch.testing.assert_close(hidden, conv(patch_cpq)[:, 0, 0])
    result = torch.nn.functional.linear(hidden, loaded["it/last.weight"], loaded["it/last.bias"])
    expected_cpq = linear(hidden).view(2, 2, 3).permute(2, 0, 1)
    torch.testing.assert_close(result, expected_cpq.flatten())


def test_what_is_rearranged_is_checked_as_it_lies_in_the_checkpoint(tmp_path: Path) -> None:
    save_file({"conv.weight": torch.zeros(8, 2, 2, 3), "conv.bias": torch.zeros(8)}, tmp_path / "model.safetensors")
    plan = WeightsPlan()
    plan.patches_in("first", "conv", 8, 3, 2)
    with pytest.raises(CheckpointError, match=r"conv.weight has shape \[8, 2, 2, 3\], .* means \[8, 3, 2, 2\]"):
        planned_shapes({"it": Component(ComponentFiles(tmp_path), plan)})
