"""Versions of slots: waited for, checked, taken away, published; what an abort or a wrong version changes."""

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from hypothesis import given
from hypothesis import strategies as st

from tests.kernels.slot_slabs import SlotSlabs, chunk
from tetrion.engine.parallel.words import reaches, slot_version
from tetrion.kernels.barrier import ABORTED
from tetrion.kernels.chunk_words import HALF_RANGE, chunk_words
from tetrion.kernels.slot_version import WRONG_VERSION, SlotVersions

SLOT, ME, SOURCE = 2, 1, 3
HIGHEST_STATE = HALF_RANGE - 1
STATES = [5, 1 << 31, HIGHEST_STATE]


@given(st.integers(0, HALF_RANGE**2 - 1), st.integers(0, HALF_RANGE**2 - 1))
def test_words_hold_all_64_bits(start: int, end: int) -> None:
    who = {"part": (1,), "rows": range(0), "everyone": (1,), "partners": (1,)}
    words = chunk_words(1, 4, slot=4, source=2, start_version=start, end_version=end, **who)
    slot, source, *halves = words[:6]
    assert (slot, source) == (4, 2) and all(-HALF_RANGE // 2 <= half < HALF_RANGE // 2 for half in halves)
    low, high, end_low, end_high = (half % HALF_RANGE for half in halves)
    assert high << 32 | low == start and end_high << 32 | end_low == end


def _versions(slabs: SlotSlabs, start: int, end: int = 0, source: int = SOURCE) -> SlotVersions:
    words = chunk(ME, SLOT, source=source, start_version=start, end_version=end, part=(SOURCE, ME))
    return slabs.versions(words, ME)


def _signed(version: int) -> int:
    return version - HALF_RANGE**2 * (version >= HALF_RANGE**2 // 2)


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize(("found", "wanted"), [(0, 0), (3, 3), (4, 3), (3, 4), (0, 9)])
@pytest.mark.parametrize("same_state", [True, False])
def test_waits_for_the_version_and_no_longer(device, state, found, wanted, same_state) -> None:
    """The abort word is set: a wait that is not over after ABORT_INTERVAL looks ends with it."""
    slabs = SlotSlabs()
    there, want = slot_version(state if same_state else state - 1, found), slot_version(state, wanted)
    slabs.version(SOURCE, SLOT).fill_(_signed(there))
    slabs.version(ME, SLOT).fill_(99)
    slabs.status[1] = 77
    slabs.abort[0] = 1
    _versions(slabs, want).wait()
    assert slabs.status.tolist() == ([0, 0] if reaches(there, want) else [ABORTED, 0])
    assert slabs.version(ME, SLOT).item() == 0, "what is about to be overwritten must not be read"
    assert slabs.version(SOURCE, SLOT).item() == _signed(there)


def test_a_holder_keeps_its_version(device) -> None:
    slabs, version = SlotSlabs(), slot_version(8, 2)
    slabs.version(ME, SLOT).fill_(version)
    versions = _versions(slabs, version, source=ME)
    versions.wait()
    versions.confirm(in_group=True)
    assert slabs.version(ME, SLOT).item() == version and not slabs.status.any()


@pytest.mark.parametrize("in_group", [False, True])
@pytest.mark.parametrize("found", [2, 3])
def test_a_pulled_state_is_confirmed_unless_its_source_went_on(device, found, in_group) -> None:
    slabs, wanted = SlotSlabs(), slot_version(8, 2)
    slabs.version(SOURCE, SLOT).fill_(slot_version(8, found))
    versions = _versions(slabs, wanted)
    versions.wait()
    versions.confirm(in_group=in_group)
    if found == 2:
        assert slabs.version(ME, SLOT).item() == wanted and not slabs.status.any()
    else:
        assert slabs.version(ME, SLOT).item() == 0
        assert slabs.status.tolist() == [WRONG_VERSION if in_group else 0, WRONG_VERSION]


@pytest.mark.parametrize("state", STATES)
def test_a_state_is_there_from_its_first_version_on(device, state) -> None:
    """As above the abort word ends a wait that is not over after ABORT_INTERVAL looks."""
    slabs, wanted = SlotSlabs(), slot_version(state, 4)
    versions = _versions(slabs, wanted)
    theirs = _versions(slabs, 0, slot_version(state, 2))
    theirs.publish()
    theirs.invalidate()
    assert slabs.version(ME, SLOT).item() == 0
    slabs.state_word(SOURCE, SLOT).copy_(slabs.state_word(ME, SLOT))
    slabs.abort[0] = 1
    slabs.version(ME, SLOT).fill_(99)
    versions.wait_for_state()
    assert not slabs.status.any() and slabs.version(ME, SLOT).item() == 99, "what is here may be read for now"
    slabs.state_word(SOURCE, SLOT).add_(1)
    versions.wait_for_state()
    assert slabs.status.tolist() == [ABORTED, 0]


def test_a_pulled_state_is_there_for_others(device) -> None:
    slabs, wanted = SlotSlabs(), slot_version(8, 2)
    slabs.version(SOURCE, SLOT).fill_(wanted)
    versions = _versions(slabs, wanted)
    versions.wait()
    versions.confirm(in_group=True)
    assert slabs.state_word(ME, SLOT).item() == 8


def test_entered_slot_has_no_version_until_it_is_published(device) -> None:
    slabs, end = SlotSlabs(), slot_version(HIGHEST_STATE, 6)
    slabs.version(ME, SLOT).fill_(slot_version(3, 4))
    versions = _versions(slabs, 0, end)
    versions.invalidate()
    assert slabs.version(ME, SLOT).item() == 0
    versions.publish()
    assert slabs.version(ME, SLOT).item() == _signed(end) and not slabs.status.any()


@pytest.mark.parametrize("case", ["abort word", "aborted before", "wrong version"])
def test_after_a_failure_nothing_changes(device, case) -> None:
    slabs, old = SlotSlabs(), slot_version(3, 4)
    slabs.version(ME, SLOT).fill_(old)
    if case == "abort word":
        slabs.abort[0] = 1
    else:
        slabs.status[0 if case == "aborted before" else 1] = ABORTED if case == "aborted before" else WRONG_VERSION
    versions = _versions(slabs, 0, slot_version(3, 6))
    versions.invalidate()
    assert slabs.version(ME, SLOT).item() == old and slabs.status.any()
    versions.publish()
    assert slabs.version(ME, SLOT).item() == old


def test_zero_words_change_nothing(device) -> None:
    slabs = SlotSlabs()
    slabs.version(ME, SLOT).fill_(17)
    versions = _versions(slabs, 0)
    versions.wait_for_state()
    versions.wait()
    versions.confirm(in_group=True)
    versions.invalidate()
    versions.publish()
    assert slabs.version(ME, SLOT).item() == 17 and not slabs.status.any()
