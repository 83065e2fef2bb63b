"""Words, versions and the ways to wait on them, without processes."""

import platform
import sys
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tetrion.engine.parallel.layout import ControlLayout
from tetrion.engine.parallel.words import (
    INVALID_VERSION,
    AbortWords,
    FutexWaiter,
    SharedWord,
    SleepWaiter,
    SlotVersion,
    Waiter,
    has_futex,
    platform_waiter,
    reaches,
    slot_version,
)

WAITERS = [SleepWaiter, pytest.param(FutexWaiter, marks=pytest.mark.skipif(not has_futex(), reason="no futex here"))]


def test_word_is_32_bits_at_its_offset() -> None:
    buffer = bytearray(b"\xff" * 16)
    word = SharedWord(memoryview(buffer), 8)
    word.store(2**32 + 7)
    assert word.load() == 7
    assert buffer == b"\xff" * 8 + (7).to_bytes(4, sys.byteorder) + b"\xff" * 4


def test_unaligned_word_is_refused() -> None:
    with pytest.raises(AssertionError, match="not aligned"):
        SharedWord(memoryview(bytearray(16)), 2)


@pytest.mark.parametrize("waiter_type", WAITERS)
def test_wait_ends_with_a_change(waiter_type: type[Waiter]) -> None:
    word, waiter = SharedWord(memoryview(bytearray(64)), 0), waiter_type()
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


@pytest.mark.parametrize("waiter_type", WAITERS)
def test_wait_is_bounded_and_skipped_if_the_word_has_changed(waiter_type: type[Waiter]) -> None:
    word, waiter = SharedWord(memoryview(bytearray(64)), 0), waiter_type()
    waiter.wait(word, 0, timeout_s=0.01)
    word.store(5)
    waiter.wait(word, 0, timeout_s=3600.0)
    assert word.load() == 5


def test_other_platforms_sleep_if_they_can_fence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    assert isinstance(platform_waiter(), SleepWaiter)
    with pytest.raises(RuntimeError, match="no futex on darwin x86_64"):
        FutexWaiter()


@pytest.mark.skipif(sys.platform == "darwin", reason="has OSMemoryBarrier")
def test_platform_without_a_fence_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "alpha")
    with pytest.raises(RuntimeError, match=r"no memory fence known on .* alpha"):
        platform_waiter()


@given(
    states=st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1)), steps=st.tuples(*[st.integers(0, 999)] * 2)
)
def test_version_reaches_only_its_own_state(states: tuple[int, int], steps: tuple[int, int]) -> None:
    (state, wanted_state), (step, wanted_step) = states, steps
    assert reaches(slot_version(state, step), slot_version(state, wanted_step)) == (step >= wanted_step)
    assert reaches(slot_version(state, step), slot_version(wanted_state, 0)) == (state == wanted_state)
    assert not reaches(INVALID_VERSION, slot_version(state, 0))


def test_every_version_changes_the_sequence() -> None:
    version = SlotVersion(memoryview(bytearray(64)), 0, platform_waiter())
    for value in (slot_version(2**40, 3), slot_version(2**40, 3), INVALID_VERSION):
        before = version.sequence.load()
        version.store(value)
        assert version.load() == value < 2**64 and version.sequence.load() == before + 1


def test_abort_words_are_one_per_device() -> None:
    control = memoryview(bytearray(ControlLayout(num_devices=3).num_bytes))
    engine, worker = AbortWords(control, 3), AbortWords(control, 3)
    engine.set(1)
    assert [worker.is_set(device) for device in range(3)] == [False, True, False]
    worker.clear(1)
    assert not engine.is_set(1)
