"""Tables and words of a chunk hold what they are given, in the order that kernels read."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from tetrion.engine.parallel.group import split
from tetrion.kernels import group_table
from tetrion.kernels.chunk_words import (
    chunk_words,
    lanes_for,
    lists_of,
    num_words,
    publishing_words,
    rehearsal_words,
)
from tetrion.kernels.group_table import group_words


@pytest.mark.parametrize("counts", [(7,), (7, 30), (0, 30, 5)])
def test_a_table_has_where_every_range_begins(counts: tuple[int, ...]) -> None:
    words = group_words([split(count, 3) for count in counts], split(8, 3))
    assert len(words) == group_table.num_words(3)
    starts = [[part.start for part in split(n, 3)] + [n] for n in (*counts, *[0] * (3 - len(counts)), 8)]
    assert words == [start for part in starts for start in part]


def test_ranges_that_do_not_split_a_whole_are_refused() -> None:
    with pytest.raises(AssertionError, match="do not split"):
        group_words([[range(0, 2), range(3, 4)]], split(8, 2))
    with pytest.raises(AssertionError, match="4 segments"):
        group_words([split(4, 2)] * 4, split(8, 2))


def test_lists_of_devices_are_filled_up_with_ones_own() -> None:
    who = {"part": (5, 2), "rows": range(3, 9), "everyone": (1, 0, 5, 2), "partners": (0, 2)}
    buffers = {"start_buffer": 2, "end_buffer": 0}
    words = chunk_words(2, lanes_for(6), slot=1, source=4, start_version=7, end_version=1 << 32, **buffers, **who)
    assert words[:12] == [1, 4, 7, 0, 0, 1, 1, 1, 3, 9, 2, 0]
    part, everyone, partners = (words.tolist() for words in lists_of(torch.tensor(words)))
    assert part == [5, 2, *[2] * 6] and everyone == [1, 0, 5, 2, *[2] * 4] and partners == [0, *[2] * 7]


def test_words_of_a_rehearsal_name_nobody_else_and_no_version() -> None:
    words = rehearsal_words(3, lanes_for(4))
    assert words == [0, 3, *[0] * 10, *[3] * 12] and len(words) == num_words(lanes_for(4))


def test_to_publish_takes_no_peers_and_no_rows() -> None:
    words = publishing_words(3, 4, 2, 1, 9)
    assert words == [2, 3, 0, 0, 9, 0, 1, 0, 0, 0, 1, 1, *[3] * 12]


def test_lists_are_powers_of_two_and_aligned() -> None:
    assert [lanes_for(n) for n in (1, 2, 4, 5, 8, 9)] == [4, 4, 4, 8, 8, 16]
