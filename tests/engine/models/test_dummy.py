"""Random weights in place of a checkpoint's: the same for every worker, of the right shapes; token ids from hashes."""

import math
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import nn

from tetrion.engine.families.hash_tokens import HashTokenizer
from tetrion.engine.families.locate import resolve_model
from tetrion.engine.families.registry import read_model_spec
from tetrion.engine.model_spec import CheckpointError
from tetrion.engine.models.dummy import DummyFiles, module_shapes
from tetrion.engine.models.encoders import ClipEncoder, T5Encoder
from tetrion.engine.models.loading import component_tensors, load_to_device, planned_shapes
from tetrion.engine.models.registry import components_of

CPU = torch.device("cpu")


@pytest.fixture
def files(tmp_path: Path) -> DummyFiles:
    return DummyFiles(tmp_path / "vae", {"a.weight": (300, 40), "b.weight": (300, 40), "norm.weight": (400,)})


def test_values_follow_from_the_name(files: DummyFiles, tmp_path: Path) -> None:
    a, b = files.read("a.weight", CPU), files.read("b.weight", CPU)
    assert a.dtype == torch.bfloat16 and torch.equal(a, files.read("a.weight", CPU))
    assert not torch.equal(a, b)
    other = DummyFiles(tmp_path / "transformer", {"a.weight": (300, 40)})
    assert not torch.equal(a, other.read("a.weight", CPU))
    assert a.float().std() == pytest.approx(0.02, rel=0.05) and abs(a.float().mean()) < 0.002
    assert files.read("norm.weight", CPU).float().mean() == pytest.approx(1.0, abs=0.01)
    with pytest.raises(CheckpointError, match="no tensor c"):
        files.shape("c")


def test_tied_parameters_are_one_tensor() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Embedding(7, 3), nn.Linear(3, 7, bias=False)
            self.second.weight = self.first.weight

    assert module_shapes(Tied) == {"first.weight": (7, 3)}


def test_flux1_dev_has_its_real_size() -> None:
    spec = read_model_spec(resolve_model("flux1-dev"), "dummy")
    counts = dict.fromkeys(components := components_of(spec, "dummy"), 0)
    for key, shape in planned_shapes(components).items():
        counts[key.partition("/")[0]] += math.prod(shape)
    assert counts["transformer"] == 11_901_408_320  # black-forest-labs/FLUX.1-dev
    assert counts["text_encoder_2"] == 4_762_310_656  # T5 v1.1 XXL's encoder
    assert counts["text_encoder"] == 123_060_480  # CLIP ViT-L/14's


def test_configs_alone_need_dummy_weights() -> None:
    with pytest.raises(CheckpointError, match=r"missing .*transformer/\*.safetensors.*configs only: load_format dummy"):
        read_model_spec(resolve_model("flux1-dev"))


def test_fused_tensors_hold_the_checkpoints(make_checkpoint) -> None:
    """What diffusers would load under its names, in the fused layout."""
    path = make_checkpoint()
    components = components_of(read_model_spec(path), "dummy")
    tensors = load_to_device(components, CPU, torch.float32)
    files = components["transformer"].files
    parts = [files.read(f"transformer_blocks.1.attn.to_{x}.weight", CPU).float() for x in "qkv"]
    assert torch.equal(tensors["transformer/double.1.image.qkv.weight"], torch.cat(parts))
    assert set(files.names) == set(FluxTransformer2DModel.from_pretrained(path / "transformer").state_dict())


def test_a_checkpoint_straight_to_a_device_equals_the_shared_image(make_checkpoint, load) -> None:
    path = make_checkpoint(guidance_embeds=True)
    components = components_of(read_model_spec(path), "safetensors")
    tensors = load_to_device(components, CPU, torch.bfloat16)
    weights = load(path).network.weights
    assert torch.equal(tensors["transformer/modulation.weight"], weights.modulation.weight.bfloat16())
    assert all(tensor.dtype == torch.bfloat16 for tensor in tensors.values())


def test_token_ids() -> None:
    tokenizer = HashTokenizer(100, end=99, start=98, padding=99)
    ids = tokenizer.ids("red red blue", 8)
    assert ids[0] == 98 and ids[1] == ids[2] != ids[3] and ids[4:] == [99] * 4
    assert all(3 <= token < 98 for token in ids[1:4])
    cut = tokenizer.ids("one two three four five", 4)
    assert len(cut) == 4 and (cut[0], cut[-1]) == (98, 99)
    assert tokenizer.num_tokens("red red blue") == 5


def test_encoders_without_tokenizer_files(make_checkpoint, tmp_path) -> None:
    path = make_checkpoint()
    for name in ("text_encoder", "text_encoder_2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_bytes((path / name / "config.json").read_bytes())
    tensors = load_to_device(components_of(read_model_spec(path), "dummy"), CPU, torch.float32)
    clip, t5 = (component_tensors(tensors, name) for name in ("text_encoder", "text_encoder_2"))
    folders = (
        (tmp_path / "text_encoder", tmp_path / "tokenizer"),
        (tmp_path / "text_encoder_2", tmp_path / "tokenizer_2"),
    )
    pooling, rows = ClipEncoder(*folders[0], clip, "dummy"), T5Encoder(*folders[1], t5, "dummy", 32)
    one, other = (rows.rows(rows.ids(f"a {colour} circle")) for colour in ("red", "blue"))
    assert one.shape == (32, 24) and rows.num_tokens("a red circle") == 4
    assert not torch.equal(one, other) and one.isfinite().all()
    assert pooling.pooled(pooling.ids("a red circle")).shape == (20,)
    with pytest.raises(CheckpointError, match="holds no usable"):
        ClipEncoder(*folders[0], clip)
    with pytest.raises(CheckpointError, match="holds no usable"):
        T5Encoder(*folders[1], t5)
