"""A model that learns to edit: what it keeps of the one that it was, and how it is compared with that."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.embedded_model.before_after import before_after_sheet
from benchmarks.embedded_model.edit_checker import EditVerdict
from benchmarks.embedded_model.edit_examples import make_edit_examples
from benchmarks.embedded_model.evaluate_edits import EDIT_SETS, Edited, make_tasks, paired_difference, sheet_of
from benchmarks.embedded_model.examples import make_examples
from benchmarks.embedded_model.export import export, load, read_preset
from benchmarks.embedded_model.instructions import instruction_words
from benchmarks.embedded_model.models import SHAPES
from benchmarks.embedded_model.train_editor import EDIT_BUCKETS, EditTrainer, cache_edits, weighed
from benchmarks.embedded_model.train_instruction_encoders import train_instruction_encoders, with_words
from benchmarks.embedded_model.train_transformer import cache_bucket
from tetrion.engine.families.registry import read_model_spec
from tetrion.engine.families.words import unknown_words

FOLDER = Path(__file__).parents[2] / "configs/models/shapes"
SIZE, PIXELS = (128, 128), 8 * 128 * 128


@pytest.fixture(scope="module")
def old():
    pipeline = load(FOLDER)
    for part in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        getattr(pipeline, part).requires_grad_(False)
    return pipeline


@pytest.fixture(scope="module")
def widened(old):
    return with_words(old, instruction_words())


@torch.no_grad()
def test_new_words_leave_captions_as_they_were(old, widened):
    captions = make_examples(1, 8, *SIZE)
    ids = torch.as_tensor(captions.clip_ids).long(), torch.as_tensor(captions.t5_ids).long()
    for new, was in zip(SHAPES.encode(widened, *ids), SHAPES.encode(old, *ids), strict=True):
        torch.testing.assert_close(new, was, rtol=0, atol=0)
    assert old.text_encoder_2.config.vocab_size < widened.text_encoder_2.config.vocab_size == len(widened.tokenizer_2)
    assert old.text_encoder.config.vocab_size < widened.text_encoder.config.vocab_size == len(widened.tokenizer)


def test_text_encoders_are_trained_without_the_old_ones(old, widened):
    pipeline = with_words(old, instruction_words(), seed=1)
    before = copy.deepcopy(old.text_encoder_2.state_dict())
    examples, captions = make_edit_examples(1, 16, *SIZE), make_examples(1, 16, *SIZE)
    train_instruction_encoders(SHAPES, pipeline, old, examples, captions, 0.5, torch.device("cpu"), 8)
    assert all(torch.equal(value, before[name]) for name, value in old.text_encoder_2.state_dict().items())
    was, now = (model.text_encoder_2.encoder.block[0].layer[0].SelfAttention.q.weight for model in (old, pipeline))
    assert not torch.equal(was, now)


def test_edits_are_learnt_from_pictures_and_captions_from_the_old_model(old, widened):
    device = torch.device("cpu")
    captions = cache_bucket(SHAPES, widened, make_examples(2, 8, *SIZE), SIZE, device, PIXELS, 1.0)
    edits = cache_edits(SHAPES, widened, make_edit_examples(2, 8, *SIZE), SIZE, device, PIXELS, 1.0)
    assert edits.references.shape == edits.latents.shape and edits.num_image == 2 * captions.num_image
    assert [bucket.share for bucket in weighed([captions], [edits], 0.6)] == pytest.approx([0.4, 0.6])
    trainer = EditTrainer(SHAPES, copy.copy(widened), old, [captions, edits], device, 2 * 192)
    torch.manual_seed(0)
    with torch.no_grad():
        from_text, from_pictures = trainer._loss(captions, 64)[0], trainer._loss(edits, 64)[0]
    assert from_text < 1e-4, "it is still the old model"
    assert from_pictures > 1e-2


def test_the_folder_says_that_it_takes_a_reference(widened, tmp_path):
    export(widened, tmp_path, read_preset(FOLDER) | {"references": 1})
    spec = read_model_spec(tmp_path)
    assert spec.max_pictures == 1 and EDIT_BUCKETS.keys() <= set(spec.reference_sizes)
    assert {spec.reference_size(size) for size in ((512, 512), (1600, 900), (400, 300), (200, 300), (500, 250))} <= {
        *EDIT_BUCKETS
    }
    assert torch.equal(load(tmp_path).text_encoder.get_input_embeddings().weight.half(),
                       widened.text_encoder.get_input_embeddings().weight.half())  # fmt: skip
    assert unknown_words(spec, "zebra") == (), "of a folder that is not the package's nothing is known"


def test_paired_shares():
    pairs = [(True, True)] * 900 + [(True, False)] * 40 + [(False, True)] * 60
    difference, (low, high) = paired_difference(pairs)
    assert difference == 0.02 and low == pytest.approx(0.02 - 1.96 * (0.0996 / 1000) ** 0.5, abs=1e-4)
    assert low < difference < high


def test_a_sheet_has_all_edits():
    tasks = make_tasks(EDIT_SETS[3], 3)
    assert all(task.picture.shape == (176, 352, 3) and task.picture.dtype == np.uint8 for task in tasks)
    drawn = [Edited(task, task.picture, EditVerdict()) for task in tasks]
    marked, plain = sheet_of(drawn), before_after_sheet(drawn)
    assert marked.size == plain.size and marked.tobytes() != plain.tobytes()
