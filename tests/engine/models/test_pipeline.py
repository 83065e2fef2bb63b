"""Whole images at degree 1 against diffusers' FluxPipeline on the same folder, seed and steps."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline

from tetrion.engine.families.locate import resolve_model
from tetrion.engine.families.registry import read_model_spec

PROMPT = "a red circle above a blue square"


@pytest.mark.parametrize(
    ("options", "width", "height", "num_steps", "guidance"),
    [
        ({}, 64, 64, 4, 3.5),
        ({"dynamic_shift": False}, 96, 64, 3, 3.5),
        ({"guidance_embeds": True}, 64, 80, 3, 3.5),
        ({"guidance_embeds": True, "dynamic_shift": False}, 64, 64, 1, 0.0),
        ({"max_text_tokens": 512}, 36, 100, 2, 3.5),
    ],
)
def test_equals_diffusers(make_checkpoint, load, options, width, height, num_steps, guidance) -> None:
    path = make_checkpoint(**options)
    latents, picture = load(path).generate(PROMPT, width, height, seed=7, num_steps=num_steps, guidance=guidance)
    expected_latents, expected_picture = _diffusers(path, width, height, num_steps, guidance)
    assert latents.shape == expected_latents.shape
    assert expected_latents.abs().max() > 0.5
    assert (latents - expected_latents).abs().max() <= 1e-5
    _assert_same_picture(picture, expected_picture)


def test_embedded_model_equals_diffusers(load) -> None:
    path = resolve_model("shapes")
    latents, picture = load(path).generate(PROMPT, 128, 144, seed=11, num_steps=4)
    expected_latents, expected_picture = _diffusers(path, 128, 144, 4, 3.5, seed=11)
    assert (latents - expected_latents).abs().max() <= 1e-4
    _assert_same_picture(picture, expected_picture)


def test_guidance_matters_only_where_it_is_embedded(make_checkpoint, load) -> None:
    for embeds in (True, False):
        model = load(make_checkpoint(guidance_embeds=embeds))
        weak, _ = model.generate(PROMPT, 32, 32, seed=1, num_steps=2, guidance=1.0)
        strong, _ = model.generate(PROMPT, 32, 32, seed=1, num_steps=2, guidance=7.0)
        assert torch.equal(weak, strong) != embeds


@pytest.mark.parametrize("name", ["shapes", "tiny"])
def test_pictures_do_not_depend_on_the_number_of_threads(make_checkpoint, load, name) -> None:
    model = load(resolve_model("shapes") if name == "shapes" else make_checkpoint())
    latents, picture = model.generate(PROMPT, 144, 128, seed=3, num_steps=2)
    for num_threads in (2, 3, 5):
        torch.set_num_threads(num_threads)
        again, picture_again = model.generate(PROMPT, 144, 128, seed=3, num_steps=2)
        assert torch.equal(latents, again), f"{num_threads} threads"
        assert np.array_equal(picture, picture_again), f"{num_threads} threads"


def test_a_state_of_another_size_is_not_decoded(make_checkpoint, load) -> None:
    loaded = load(make_checkpoint())
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        loaded.codec.decode(torch.zeros(64, 16), loaded.spec.shape(64, 32))


def _pipeline(path: Path) -> FluxPipeline:
    pipeline = FluxPipeline.from_pretrained(path, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _diffusers(
    path: Path, width: int, height: int, num_steps: int, guidance: float, seed: int = 7
) -> tuple[torch.Tensor, np.ndarray]:
    pipeline = _pipeline(path)

    def run(output_type: str) -> object:
        return pipeline(
            PROMPT,
            width=width,
            height=height,
            num_inference_steps=num_steps,
            guidance_scale=guidance,
            max_sequence_length=read_model_spec(path).max_text_tokens,
            generator=torch.Generator("cpu").manual_seed(seed),
            output_type=output_type,
        ).images[0]

    return run("latent"), np.asarray(run("pil"))


def _assert_same_picture(picture: np.ndarray, expected: np.ndarray) -> None:
    assert picture.shape == expected.shape and picture.dtype == np.uint8
    difference = np.abs(picture.astype(int) - expected.astype(int)).max(axis=2)
    assert difference.max() <= 1
    assert (difference > 0).mean() < 1e-3
