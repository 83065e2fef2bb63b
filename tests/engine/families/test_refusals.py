"""Checkpoints that could not be drawn with rightly: refused before a worker is started, by file and field."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import FlowMatchEulerDiscreteScheduler

from tests.engine.families.folders import Header, change, copied, refusal, remove, rewrite, taken
from tetrion.engine.families.registry import read_model_spec
from tetrion.engine.families.tokenizers import CONVERSION
from tetrion.engine.measure.checkpoint_identity import checkpoint_identity
from tetrion.engine.model_spec import CheckpointError, SchedulerSpec
from tetrion.engine.models.loading import ComponentFiles
from tetrion.engine.models.tokenizers import LibraryTokenizer
from tetrion.engine.sampling.flow_match import sigmas

Damage = Callable[[Path], object]
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 4711\n"


@pytest.fixture
def flux(tmp_path: Path) -> Path:
    return copied("shapes", tmp_path / "flux")


@pytest.fixture
def sd3(tmp_path: Path) -> Path:
    return copied("shapes-sd3", tmp_path / "sd3")


@pytest.mark.parametrize("name", ["shapes", "shapes-sd3"])
def test_undamaged_copies_are_taken(name: str, tmp_path: Path) -> None:
    assert taken(copied(name, tmp_path / "copy")).name == name


@pytest.mark.parametrize("part", ["tokenizer", "tokenizer_2"])
def test_a_tokenizer_without_its_vocabulary_is_incomplete(flux: Path, part: str) -> None:
    (flux / part / "tokenizer.json").unlink()
    assert f"is missing {part}/tokenizer.json (or " in refusal(flux)
    (flux / part / "tokenizer_config.json").unlink()
    assert f"is missing {part}/tokenizer_config.json, {part}/tokenizer.json" in refusal(flux)
    shutil.rmtree(flux / part)
    assert f"is missing {part}/tokenizer_config.json, {part}/tokenizer.json" in refusal(flux)


def as_vocab_and_merges(folder: Path) -> None:
    model = json.loads((folder / "tokenizer.json").read_bytes())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    (folder / "tokenizer.json").unlink()


def test_clips_vocabulary_may_be_in_two_files(flux: Path) -> None:
    from transformers import CLIPTokenizer

    before = LibraryTokenizer(CLIPTokenizer, flux / "tokenizer")
    as_vocab_and_merges(flux / "tokenizer")
    assert taken(flux).name == "shapes"
    after = LibraryTokenizer(CLIPTokenizer, flux / "tokenizer")
    prompt = "a large red Circle above 3 blue stars"
    assert after.ids(prompt, 77) == before.ids(prompt, 77)
    (flux / "tokenizer/merges.txt").unlink()
    assert "is missing tokenizer/merges.txt" in refusal(flux)


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("tokenizer.json", b"{}", "holds no usable T5Tokenizer: Object missing required field `model`"),
        ("tokenizer.json", b'{"model": {"vocab": []}}', "holds no usable T5Tokenizer: its vocabulary is empty"),
        ("tokenizer.json", b"", "holds no usable T5Tokenizer: Input data was truncated"),
        ("tokenizer.json", b'{"model": {"vocab": {"a": 3}}}', "model.type is 'BPE', not 'Unigram'"),
        ("tokenizer.json", POINTER, "tokenizer_2/tokenizer.json' is a pointer of git-lfs"),
        ("tokenizer_config.json", b'{"tokenizer_class": "LlamaTokenizer"}', "tokenizer_class: 'LlamaTokenizer' is not"),
        ("tokenizer_config.json", b'{"unk_token": 7}', "Expected `str | object | null`, got `int` - at `$.unk_token`"),
    ],
)
def test_a_vocabulary_that_is_none_is_refused(flux: Path, file: str, content: bytes, says: str) -> None:
    (flux / "tokenizer_2" / file).write_bytes(content)
    assert says in refusal(flux)


def test_swapped_tokenizers_are_refused(flux: Path) -> None:
    (flux / "tokenizer").rename(flux / "kept")
    (flux / "tokenizer_2").rename(flux / "tokenizer")
    (flux / "kept").rename(flux / "tokenizer_2")
    assert "tokenizer_class: 'T5Tokenizer' is not supported" in refusal(flux)
    for part in ("tokenizer", "tokenizer_2"):
        remove(flux, f"{part}/tokenizer_config.json", "tokenizer_class")
    assert "tokenizer/tokenizer.json' holds no usable CLIPTokenizer: model.type is 'Unigram', not 'BPE'" in refusal(
        flux
    )


def test_a_tokenizer_with_more_tokens_than_its_encoder_is_refused(flux: Path) -> None:
    change(flux, "text_encoder_2/config.json", vocab_size=491)
    assert "has a token 491, its text encoder's config.json has vocab_size 491" in refusal(flux)


@pytest.mark.parametrize("length", [None, 0, 78, 10**30, 77.0, True, "long"])
def test_prompts_are_no_longer_than_clip_takes(flux: Path, length: Any) -> None:
    change(flux, "tokenizer/tokenizer_config.json", model_max_length=length)
    assert "tokenizer_config.json': model_max_length must be 1 … 77 (max_position_embeddings" in refusal(flux)


def test_a_sentencepiece_model_alone_is_converted_or_what_is_missing_is_named(
    flux: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import io

    import sentencepiece
    from transformers import T5Tokenizer

    model = io.BytesIO()
    lines = ["a large red star on a black background", "abcdefghijklmnopqrstuvwxyz small blue circle"] * 50
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=60, pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    folder = flux / "tokenizer_2"
    (folder / "tokenizer.json").unlink()
    (folder / "spiece.model").write_bytes(model.getvalue())
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "google.protobuf", None)
        patched.setitem(CONVERSION, "no_such_module_at_all", "its-package")
        said = refusal(flux)
        assert "spiece.model' takes " in said and "pip install" in said and "its-package" in said
    try:
        import google.protobuf  # noqa: F401
    except ImportError:
        assert "takes protobuf to be read" in refusal(flux)
        return
    taken(flux)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model"))
    expected = [*pieces.encode("a large red star"), 1]
    assert LibraryTokenizer(T5Tokenizer, folder).ids("a large red star", len(expected)) == expected
    (folder / "spiece.model").write_bytes(POINTER)
    assert "spiece.model' is a pointer of git-lfs" in refusal(flux)


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "text_encoder_2"])
@pytest.mark.parametrize("field", ["quantization_config", "compression_config"])
def test_a_quantized_component_is_refused_by_its_config(flux: Path, part: str, field: str) -> None:
    change(flux, f"{part}/config.json", **{field: {"quant_method": "bitsandbytes", "load_in_8bit": True}})
    assert f"{part}/config.json': {field}: quantized weights ('bitsandbytes') are not supported" in refusal(flux)
    change(flux, f"{part}/config.json", **{field: ["odd"]})
    assert f"{field}: quantized weights (['odd'])" in refusal(flux)
    change(flux, f"{part}/config.json", **{field: None})
    taken(flux)


def renamed(header: Header, old: str, new: str) -> None:
    header[new] = header.pop(old)


@pytest.mark.parametrize("dtype", ["I8", "U8", "I32", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "I64", "BOOL", "C64"])
def test_weights_of_other_types_are_refused_by_name(flux: Path, dtype: str) -> None:
    def edit(header: Header) -> None:
        header["decoder.conv_out.weight"]["dtype"] = dtype

    rewrite(flux / "vae/diffusion_pytorch_model.safetensors", edit)
    assert f"holds quantized weights (decoder.conv_out.weight: {dtype}), which are not supported" in refusal(flux)


@pytest.mark.parametrize(
    "suffix",
    ["SCB", "weight_scale", "weight_scale_inv", "absmax", "quant_map", "nested_absmax", "scale_weight", "qweight",
     "quant_state.bitsandbytes__nf4", "g_idx", "scales", "weight._data"],
)  # fmt: skip
def test_tensors_that_go_with_packed_ones_are_refused_by_name(flux: Path, suffix: str) -> None:
    rewrite(
        flux / "vae/diffusion_pytorch_model.safetensors",
        lambda header: renamed(header, "decoder.conv_out.bias", f"decoder.conv_out.{suffix}"),
    )
    assert f"holds quantized weights (decoder.conv_out.{suffix}: " in refusal(flux)


def test_counters_beside_weights_do_no_harm(flux: Path) -> None:
    """Older libraries stored CLIP's positions."""
    path = flux / "text_encoder/model.safetensors"

    def edit(header: Header) -> None:
        end = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
        header["text_model.embeddings.position_ids"] = {
            "dtype": "I64", "shape": [1, 77], "data_offsets": [end, end + 8 * 77]
        }  # fmt: skip

    rewrite(path, edit)
    with path.open("ab") as file:
        file.write(bytes(8 * 77))
    taken(flux)


def as_variant(folder: Path) -> None:
    """As `save_pretrained(variant="fp16")` leaves shards."""
    old = folder / "diffusion_pytorch_model.safetensors.index.json"
    index = json.loads(old.read_bytes())
    old.unlink()
    for path in folder.glob("*.safetensors"):
        path.rename(folder / path.name.replace("_model-", "_model.fp16-"))
    index["weight_map"] = {name: file.replace("_model-", "_model.fp16-") for name, file in index["weight_map"].items()}
    (folder / "diffusion_pytorch_model.safetensors.index.fp16.json").write_text(json.dumps(index))


def test_shards_of_a_variant_are_loaded_if_there_are_no_others(flux: Path) -> None:
    part = flux / "transformer"
    index = (part / "diffusion_pytorch_model.safetensors.index.json").read_bytes()
    before = ComponentFiles(part)
    as_variant(part)
    after = ComponentFiles(part)
    assert set(after.names) == set(before.names) and taken(flux)
    (part / "diffusion_pytorch_model.safetensors.index.json").write_bytes(index)
    assert taken(flux), "an index whose shards were left out does not count"
    next(part.glob("*-00002-of-*.safetensors")).unlink()
    assert "is missing diffusion_pytorch_model-00001-of-" in refusal(flux)


def test_one_file_of_a_variant_is_loaded_and_two_are_not_chosen_from(flux: Path) -> None:
    path = flux / "vae/diffusion_pytorch_model.safetensors"
    variant = path.with_name("diffusion_pytorch_model.fp16.safetensors")
    path.rename(variant)
    taken(flux)
    shutil.copy(variant, path.with_name("diffusion_pytorch_model.bf16.safetensors"))
    assert "vae' needs one .safetensors file" in refusal(flux)
    shutil.copy(variant, path)
    assert taken(flux), "the plain one comes first"
    variant.write_bytes(POINTER)
    taken(flux)


def test_what_a_mac_leaves_beside_files_does_not_count(flux: Path) -> None:
    identity = checkpoint_identity(flux, "safetensors")
    as_variant(flux / "transformer")
    for path in [*flux.rglob("*.safetensors"), *flux.rglob("*.json")]:
        path.with_name(f"._{path.name}").write_bytes(b"\0\5\x16\7")
    taken(flux)
    copy = copied("shapes", flux.parent / "other")
    (copy / "vae/._config.json").write_bytes(b"\0")
    assert checkpoint_identity(copy, "safetensors") == identity


def test_shards_without_an_index_are_named(flux: Path) -> None:
    (flux / "transformer/diffusion_pytorch_model.safetensors.index.json").unlink()
    assert "needs one .safetensors file or a *.safetensors.index.json (found: diffusion_pytorch_model-0" in refusal(
        flux
    )


def test_weights_that_are_no_safetensors_are_named(flux: Path) -> None:
    (flux / "vae/diffusion_pytorch_model.safetensors").rename(flux / "vae/diffusion_pytorch_model.bin")
    assert "is missing vae/*.safetensors (found diffusion_pytorch_model.bin, which is not read)" in refusal(flux)


@pytest.mark.parametrize(
    ("weight_map", "says"),
    [
        ({"a": "../vae/diffusion_pytorch_model.safetensors"}, "names files that are not .safetensors files beside it"),
        ({"a": "/etc/passwd"}, "names files that are not .safetensors files beside it"),
        ({"a": "config.json"}, "names files that are not .safetensors files beside it"),
        ({"a": "more.safetensors"}, "is missing more.safetensors, named by"),
        ({"a": ["x.safetensors"]}, "is not a safetensors index"),
        ({"a": "\0.safetensors"}, "is missing"),
        ({}, "is not a safetensors index"),
        ([], "is not a safetensors index"),
        (None, "is not a safetensors index"),
    ],
)
def test_an_index_names_shards_beside_it(flux: Path, weight_map: Any, says: str) -> None:
    change(flux, "transformer/diffusion_pytorch_model.safetensors.index.json", weight_map=weight_map)
    assert says in refusal(flux)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda path: os.truncate(path, path.stat().st_size - 1), "cannot be read as safetensors: its header means"),
        (lambda path: os.truncate(path, 100), "cannot be read as safetensors: its header is to have"),
        (lambda path: os.truncate(path, 3), "cannot be read as safetensors: its header is to have"),
        (lambda path: os.truncate(path, 0), "cannot be read as safetensors: its header is to have"),
        (lambda path: path.write_bytes((2**63).to_bytes(8, "little")), "to have 9,223,372,036,854,775,808 bytes"),
        (lambda path: path.write_bytes(b"<!DOCTYPE html>" * 9), "cannot be read as safetensors"),
        (lambda path: path.write_bytes(POINTER), "is a pointer of git-lfs, not the file itself: get it with `git lfs"),
        (lambda path: path.open("ab").write(b"x"), "cannot be read as safetensors: its header means"),
        (lambda path: rewrite(path, lambda h: h.pop("decoder.conv_out.bias")), "cannot lie at"),
        (
            lambda path: rewrite(path, lambda h: h["decoder.conv_out.bias"].update(shape=[4])),
            "decoder.conv_out.bias: F16 [4] cannot lie at",
        ),
        (
            lambda path: rewrite(path, lambda h: h["decoder.conv_out.bias"].update(shape=[-3])),
            "cannot be read as safetensors: its header: decoder.conv_out.bias: Expected `int` >= 0",
        ),
        (
            lambda path: rewrite(path, lambda h: h["decoder.conv_out.bias"].update(data_offsets=[2**60, 2**60 + 6])),
            "cannot be read as safetensors: ",
        ),
        (
            lambda path: rewrite(path, lambda h: renamed(h, "decoder.conv_out.bias", "decoder.up_blocks.4.x.bias")),
            "has no tensor decoder.conv_out.bias",
        ),
        (lambda path: rewrite(path, lambda h: h.update(__metadata__={"a": 1})), "its header: __metadata__: Expected"),
        (lambda path: rewrite(path, lambda h: h.update(x=3)), "its header: x: Expected `object`, got `int`"),
    ],
)
def test_a_damaged_file_is_named(flux: Path, damage: Damage, says: str) -> None:
    path = flux / "vae/diffusion_pytorch_model.safetensors"
    damage(path)
    said = refusal(flux)
    assert says in said and "/vae" in said


@pytest.mark.parametrize(
    ("part", "fields", "says"),
    [
        ("transformer", {"num_layers": 2}, "has no tensor transformer_blocks.1."),
        ("transformer", {"num_layers": 0}, "has tensors that config.json does not mean: transformer_blocks.0."),
        ("transformer", {"num_single_layers": 3}, "does not mean: single_transformer_blocks.3."),
        ("transformer", {"guidance_embeds": True}, "has no tensor time_text_embed.guidance_embedder"),
        ("text_encoder_2", {"num_layers": 3}, "config.json does not mean: encoder.block.3."),
        ("text_encoder_2", {"d_ff": 8}, "wi.weight has shape [256, 128], config.json means [8, 128]"),
        ("text_encoder_2", {"feed_forward_proj": "gated-gelu"}, "has no tensor encoder.block.0.layer.1.DenseReluDense"),
        ("text_encoder", {"num_hidden_layers": 1}, "config.json does not mean: encoder.layers.1."),
        (
            "text_encoder",
            {"vocab_size": 979},
            "token_embedding.weight has shape [978, 96], config.json means [979, 96]",
        ),
        ("vae", {"layers_per_block": 2}, "has no tensor decoder.up_blocks.0.resnets.2."),
        ("vae", {"use_post_quant_conv": True}, "has no tensor post_quant_conv.bias"),
    ],
)
def test_weights_are_those_that_the_config_means(flux: Path, part: str, fields: dict[str, Any], says: str) -> None:
    change(flux, f"{part}/config.json", **fields)
    said = refusal(flux)
    assert says in said and f"/{part}'" in said


def test_norms_and_second_attentions_that_a_config_forgets_are_not_left_out(sd3: Path) -> None:
    change(sd3, "transformer/config.json", qk_norm=None)
    assert "config.json does not mean: transformer_blocks.0.attn.norm_added_k.weight" in refusal(sd3)
    change(sd3, "transformer/config.json", qk_norm="rms_norm", dual_attention_layers=[0])
    assert "has no tensor transformer_blocks.0.attn2." in refusal(sd3)


@pytest.mark.parametrize(
    ("component", "entry"),
    [
        ("transformer", ["diffusers", "SD3Transformer2DModel"]),
        ("text_encoder", ["transformers", "CLIPTextModelWithProjection"]),
        ("text_encoder", [None, None]),
        ("text_encoder_2", ["transformers", "UMT5EncoderModel"]),
        ("tokenizer", ["transformers", "T5TokenizerFast"]),
        ("vae", ["diffusers", "AutoencoderTiny"]),
        ("vae", ["theirs", "AutoencoderKL"]),
        ("vae", "AutoencoderKL"),
        ("vae", [["diffusers"], {"a": 1}]),
        ("scheduler", ["diffusers", "DPMSolverMultistepScheduler"]),
    ],
)
def test_an_index_that_names_other_classes_is_refused(flux: Path, component: str, entry: Any) -> None:
    change(flux, "model_index.json", **{component: entry})
    said = refusal(flux)
    assert f"model_index.json': {component}: " in said and "is not supported (its class must be " in said


@pytest.mark.parametrize(
    ("part", "fields", "says"),
    [
        ("text_encoder", {"architectures": ["T5EncoderModel"]}, "text_encoder ['T5EncoderModel'] is not supported"),
        ("text_encoder", {"architectures": [[]]}, "text_encoder [[]] is not supported"),
        ("text_encoder", {"model_type": "t5"}, "text_encoder 't5' is not supported (model_type must be"),
        ("text_encoder_2", {"architectures": ["UMT5EncoderModel"]}, "['UMT5EncoderModel'] is not supported"),
        ("text_encoder_2", {"model_type": "umt5"}, "text_encoder_2 'umt5' is not supported"),
        (
            "transformer",
            {"_class_name": "SD3Transformer2DModel"},
            "transformer 'SD3Transformer2DModel' is not supported",
        ),
        ("vae", {"_class_name": "AutoencoderTiny"}, "vae 'AutoencoderTiny' is not supported"),
    ],
)
def test_a_config_of_another_class_is_refused(flux: Path, part: str, fields: dict[str, Any], says: str) -> None:
    change(flux, f"{part}/config.json", **fields)
    said = refusal(flux)
    assert says in said and f"{part}/config.json'" in said


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        ("text_encoder", "hidden_act", 2),
        ("text_encoder", "layer_norm_eps", {}),
        ("text_encoder", "pad_token_id", "0"),
        ("text_encoder_2", "layer_norm_epsilon", -1.0),
        ("text_encoder_2", "eos_token_id", [[1]]),
    ],
)
def test_what_a_library_would_refuse_without_a_file_s_name_is_refused_with_it(
    flux: Path, part: str, field: str, value: object
) -> None:
    change(flux, f"{part}/config.json", **{field: value})
    said = refusal(flux)
    assert f"{part}/config.json'" in said and f"`$.{field}" in said


def test_larger_models_that_hold_an_encoder_are_taken(flux: Path) -> None:
    change(flux, "text_encoder/config.json", architectures=["CLIPTextModelWithProjection"])
    change(flux, "text_encoder_2/config.json", architectures=["T5ForConditionalGeneration"])
    taken(flux)


def test_sd3s_clips_need_their_projection(sd3: Path) -> None:
    change(sd3, "text_encoder/config.json", architectures=["CLIPTextModel"])
    assert "text_encoder ['CLIPTextModel'] is not supported" in refusal(sd3)


FLUX_MISFITS = [
    ("text_encoder", {"hidden_size": 48}, ("text_encoder'", "hidden_size 48", "pooled_projection_dim 96")),
    ("text_encoder_2", {"d_model": 64}, ("text_encoder_2'", "d_model 64", "joint_attention_dim 128")),
    ("vae", {"latent_channels": 4}, ("vae'", "latent_channels 4", "in_channels 32")),
]  # fmt: skip
SD3_MISFITS = [
    ("text_encoder", {"projection_dim": 60}, ("projection_dim 60 and 96 add up to 156", "160")),
    ("text_encoder_2", {"hidden_size": 96}, ("hidden_size 48 and 96", "joint_attention_dim 128")),
    ("text_encoder_3", {"d_model": 64}, ("text_encoder_3'", "d_model 64", "joint_attention_dim 128")),
    ("vae", {"latent_channels": 4}, ("vae'", "latent_channels 4", "in_channels 8")),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "part", "fields", "parts"),
    [("shapes", *misfit) for misfit in FLUX_MISFITS] + [("shapes-sd3", *misfit) for misfit in SD3_MISFITS],
)
def test_components_that_do_not_fit_are_told_with_both_numbers(
    tmp_path: Path, name: str, part: str, fields: dict[str, Any], parts: tuple[str, ...]
) -> None:
    """Whatever their weights are, which `dummy` does not read."""
    folder = copied(name, tmp_path / "copy")
    change(folder, f"{part}/config.json", **fields)
    with pytest.raises(CheckpointError) as caught:
        read_model_spec(folder, "dummy")
    assert all(text in str(caught.value) for text in parts)


@pytest.mark.parametrize("half", ["text_encoder_3", "tokenizer_3"])
def test_half_a_t5_is_refused(sd3: Path, half: str) -> None:
    change(sd3, "model_index.json", **{half: [None, None]})
    assert "model_index.json' has t" in refusal(sd3) and " without " in refusal(sd3)
    change(sd3, "model_index.json", text_encoder_3=[None, None], tokenizer_3=[None, None])
    for part in ("text_encoder_3", "tokenizer_3"):
        shutil.rmtree(sd3 / part)
    assert taken(sd3).max_text_tokens == 77 + 64


@pytest.mark.parametrize("part", ["text_encoder_3", "tokenizer_3"])
def test_a_t5_that_is_named_is_there_whole(sd3: Path, part: str) -> None:
    shutil.rmtree(sd3 / part)
    assert f"is missing {part}/" in refusal(sd3)


def test_both_clips_prompts_are_equally_long(sd3: Path) -> None:
    change(sd3, "tokenizer_2/tokenizer_config.json", model_max_length=64)
    assert "tokenizer and tokenizer_2 make prompts of 77 and 64 tokens" in refusal(sd3)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True}, "scheduler 'UniPCMultistepScheduler' is"),
        ({"use_karras_sigmas": True}, "scheduler option use_karras_sigmas is not supported"),
        ({"use_exponential_sigmas": True}, "scheduler option use_exponential_sigmas is not supported"),
        ({"use_beta_sigmas": True}, "scheduler option use_beta_sigmas is not supported"),
        ({"invert_sigmas": True}, "scheduler option invert_sigmas is not supported"),
        ({"shift_terminal": 1.0}, "Expected `float` < 1.0 - at `$.shift_terminal`"),
        ({"stochastic_sampling": True}, "scheduler option stochastic_sampling is not supported"),
        ({"time_shift_type": "cubic"}, "Invalid enum value 'cubic' - at `$.time_shift_type`"),
        ({"shift": 0}, "Expected `float` > 0.0 - at `$.shift`"),
        ({"shift": "3"}, "Expected `float`, got `str` - at `$.shift`"),
        ({"num_train_timesteps": 0}, "at `$.num_train_timesteps`"),
        ({"max_image_seq_len": 256}, "base_image_seq_len and max_image_seq_len must differ, got 256 and 256"),
        ({"max_shift": 1e5}, "make a shift of"),
        ({"time_shift_type": "linear", "base_shift": -1.0}, "make a shift of"),
    ],
)
def test_a_scheduler_is_taken_as_it_is_or_refused(flux: Path, fields: dict[str, Any], says: str) -> None:
    change(flux, "scheduler/scheduler_config.json", **fields)
    said = refusal(flux)
    assert says in said and "scheduler_config.json'" in said


@pytest.mark.parametrize(
    "fields", [{"shift_terminal": None}, {"shift_terminal": 0}, {"use_beta_sigmas": None}, {"solver_order": 2}]
)
def test_options_that_change_nothing_are_taken(flux: Path, fields: dict[str, Any]) -> None:
    before = taken(flux).scheduler
    change(flux, "scheduler/scheduler_config.json", **fields)
    assert taken(flux).scheduler == before


@pytest.mark.parametrize("num_steps", [1, 2, 4, 28])
@pytest.mark.parametrize("options", [{}, {"shift": 3.0}, {"use_dynamic_shifting": True}, {"time_shift_type": "linear"}])
def test_a_scheduler_with_flow_sigmas_spaces_them_itself(flux: Path, num_steps: int, options: dict[str, Any]) -> None:
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_flow_sigmas": True, **options}
    (flux / "scheduler/scheduler_config.json").write_text(json.dumps(config))
    theirs = FlowMatchEulerDiscreteScheduler.from_config(config)
    assert theirs.config.use_flow_sigmas, "what FluxPipeline looks at"
    theirs.set_timesteps(num_steps, mu=0.5 + 0.65 * (64 - 256) / (4096 - 256))
    np.testing.assert_array_equal(sigmas(taken(flux).scheduler, num_steps, 64), theirs.sigmas.numpy())
    without = SchedulerSpec(**options)
    assert not np.array_equal(sigmas(without, 4, 64), sigmas(taken(flux).scheduler, 4, 64))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"num_steps": 0}, "at `$.num_steps`"),
        ({"min_size": -128}, "at `$.min_size`"),
        ({"max_size": 2**40}, "at `$.max_size`"),
        ({"guidance": -1}, "at `$.guidance`"),
        ({"max_text_tokens": 10**9}, "at `$.max_text_tokens`"),
        (
            {"default_width": 200},
            "default_width and default_height [200, 256] must be multiples of 16 from min_size 128",
        ),
        ({"min_size": 512, "max_size": 256}, "must be multiples of 16 from min_size 512 to max_size 256"),
        ({"components_from": {"vae": "../vae"}}, 'expected "model/component" of an embedded model'),
        ({"components_from": {"vae": "/etc"}}, 'expected "model/component" of an embedded model'),
        ({"name": "a\nb"}, "name: must be printable, got 'a\\nb'"),
        ({"name": "x" * 201}, "Expected `str` of length <= 200"),
        ({"colour": "red"}, "unknown field `colour`"),
    ],
)
def test_a_preset_is_one_that_can_be_drawn_with(flux: Path, fields: dict[str, Any], says: str) -> None:
    change(flux, "preset.json", **fields)
    said = refusal(flux)
    assert says in said and "preset.json'" in said


@pytest.mark.parametrize(
    ("fields", "field"),
    [({"scaling_factor": 0}, "scaling_factor"), ({"out_channels": 4}, "out_channels"),
     ({"shift_factor": "0"}, "shift_factor"), ({"norm_num_groups": 7}, "norm_num_groups"),
     ({"up_block_types": ["UpDecoderBlock2D"]}, "up_block_types"), ({"block_out_channels": [8] * 11}, "block_out")],
)  # fmt: skip
def test_what_a_decoder_cannot_be_is_refused_by_field(flux: Path, fields: dict[str, Any], field: str) -> None:
    change(flux, "vae/config.json", **fields)
    said = refusal(flux)
    assert field in said and "vae/config.json'" in said
