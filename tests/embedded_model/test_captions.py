"""Canonical captions, random wordings, tokens for every word, and the held-out rule."""

import numpy as np
import pytest

from benchmarks.embedded_model.captions import COLOUR_WORDS, CaptionWriter, PartialCaptionWriter, canonical
from benchmarks.embedded_model.examples import TEXT_TOKENS, encode_captions, make_examples
from benchmarks.embedded_model.prompts import PROMPT_SETS, make_prompts
from benchmarks.embedded_model.scenes import held_out_masks, sample_scenes
from benchmarks.embedded_model.tokenizer_files import clip_tokenizer, t5_tokenizer
from benchmarks.embedded_model.world import Scene, Thing, is_held_out

RED_CIRCLE, BLUE_STAR = Thing("red", "circle", "small"), Thing("blue", "star", "large")


@pytest.mark.parametrize(
    ("scene", "text"),
    [
        (Scene((Thing("orange", "ring"),)), "an orange ring"),
        (
            Scene((RED_CIRCLE, BLUE_STAR), ("left",), "navy"),
            "a small red circle left of a large blue star on a navy background",
        ),
        (Scene((RED_CIRCLE, BLUE_STAR), (None,)), "a small red circle and a large blue star"),
        (
            Scene((RED_CIRCLE, BLUE_STAR, Thing("green", "cross")), ("above", "below")),
            "a small red circle above a large blue star below a green cross",
        ),
        (
            Scene((RED_CIRCLE, BLUE_STAR, Thing("green", "cross")), (None, None)),
            "a small red circle, a large blue star and a green cross",
        ),
    ],
)
def test_canonical(scene, text):
    assert canonical(scene) == text


def test_every_wording_fits_the_text_limit_and_owners_point_at_things():
    scenes = sample_scenes(np.random.default_rng(3), 300)
    t5_ids, _, owners = encode_captions(scenes, CaptionWriter(3))
    lengths = (t5_ids > 0).sum(1)
    assert lengths.max() < TEXT_TOKENS and lengths.min() >= 3
    counts = (scenes.shape >= 0).sum(1)
    assert all({k for k in row if k < 3} == set(range(n)) for row, n in zip(owners.tolist(), counts, strict=True))


def test_known_words_are_whole_and_unknown_words_are_tokens():
    t5, clip = t5_tokenizer(), clip_tokenizer()
    text = canonical(Scene((RED_CIRCLE, BLUE_STAR), ("left",), "navy"))
    assert len(t5(text).input_ids) == len(text.split()) + 1
    assert len(clip(text).input_ids) == len(text.split()) + 2
    for odd in ("a flurbish circle", "déjà vu", "日本 ☂", "!?", "RED"):
        assert len(t5(odd).input_ids) > 1 and len(clip(odd).input_ids) > 2


def test_training_shows_nothing_held_out():
    examples = make_examples(1, 200, 256, 256)
    assert not any(np.logical_or(*held_out_masks(examples.scenes)))
    assert not any(is_held_out(examples.scenes.scene(i)) for i in range(50))


@pytest.mark.parametrize("prompts", PROMPT_SETS, ids=lambda p: p.name)
def test_evaluation_asks_only_what_is_held_out(prompts):
    asked = make_prompts(prompts, 20)
    assert asked == make_prompts(prompts, 20)
    assert all(is_held_out(scene) and scene.is_visible for _, scene in asked)
    assert all(len(scene.things) == prompts.num_things for _, scene in asked)


def test_partial_captions_leave_out_everything_or_the_colour_or_all_but_a_fragment():
    scene = Scene((RED_CIRCLE, BLUE_STAR), ("left",), "navy")
    writer = PartialCaptionWriter(5)
    captions = [writer.write(scene) for _ in range(400)]
    assert 0.05 < captions.count("") / len(captions) < 0.15
    assert {"red", "blue", "circle", "star", "small", "large", "blue star"} <= set(captions)
    words_for_colours = set(COLOUR_WORDS["red"]) | set(COLOUR_WORDS["blue"]) | {"Red", "Blue"}
    colourless = [text for text in captions if "left of" in text and not words_for_colours & set(text.split())]
    assert 0.03 < len(colourless) / len(captions) < 0.15
    assert not any("  " in text for text in captions)


def test_an_empty_caption_is_tokenised_as_diffusers_does_it():
    scenes = sample_scenes(np.random.default_rng(3), 1)

    class Silent(CaptionWriter):
        def chunks(self, scene):
            return [("", None)]

    t5_ids, clip_ids, _ = encode_captions(scenes, Silent(0))
    padded = {"padding": "max_length", "return_tensors": "np"}
    assert (t5_ids == t5_tokenizer()("", max_length=TEXT_TOKENS, **padded).input_ids).all()
    assert (clip_ids == clip_tokenizer()("", max_length=77, **padded).input_ids).all()
