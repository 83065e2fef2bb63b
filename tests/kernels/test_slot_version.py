"""Versions of slots' buffers: waited for, checked, taken away, published; what an abort or a wrong version changes."""

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from hypothesis import given
from hypothesis import strategies as st

from tests.kernels.slot_slabs import SlotSlabs, chunk
from tetrion.engine.parallel.layout import NUM_BUFFERS
from tetrion.engine.parallel.words import reaches, slot_version
from tetrion.kernels import slot_version as module
from tetrion.kernels.barrier import ABORTED
from tetrion.kernels.chunk_words import HALF_RANGE, chunk_words
from tetrion.kernels.slot_version import WRONG_VERSION, SlotVersions

SLOT, ME, SOURCE = 2, 1, 3
HIGHEST_STATE = HALF_RANGE - 1
STATES = [5, 1 << 31, HIGHEST_STATE]
CHUNK_INDEX, START, END = 4, 1, 2
"""A chunk, and the buffers that it reads and writes."""


def test_kernels_know_how_many_buffers_a_slot_has() -> None:
    assert module.NUM_BUFFERS.value == NUM_BUFFERS <= module.LANES.value
    assert (CHUNK_INDEX % NUM_BUFFERS, (CHUNK_INDEX + 1) % NUM_BUFFERS) == (START, END)


@given(st.integers(0, HALF_RANGE**2 - 1), st.integers(0, HALF_RANGE**2 - 1))
def test_words_hold_all_64_bits(start: int, end: int) -> None:
    who = {"part": (1,), "rows": range(0), "everyone": (1,), "partners": (1,)}
    state = {"slot": 4, "source": 2, "start_buffer": 1, "end_buffer": 2}
    words = chunk_words(1, 4, start_version=start, end_version=end, **state, **who)
    slot, source, *halves = words[:6]
    assert (slot, source) == (4, 2) and all(-HALF_RANGE // 2 <= half < HALF_RANGE // 2 for half in halves)
    low, high, end_low, end_high = (half % HALF_RANGE for half in halves)
    assert high << 32 | low == start and end_high << 32 | end_low == end


def _versions(slabs: SlotSlabs, start: int, end: int = 0, source: int = SOURCE) -> SlotVersions:
    """Those of the chunk on ME."""
    versions = {"start_version": start, "end_version": end}
    words = chunk(ME, SLOT, source=source, chunk_index=CHUNK_INDEX, part=(SOURCE, ME), **versions)
    return slabs.versions(words, ME)


def _signed(version: int) -> int:
    return version - HALF_RANGE**2 * (version >= HALF_RANGE**2 // 2)


def _fill(slabs: SlotSlabs, device: int, *versions: int) -> None:
    """One for each buffer."""
    for buffer, version in enumerate(versions):
        slabs.version(device, SLOT, buffer).fill_(_signed(version))


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize(("found", "wanted"), [(0, 0), (3, 3), (4, 3), (3, 4), (0, 9)])
@pytest.mark.parametrize("same_state", [True, False])
def test_waits_for_the_version_and_no_longer(device, state, found, wanted, same_state) -> None:
    """The abort word is set: a wait that is not over after ABORT_INTERVAL looks ends with it. Other buffers, of which
    one has what is wanted or will have it, do not count, and keep their versions."""
    slabs = SlotSlabs()
    there, want = slot_version(state if same_state else state - 1, found), slot_version(state, wanted)
    _fill(slabs, SOURCE, want, there, want)
    _fill(slabs, ME, 97, 98, 99)
    slabs.status[1] = 77
    slabs.abort[0] = 1
    _versions(slabs, want).wait()
    assert slabs.status.tolist() == ([0, 0] if reaches(there, want) else [ABORTED, 0])
    assert slabs.versions_of(ME, SLOT) == [97, 0, 99], "what is about to be overwritten must not be read"
    assert slabs.versions_of(SOURCE, SLOT) == [_signed(version) for version in (want, there, want)]


def test_a_holder_keeps_its_versions(device) -> None:
    slabs, version = SlotSlabs(), slot_version(8, 2)
    _fill(slabs, ME, 97, version, 99)
    versions = _versions(slabs, version, source=ME)
    versions.wait()
    versions.confirm(in_group=True)
    assert slabs.versions_of(ME, SLOT) == [97, version, 99] and not slabs.status.any()


@pytest.mark.parametrize("in_group", [False, True])
@pytest.mark.parametrize("found", [2, 3])
def test_a_pulled_state_is_confirmed_unless_its_source_went_on(device, found, in_group) -> None:
    slabs, wanted = SlotSlabs(), slot_version(8, 2)
    _fill(slabs, SOURCE, 97, slot_version(8, found), wanted)
    _fill(slabs, ME, 97, 98, 99)
    versions = _versions(slabs, wanted)
    versions.wait()
    versions.confirm(in_group=in_group)
    if found == 2:
        assert slabs.versions_of(ME, SLOT) == [97, wanted, 99] and not slabs.status.any()
    else:
        assert slabs.versions_of(ME, SLOT) == [97, 0, 99]
        assert slabs.status.tolist() == [WRONG_VERSION if in_group else 0, WRONG_VERSION]


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("buffer", range(NUM_BUFFERS))
def test_a_state_is_there_if_any_buffer_has_it(device, state, buffer) -> None:
    """As above the abort word ends a wait that is not over after ABORT_INTERVAL looks."""
    slabs, versions = SlotSlabs(), [slot_version(state - 1, 9)] * NUM_BUFFERS
    wait = _versions(slabs, slot_version(state, 4))
    slabs.abort[0] = 1
    versions[buffer] = slot_version(state, 2)
    _fill(slabs, SOURCE, *versions)
    _fill(slabs, ME, 97, 98, 99)
    wait.wait_for_state()
    assert not slabs.status.any() and slabs.versions_of(ME, SLOT) == [97, 98, 99], "what is here may be read for now"
    slabs.version(SOURCE, SLOT, buffer).fill_(0)
    wait.wait_for_state()
    assert slabs.status.tolist() == [ABORTED, 0]


def test_a_slot_without_versions_has_no_state(device) -> None:
    """Not even the one whose number is 0."""
    slabs = SlotSlabs()
    slabs.abort[0] = 1
    _versions(slabs, slot_version(0, 1)).wait_for_state()
    assert slabs.status.tolist() == [ABORTED, 0]


def test_an_entered_end_buffer_has_no_version_until_it_is_published(device) -> None:
    slabs, end = SlotSlabs(), slot_version(HIGHEST_STATE, 6)
    start, old = slot_version(3, 4), slot_version(3, 3)
    _fill(slabs, ME, old, start, old)
    versions = _versions(slabs, 0, end)
    versions.invalidate()
    assert slabs.versions_of(ME, SLOT) == [old, start, 0]
    versions.publish()
    assert slabs.versions_of(ME, SLOT) == [old, start, _signed(end)] and not slabs.status.any()


@pytest.mark.parametrize("case", ["abort word", "aborted before", "wrong version"])
def test_after_a_failure_nothing_changes(device, case) -> None:
    slabs, old = SlotSlabs(), [slot_version(3, step) for step in (5, 4, 3)]
    _fill(slabs, ME, *old)
    if case == "abort word":
        slabs.abort[0] = 1
    else:
        slabs.status[0 if case == "aborted before" else 1] = ABORTED if case == "aborted before" else WRONG_VERSION
    versions = _versions(slabs, 0, slot_version(3, 6))
    versions.invalidate()
    assert slabs.versions_of(ME, SLOT) == old and slabs.status.any()
    versions.publish()
    assert slabs.versions_of(ME, SLOT) == old


def test_zero_words_change_nothing(device) -> None:
    slabs = SlotSlabs()
    _fill(slabs, ME, 17, 18, 19)
    versions = _versions(slabs, 0)
    versions.wait_for_state()
    versions.wait()
    versions.confirm(in_group=True)
    versions.invalidate()
    versions.publish()
    assert slabs.versions_of(ME, SLOT) == [17, 18, 19] and not slabs.status.any()
