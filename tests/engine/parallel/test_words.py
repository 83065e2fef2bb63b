"""Words, versions and the ways to wait on them, without processes."""

import platform
import sys
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tetrion.engine.parallel.layout import NUM_BUFFERS, ControlLayout
from tetrion.engine.parallel.words import (
    INVALID_VERSION,
    AbortWords,
    SharedWord,
    SlotVersion,
    Waiter,
    is_of_state,
    reaches,
    slot_version,
)


def test_word_is_32_bits_at_its_offset() -> None:
    buffer = bytearray(b"\xff" * 16)
    word = SharedWord(memoryview(buffer), 8)
    word.store(2**32 + 7)
    assert word.load() == 7
    assert buffer == b"\xff" * 8 + (7).to_bytes(4, sys.byteorder) + b"\xff" * 4


def test_unaligned_word_is_refused() -> None:
    with pytest.raises(AssertionError, match="not aligned"):
        SharedWord(memoryview(bytearray(16)), 2)


def test_wait_ends_with_a_change() -> None:
    word, waiter = SharedWord(memoryview(bytearray(64)), 0), Waiter()
    ended = threading.Event()

    def wait_for_change() -> None:
        while word.load() == 0:
            waiter.wait(word, 0, timeout_s=60.0)
        ended.set()

    threading.Thread(target=wait_for_change, daemon=True).start()
    assert not ended.wait(0.05)
    word.store(1)
    waiter.wake(word)
    assert ended.wait(30.0)


def test_wait_is_bounded_and_skipped_if_the_word_has_changed() -> None:
    word, waiter = SharedWord(memoryview(bytearray(64)), 0), Waiter()
    waiter.wait(word, 0, timeout_s=0.01)
    word.store(5)
    waiter.wait(word, 0, timeout_s=3600.0)
    assert word.load() == 5


@pytest.mark.parametrize(("system", "machine"), [("darwin", "x86_64"), ("darwin", "arm64"), ("linux", "riscv64")])
def test_other_platforms_are_refused(monkeypatch: pytest.MonkeyPatch, system: str, machine: str) -> None:
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    with pytest.raises(RuntimeError, match=f"expected Linux on x86_64 or aarch64, this is {system} on {machine}"):
        Waiter()


@given(
    states=st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1)), steps=st.tuples(*[st.integers(0, 999)] * 2)
)
def test_version_reaches_only_its_own_state(states: tuple[int, int], steps: tuple[int, int]) -> None:
    (state, wanted_state), (step, wanted_step) = states, steps
    assert reaches(slot_version(state, step), slot_version(state, wanted_step)) == (step >= wanted_step)
    assert reaches(slot_version(state, step), slot_version(wanted_state, 0)) == (state == wanted_state)
    assert not reaches(INVALID_VERSION, slot_version(state, 0))


def test_an_invalid_version_is_of_no_state() -> None:
    """Not even of the one whose number is 0."""
    assert not is_of_state(INVALID_VERSION, slot_version(0, 0)) and not reaches(INVALID_VERSION, slot_version(0, 0))
    assert is_of_state(slot_version(7, 3), slot_version(7, 9)) and not is_of_state(
        slot_version(6, 3), slot_version(7, 3)
    )


def test_every_version_changes_the_sequence_and_leaves_the_other_buffers() -> None:
    slab, waiter = memoryview(bytearray(128)), Waiter()
    versions = [SlotVersion(slab, 64, buffer, waiter) for buffer in range(NUM_BUFFERS)]
    stored = [INVALID_VERSION] * NUM_BUFFERS
    for value in (slot_version(2**40, 3), slot_version(2**40, 3), INVALID_VERSION, slot_version(7, 1)):
        for buffer, version in enumerate(versions):
            before = versions[0].sequence.load()
            version.store(value)
            stored[buffer] = value
            assert [each.load() for each in versions] == stored and value < 2**64
            assert versions[-1].sequence.load() == before + 1
    assert not any(slab[:64]), "the slot before"


def test_abort_words_are_one_per_device() -> None:
    control = memoryview(bytearray(ControlLayout(num_devices=3).num_bytes))
    engine, worker = AbortWords(control, 3), AbortWords(control, 3)
    engine.set(1)
    assert [worker.is_set(device) for device in range(3)] == [False, True, False]
    worker.clear(1)
    assert not engine.is_set(1)
