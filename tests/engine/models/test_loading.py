"""The shared weights image, and clear errors for checkpoints that are not whole."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.engine.models.conftest import Loaded
from tetrion.engine.families.plan import Part
from tetrion.engine.families.registry import read_model_spec
from tetrion.engine.model_spec import CheckpointError
from tetrion.engine.models.loading import (
    Component,
    ComponentFiles,
    attach,
    component_tensors,
    load_to_device,
    publish,
)
from tetrion.engine.models.ops import ReferenceOps
from tetrion.engine.models.registry import all_components, load_shared
from tetrion.engine.transport.segment import SharedMemoryError

CHILD = """
import re, sys, torch
from tetrion.engine.models.loading import attach
tensor = attach(int(sys.argv[1]))["part/big"]
total = int(tensor.view(torch.int32).sum())
address, sizes = tensor.data_ptr(), {}
for line in open("/proc/self/smaps"):
    if head := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
        inside = int(head[1], 16) <= address < int(head[2], 16)
    elif inside and (row := re.match(r"(Rss|Pss|Private_Dirty): +(\\d+) kB", line)):
        sizes[row[1]] = int(row[2])
print(total, sizes["Rss"], sizes["Pss"], sizes["Private_Dirty"])
"""


@pytest.fixture
def fd():
    fd = os.memfd_create("test-weights")
    yield fd
    os.close(fd)


@pytest.fixture
def broken(make_checkpoint, tmp_path) -> Path:
    """A copy of a checkpoint, to be damaged by the test."""
    return Path(shutil.copytree(make_checkpoint(), tmp_path / "broken"))


def test_image_holds_converted_fused_aligned_tensors(tmp_path, fd) -> None:
    stored = {
        "q": torch.randn(3, 5).half(),
        "k": torch.randn(2, 5).bfloat16(),
        "bias": torch.randn(7),
        "scale": torch.tensor(2.5),
    }
    files = _component(tmp_path, stored)
    plan = {"qk": Part(("q", "k"), (5, 5)), "bias": Part(("bias",)), "scale": Part(("scale",))}
    num_bytes = publish(fd, {"part": Component(files, plan)})
    assert os.fstat(fd).st_size == num_bytes
    tensors = component_tensors(attach(fd), "part")
    assert set(tensors) == {"qk", "bias", "scale"}
    assert torch.equal(tensors["qk"], torch.cat([stored["q"].float(), stored["k"].float()]))
    assert torch.equal(tensors["bias"], stored["bias"])
    assert tensors["scale"].shape == () and tensors["scale"] == 2.5
    assert all(tensor.dtype == torch.float32 and tensor.data_ptr() % 64 == 0 for tensor in tensors.values())


def test_image_is_a_safetensors_file(tmp_path, fd) -> None:
    weight = torch.randn(3, 3)
    publish(fd, {"part": Component(_component(tmp_path, {"weight": weight}), {"weight": Part(("weight",))})})
    with safe_open(f"/proc/self/fd/{fd}", framework="pt") as image:
        assert torch.equal(image.get_tensor("part/weight"), weight)


def test_processes_share_the_pages(tmp_path, fd) -> None:
    big = torch.randn(1 << 20)
    publish(fd, {"part": Component(_component(tmp_path, {"big": big}), {"big": Part(("big",))})})
    ours = attach(fd)["part/big"]
    total = int(ours.view(torch.int32).sum())  # of the bits: exact, however the sum is split between threads
    child = subprocess.run(
        [sys.executable, "-P", "-c", CHILD, str(fd)], pass_fds=[fd], capture_output=True, text=True, check=True
    )
    child_total, rss, pss, private_dirty = map(int, child.stdout.split())
    assert child_total == total
    assert rss >= big.nbytes / 1024
    assert pss <= 0.6 * rss  # two processes map every page
    assert private_dirty <= 16


def test_a_stray_write_stays_in_its_own_mapping(tmp_path, fd) -> None:
    files = _component(tmp_path, {"weight": torch.ones(4)})
    publish(fd, {"part": Component(files, {"weight": Part(("weight",))})})
    ours, theirs = attach(fd)["part/weight"], attach(fd)["part/weight"]
    ours.zero_()
    assert torch.equal(theirs, torch.ones(4))


def test_attach_needs_a_complete_image(fd) -> None:
    with pytest.raises(CheckpointError, match="holds no complete image"):
        attach(fd)
    os.write(fd, b"\xff" * 100)
    with pytest.raises(CheckpointError, match="holds no complete image"):
        attach(fd)


def test_no_room_for_the_segment(tmp_path, fd, monkeypatch) -> None:
    monkeypatch.setattr("tetrion.engine.models.loading.available_memory_bytes", lambda: 1000)
    files = _component(tmp_path, {"weight": torch.ones(1000)})
    with pytest.raises(SharedMemoryError, match="1,000 bytes are available"):
        publish(fd, {"part": Component(files, {"weight": Part(("weight",))})})
    assert os.fstat(fd).st_size == 0


def test_second_worker_maps_what_the_first_wrote(make_checkpoint, fd) -> None:
    path = make_checkpoint()
    first, second = Loaded(path, fd), Loaded(path, fd, publish_weights=False)
    assert first.model.weights_bytes == second.model.weights_bytes > 0
    one, other = first.embed("red circle"), second.embed("red circle")
    assert set(one) == {"text", "pooled"} and all(torch.equal(one[name], other[name]) for name in one)


def test_models_share_a_segment_under_their_names(make_checkpoint, fd) -> None:
    specs = [
        msgspec.structs.replace(read_model_spec(make_checkpoint(guidance_embeds=embeds)), name=f"guidance {embeds}")
        for embeds in (True, False)
    ]
    models = load_shared(specs, fd, True, "safetensors", ReferenceOps(torch.zeros(1, dtype=torch.int32)))
    assert [model.spec.name for model in models] == [spec.name for spec in specs]
    assert (models[0].network.weights.guidance_in is None) is False and models[1].network.weights.guidance_in is None
    assert models[0].weights_bytes > models[1].weights_bytes


def test_missing_shard(broken, fd) -> None:
    shard = sorted((broken / "transformer").glob("*-00002-of-*.safetensors"))[0]
    shard.unlink()
    _assert_error(broken, fd, rf"transformer' is missing {re.escape(shard.name)}, named by diffusion_pytorch_model")


def test_truncated_shard(broken, fd) -> None:
    shard = sorted((broken / "transformer").glob("*.safetensors"))[0]
    os.truncate(shard, 1000)
    _assert_error(broken, fd, rf"{re.escape(shard.name)}' cannot be read as safetensors")


def test_missing_transformer_tensor(broken, fd) -> None:
    _drop_from_index(broken / "transformer", "transformer_blocks.1.attn.to_k.weight")
    _assert_error(broken, fd, r"transformer' has no tensor transformer_blocks.1.attn.to_k.weight")


def test_index_names_a_tensor_its_shard_lacks(broken, fd) -> None:
    index = next((broken / "transformer").glob("*.index.json"))
    content = json.loads(index.read_text())
    shard = content["weight_map"]["proj_out.bias"]
    content["weight_map"]["phantom"] = shard
    index.write_text(json.dumps(content))
    _assert_error(broken, fd, rf"{re.escape(shard)}' has no tensor phantom, though its index says so")


@pytest.mark.parametrize(
    ("folder", "file", "tensor"),
    [
        ("text_encoder_2", "model.safetensors", "encoder.block.1.layer.0.SelfAttention.k.weight"),
        ("vae", "diffusion_pytorch_model.safetensors", "decoder.conv_out.bias"),
    ],
)
def test_missing_module_tensor(broken, fd, folder, file, tensor) -> None:
    path = broken / folder / file
    tensors = load_file(path)
    del tensors[tensor]
    save_file(tensors, path)
    _assert_error(broken, fd, rf"{folder}' has no tensor {re.escape(tensor)}")


def test_clip_tensors_under_their_older_names(broken, make_checkpoint, fd, load) -> None:
    path = broken / "text_encoder/model.safetensors"
    save_file({f"text_model.{name.removeprefix('text_model.')}": t for name, t in load_file(path).items()}, path)
    assert torch.equal(Loaded(broken, fd).embed("red")["pooled"], load(make_checkpoint()).embed("red")["pooled"])


def test_shape_that_the_config_does_not_mean(broken, fd) -> None:
    path = broken / "transformer/config.json"
    config = msgspec.json.decode(path.read_bytes()) | {"joint_attention_dim": 99}
    path.write_bytes(msgspec.json.encode(config))
    _assert_error(broken, fd, r"context_embedder.weight has shape \[96, 24\], config.json means \[96, 99\]")


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (
            "text_encoder_2/config.json",
            {"d_model": 16},
            "encoder_2' gives vectors of 16, the transformer takes 24",
        ),
        (
            "text_encoder/config.json",
            {"hidden_size": 10},
            "encoder' gives vectors of 10, the transformer takes 20",
        ),
        ("vae/config.json", {"latent_channels": 8}, "vae' has 8 latent channels, .* must equal the 16 channels"),
        ("vae/config.json", {"_class_name": "AutoencoderTiny"}, "vae 'AutoencoderTiny' is not supported"),
    ],
)
def test_components_that_do_not_fit_together(broken, fd, file, change, message) -> None:
    """With the weights that each config means, whatever the others say."""
    path = broken / file
    path.write_bytes(msgspec.json.encode(msgspec.json.decode(path.read_bytes()) | change))
    with pytest.raises(CheckpointError, match=message):
        Loaded(broken, fd, load_format="dummy")


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["norm_out.linear.bias", "transformer_blocks.0.attn.to_v.weight"])
def test_weights_that_are_no_numbers(broken, fd, name: str, value: float) -> None:
    """One of them is fused with others."""
    path = broken / "transformer" / json.loads(next(broken.glob("*/*.index.json")).read_text())["weight_map"][name]
    tensors = load_file(path)
    tensors[name].view(-1)[-1] = value
    save_file(tensors, path)
    said = rf"{re.escape(path.name)}': {name} has values that are no numbers"
    _assert_error(broken, fd, said)
    components = all_components([read_model_spec(broken)], "safetensors")
    with pytest.raises(CheckpointError, match=said):
        load_to_device(components, torch.device("cpu"), torch.bfloat16)


def test_damaged_tokenizer(broken, fd) -> None:
    for file in (broken / "tokenizer_2").iterdir():
        file.write_text("{")
    _assert_error(broken, fd, "tokenizer_2/tokenizer_config.json' is not a JSON object")


def test_a_config_of_another_family_is_refused(make_checkpoint, fd) -> None:
    spec = msgspec.structs.replace(read_model_spec(make_checkpoint()), family="sd3")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_shared([spec], fd, True, "safetensors", ReferenceOps(torch.zeros(1, dtype=torch.int32)))


def _component(folder: Path, tensors: dict[str, torch.Tensor]) -> ComponentFiles:
    save_file(tensors, folder / "model.safetensors")
    return ComponentFiles(folder)


def _drop_from_index(folder: Path, tensor: str) -> None:
    index = next(folder.glob("*.index.json"))
    content = json.loads(index.read_text())
    del content["weight_map"][tensor]
    index.write_text(json.dumps(content))


def _assert_error(path: Path, fd: int, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        Loaded(path, fd)
