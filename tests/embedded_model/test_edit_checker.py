"""The edit checker says yes to what the renderer draws before and after, and no to anything else."""

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.embedded_model.edit_checker import check_edit
from benchmarks.embedded_model.edits import make_edits, scenes_of
from benchmarks.embedded_model.instructions import OPERATIONS, Edit
from benchmarks.embedded_model.renderer import draw
from benchmarks.embedded_model.world import Thing

SIZE = (192, 160)
LEFT, RIGHT = (0.3, 0.5), (0.9, 0.5)
CIRCLE, STAR = Thing("red", "circle"), Thing("yellow", "star")
BLUE = Edit("colour", (CIRCLE, STAR, None), (replace(CIRCLE, colour="blue"), STAR, None), ("mint", "mint"), 0)


def pictures(edits, which, centres):
    """[N, height, width, 3], uint8."""
    drawn = draw(scenes_of(edits, which), np.asarray(centres), *SIZE)
    return ((drawn + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


def drawn(edit, which, *centres):
    return pictures([edit], which, [[*centres, (0.0, 0.0)][:3]])[0]


@pytest.fixture(scope="module")
def truth():
    placed = make_edits(np.random.default_rng(3), 60, *SIZE)
    return placed.edits, *(pictures(placed.edits, which, placed.centres) for which in ("before", "after"))


def test_what_is_rendered_is_right(truth):
    edits, before, after = truth
    assert {edit.operation for edit in edits} == set(OPERATIONS)
    verdicts = [check_edit(*pair, edit) for edit, *pair in zip(edits, before, after, strict=True)]
    assert [(edit, verdict) for edit, verdict in zip(edits, verdicts, strict=True) if not verdict.is_right] == []


def test_an_unedited_picture_is_wrong(truth):
    edits, before, _ = truth
    assert not any(check_edit(picture, picture, edit).is_right for edit, picture in zip(edits, before, strict=True))


def test_another_scene_is_wrong(truth):
    edits, before, after = truth
    others = np.roll(after, 1, axis=0)
    assert not any(check_edit(*pair, edit).is_right for edit, *pair in zip(edits, before, others, strict=True))


def test_the_scene_drawn_anew_elsewhere_is_wrong():
    """All is there that should be, but not where it was."""
    before = drawn(BLUE, "before", LEFT, RIGHT, LEFT)
    assert check_edit(before, drawn(BLUE, "after", LEFT, RIGHT, LEFT), BLUE).is_right
    moved = check_edit(before, drawn(BLUE, "after", LEFT, (0.9, 0.65), LEFT), BLUE)
    assert moved.change and not moved.others
    assert not check_edit(before, drawn(BLUE, "after", (0.42, 0.5), RIGHT, LEFT), BLUE).change


def test_a_change_of_another_thing_is_wrong():
    other = replace(BLUE, after=(CIRCLE, replace(STAR, colour="blue"), None), changed=1)
    verdict = check_edit(drawn(BLUE, "before", LEFT, RIGHT), drawn(other, "after", LEFT, RIGHT), BLUE)
    assert verdict.count and not verdict.others and not verdict.change


def test_spots_elsewhere_are_seen():
    """Too small to be things."""
    after = drawn(BLUE, "after", LEFT, RIGHT)
    after[150:158, 90:94] = after[5:13, 90:94] = 0
    verdict = check_edit(drawn(BLUE, "before", LEFT, RIGHT), after, BLUE)
    assert verdict.count and verdict.others and not verdict.pixels


def test_what_is_added_must_be_where_it_was_asked_for():
    add = Edit("add", (CIRCLE, None, None), (CIRCLE, STAR, None), ("white", "white"), 1, 0, "right")
    before = drawn(add, "before", LEFT, RIGHT)
    assert check_edit(before, drawn(add, "after", LEFT, RIGHT), add).is_right
    below = check_edit(before, drawn(add, "after", LEFT, (0.3, 0.83)), add)
    assert below.others and not below.change


def test_a_new_background_leaves_the_things():
    edit = Edit("background", BLUE.before, BLUE.before, ("mint", "navy"), None)
    before, after = (drawn(edit, which, LEFT, RIGHT) for which in ("before", "after"))
    assert check_edit(before, after, edit).is_right
    assert not check_edit(before, drawn(BLUE, "after", LEFT, RIGHT), edit).background


def test_a_picture_that_is_not_the_one_before_is_refused():
    with pytest.raises(ValueError, match="does not show what the edit begins with"):
        check_edit(drawn(BLUE, "after", LEFT, RIGHT), drawn(BLUE, "after", LEFT, RIGHT), BLUE)
