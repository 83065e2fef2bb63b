"""The demo's edits are in words that the model is taught, and lines of another form are refused."""

from pathlib import Path

import pytest

from benchmarks.embedded_model.captions import vocabulary
from benchmarks.embedded_model.demo_edits import read_edits
from benchmarks.embedded_model.instructions import instruction_words

FILE = Path(__file__).parents[2] / "configs/demo_edits.txt"


def test_the_demo_s_words_are_taught():
    edits = read_edits(FILE)
    known = {*vocabulary(), *instruction_words()}
    assert len(edits) == 8
    assert {word for edit in edits for text in edit for word in text.split()} <= known


@pytest.mark.parametrize("line", ["", "a red circle", "| make the circle blue", "a red circle |"])
def test_a_line_without_both_is_refused(tmp_path, line):
    file = tmp_path / "edits.txt"
    file.write_text(f"a red circle | make it blue\n{line}\n")
    with pytest.raises(ValueError, match=r"edits.txt:2: expected a prompt, \| and an instruction"):
        read_edits(file)
