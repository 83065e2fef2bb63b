"""Instructions say what is to change, tell the thing meant from the others, and leave captions' tokens as they are."""

import numpy as np
import pytest

from benchmarks.embedded_model.captions import vocabulary
from benchmarks.embedded_model.edit_examples import make_edit_examples
from benchmarks.embedded_model.edits import make_edits, scene_of
from benchmarks.embedded_model.examples import TEXT_TOKENS
from benchmarks.embedded_model.instructions import (
    FRAMES,
    HELD_OUT_FRAMES,
    LET_FRAMES,
    OPERATIONS,
    Edit,
    InstructionWriter,
    instruction_words,
)
from benchmarks.embedded_model.tokenizer_files import COMMON_WORDS, clip_tokenizer, t5_tokenizer
from benchmarks.embedded_model.world import Thing, is_held_out

CIRCLE, STAR, HEART = Thing("red", "circle"), Thing("yellow", "star", "small"), Thing("pink", "heart")
SQUARE = Thing("red", "square")
WHITE, NAVY = ("white", "white"), ("white", "navy")


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (Edit("colour", (CIRCLE, STAR, None), (Thing("blue", "circle"), STAR, None), WHITE, 0), "make the circle blue"),
        (Edit("size", (CIRCLE, STAR), (CIRCLE, Thing("yellow", "star", "large")), WHITE, 1), "make the star large"),
        (Edit("shape", (CIRCLE,), (Thing("red", "ring"),), WHITE, 0), "turn the circle into a ring"),
        (Edit("remove", (CIRCLE, STAR, HEART), (CIRCLE, STAR, None), WHITE, 2), "remove the heart"),
        (
            Edit("add", (SQUARE, None), (SQUARE, Thing("green", "ring")), WHITE, 1, 0, "above"),
            "add a green ring above the square",
        ),
        (Edit("background", (CIRCLE,), (CIRCLE,), NAVY, None), "change the background to navy"),
        (
            Edit("remove", (CIRCLE, Thing("blue", "circle")), (CIRCLE, None), WHITE, 1),
            "remove the blue circle",
        ),
        (
            Edit("remove", (CIRCLE, Thing("red", "circle", "large")), (CIRCLE, None), WHITE, 1),
            "remove the large circle",
        ),
    ],
)  # fmt: skip
def test_canonical_wording(edit, text):
    assert InstructionWriter(0, "canonical").write(edit).text == text


def test_what_nothing_tells_apart_is_not_asked_for():
    with pytest.raises(ValueError, match="tells thing 1 from the others"):
        InstructionWriter(0).write(Edit("remove", (CIRCLE, CIRCLE), (CIRCLE, None), WHITE, 1))


def test_held_out_wordings_are_of_known_words_and_in_no_training():
    trained = {(tag, frame) for group in (FRAMES, LET_FRAMES) for tag, frames in group.items() for frame in frames}
    held_out = {(tag, frame) for tag, frames in HELD_OUT_FRAMES.items() for frame in frames}
    assert not trained & held_out and HELD_OUT_FRAMES.keys() == FRAMES.keys()

    def words(frames):
        return {word for _, frame in frames for word in frame.split()}

    assert words(held_out) - words(trained) <= {"in"}


@pytest.mark.parametrize("is_held", [False, True])
def test_edits_are_of_every_kind_and_held_out_or_not(is_held):
    edits = make_edits(np.random.default_rng(1), 150, 352, 176, held_out=is_held).edits
    assert {edit.operation for edit in edits} == set(OPERATIONS)
    for edit in edits:
        assert any(is_held_out(scene_of(edit, which)) for which in ("before", "after")) == is_held
        differing = [i for i, (a, b) in enumerate(zip(edit.before, edit.after, strict=True)) if a != b]
        assert differing == ([] if edit.changed is None else [edit.changed])
        assert (edit.backgrounds[0] != edit.backgrounds[1]) == (edit.operation == "background")
        assert scene_of(edit, "before").is_visible and scene_of(edit, "after").is_visible


def test_more_words_leave_captions_their_tokens():
    words = instruction_words()
    tokenizers = [(t5_tokenizer(), t5_tokenizer(words), 2), (clip_tokenizer(), clip_tokenizer(words), 3)]
    for plain, widened, num_ids in tokenizers:
        for word in {*vocabulary(), *COMMON_WORDS}:
            assert plain(word).input_ids == widened(word).input_ids
        for word in words:
            assert len(widened(word).input_ids) == num_ids, word
        assert len(widened) > len(plain) and widened.eos_token_id == plain.eos_token_id


def test_tokenizers_are_made_alike_every_time():
    """Byte-pair encoding that is trained anew orders ties by chance."""
    assert clip_tokenizer().get_vocab() == clip_tokenizer().get_vocab()


def test_examples_say_what_they_change():
    examples = make_edit_examples(5, 40, 256, 256)
    assert examples.t5_ids.shape == (40, TEXT_TOKENS) and (examples.t5_ids[:, -1] == 0).all(), "none is cut"
    assert len(examples[:7]) == 7
    of_background = examples.ground > 0
    assert of_background.any() and (examples.colour[of_background] == 0).all()
    np.testing.assert_array_equal(examples.after.background[of_background], examples.ground[of_background] - 1)
