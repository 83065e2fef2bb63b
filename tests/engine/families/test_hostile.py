"""Folders that mean harm: refused in one line, at once, with little memory, and without running what they hold."""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.engine.families.folders import change, copied, refusal, rewrite
from tetrion.engine.measure.checkpoint_identity import checkpoint_identity

SCHEDULER = "scheduler/scheduler_config.json"
TRANSFORMER, VAE = "transformer/config.json", "vae/config.json"
WEIGHTS, TOKENIZER = "vae/diffusion_pytorch_model.safetensors", "tokenizer/tokenizer.json"
INDEX = "transformer/diffusion_pytorch_model.safetensors.index.json"
Harm = Callable[[Path], object]


def text(name: str, content: str) -> Harm:
    return lambda folder: (folder / name).write_text(content)


def raw(name: str, content: bytes) -> Harm:
    return lambda folder: (folder / name).write_bytes(content)


def header(content: bytes) -> Harm:
    return raw(WEIGHTS, len(content).to_bytes(8, "little") + content)


def sparse(name: str, num_bytes: int) -> Harm:
    return lambda folder: os.truncate(folder / name, num_bytes)


def link(name: str, target: str) -> Harm:
    def replace(folder: Path) -> None:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        path.symlink_to(target)

    return replace


def pipe(name: str) -> Harm:
    def replace(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return replace


def directory(name: str) -> Harm:
    def replace(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return replace


def fields(name: str, /, **values: object) -> Harm:
    return lambda folder: change(folder, name, **values)


def tensor_called(name: str) -> Harm:
    return lambda folder: rewrite(folder / WEIGHTS, lambda h: h.update({name: h.pop("decoder.conv_out.bias")}))


def with_code(folder: Path) -> None:
    (folder / "text_encoder/evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")
    change(folder, "text_encoder/config.json", model_type="evil", auto_map={"AutoModel": "evil.Model"})


HARMS: dict[str, Harm] = {
    "a huge number": fields(TRANSFORMER, num_layers=10**18),
    "a million digits": text(TRANSFORMER, '{"num_layers": ' + "9" * 1_000_000 + "}"),
    "a negative size": fields(TRANSFORMER, in_channels=-32),
    "no heads": fields(TRANSFORMER, num_attention_heads=0),
    "a text for a number": fields(VAE, latent_channels="8"),
    "a truth for a number": fields(TRANSFORMER, num_layers=True),
    "many axes": fields(TRANSFORMER, axes_dims_rope=[0] * 100_000),
    "heads beyond memory": fields(TRANSFORMER, num_attention_heads=10**6, attention_head_dim=10**6),
    "NaN": text(SCHEDULER, '{"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": NaN}'),
    "infinity": text(SCHEDULER, '{"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 1e999}'),
    "deep nesting": text(VAE, '{"a": ' + "[" * 200_000 + "]" * 200_000 + "}"),
    "deep nesting in a header": header(b'{"a": ' + b"[" * 1_000_000),
    "deep nesting in a vocabulary": text(TOKENIZER, '{"model": {"vocab": ' + "[" * 500_000),
    "a class that is a list": fields("model_index.json", _class_name=["theirs", "FluxPipeline"]),
    "a class that is an object": fields("model_index.json", _class_name={"a": 1}),
    "code of its own": with_code,
    "a folder in a loop": link("vae", "vae"),
    "a file in a loop": link(VAE, "config.json"),
    "a preset in a loop": link("preset.json", "preset.json"),
    "a file without end": link(VAE, "/dev/zero"),
    "weights without end": link(WEIGHTS, "/dev/zero"),
    "a file that cannot be read": link(VAE, "/proc/self/mem"),
    "weights that cannot be read": link(WEIGHTS, "/proc/self/mem"),
    "a pipe": pipe(VAE),
    "a preset that is a pipe": pipe("preset.json"),
    "weights that are a pipe": pipe(WEIGHTS),
    "a vocabulary that is a pipe": pipe(TOKENIZER),
    "a terabyte of config": sparse(VAE, 2**40),
    "a terabyte of vocabulary": sparse(TOKENIZER, 2**40),
    "a terabyte of weights": sparse(WEIGHTS, 2**40),
    "a header of 2^63": raw(WEIGHTS, (2**63).to_bytes(8, "little") + b"{}"),
    "a header of 2^64 - 1": raw(WEIGHTS, b"\xff" * 8 + b"{}"),
    "a shape beyond numbers": header(b'{"t": {"dtype": "F32", "shape": [4e18], "data_offsets": [0, 0]}}'),
    "a shape of many dimensions": header(
        json.dumps({"t": {"dtype": "F32", "shape": [2**61] * 100_000, "data_offsets": [0, 0]}}).encode()
    ),
    "a tensor that leaves": tensor_called("../../x"),
    "a tensor that speaks to terminals": tensor_called("\x1b[31m\n\u202e" * 50),
    "a tensor with a long name": tensor_called("x" * 1_000_000),
    "shards that leave": fields(INDEX, weight_map={"a": "../vae/diffusion_pytorch_model.safetensors"}),
    "shards with long names": fields(INDEX, weight_map={"a": "a" * 5000 + ".safetensors"}),
    "a folder for a config": directory(VAE),
    "a folder for weights": directory(WEIGHTS),
    "a folder for a preset": directory("preset.json"),
    "UTF-16": raw(VAE, '{"a": 1}'.encode("utf-16")),
    "no UTF-8": raw(VAE, b'{"a": "\xff"}'),
    "a name that speaks to terminals": fields("preset.json", name="\x1b[31m\nx"),
    "another's folder": fields("preset.json", components_from={"vae": "/etc"}),
    "a token below zero": text(TOKENIZER, '{"model": {"vocab": {"a": -1}}}'),
    "a token beyond numbers": text(TOKENIZER, '{"model": {"vocab": {"a": 99999999999999999999}}}'),
}


@pytest.mark.parametrize("name", HARMS)
def test_it_is_refused(name: str, tmp_path: Path) -> None:
    folder = copied("shapes", tmp_path / "model")
    HARMS[name](folder)
    begun_s = time.process_time()
    assert str(folder) in refusal(folder)
    assert time.process_time() - begun_s < 5.0
    assert not (folder / "ran").exists()


def test_a_file_that_nobody_reads_does_no_harm(tmp_path: Path) -> None:
    folder = copied("shapes", tmp_path / "model")
    (folder / "tokenizer/stray.json").touch()
    os.truncate(folder / "tokenizer/stray.json", 2**40)
    assert len(checkpoint_identity(folder, "safetensors")) == 32
