import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from tetrion.engine.transport import segment as segment_module
from tetrion.engine.transport.doorbell import DoorbellKind
from tetrion.engine.transport.segment import Backing, SharedMemoryError, SharedSegment, open_anonymous_file


def test_two_mappings_show_the_same_bytes(kinds: tuple[Backing, DoorbellKind]) -> None:
    first = SharedSegment.create("test", 10_000, backing=kinds[0])
    second = SharedSegment.attach(os.dup(first.fd), 10_000)
    assert first.view.nbytes == 10_000 and not any(first.view)
    first.array(np.float32, (10, 3), offset_bytes=64)[...] = np.arange(30).reshape(10, 3)
    assert (second.array(np.float32, (30,), offset_bytes=64) == np.arange(30)).all()
    first.close()
    second.close()


def test_a_child_sees_it_through_pass_fds_and_not_otherwise(kinds: tuple[Backing, DoorbellKind]) -> None:
    segment = SharedSegment.create("test", 4096, backing=kinds[0])
    assert not os.get_inheritable(segment.fd)
    script = (
        "import sys; from tetrion.engine.transport.segment import SharedSegment;"
        f"SharedSegment.attach({segment.fd}, 4096).view[:5] = b'child'"
    )
    command = [sys.executable, "-P", "-c", script]
    subprocess.run(command, pass_fds=[segment.fd], check=True)
    assert bytes(segment.view[:5]) == b"child"
    without = subprocess.run(command, check=False, capture_output=True, text=True)
    assert without.returncode == 1 and "Bad file descriptor" in without.stderr
    segment.close()


def test_it_is_reserved_when_created(kinds: tuple[Backing, DoorbellKind]) -> None:
    segment = SharedSegment.create("test", 1 << 20, backing=kinds[0])
    assert os.fstat(segment.fd).st_blocks * 512 >= 1 << 20
    segment.close()


def test_no_memory_is_an_error_with_numbers(
    kinds: tuple[Backing, DoorbellKind], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segment_module, "_available_bytes", lambda backing: 1_000_000)
    num_fds = len(os.listdir("/dev/fd"))
    with pytest.raises(SharedMemoryError, match="'test': wanted 1,000,001 bytes, 1,000,000 bytes are available") as e:
        SharedSegment.create("test", 1_000_001, backing=kinds[0])
    assert isinstance(e.value, OSError) and (e.value.wanted_bytes, e.value.available_bytes) == (1_000_001, 1_000_000)
    assert len(os.listdir("/dev/fd")) == num_fds


def test_more_than_the_machine_has() -> None:
    with pytest.raises(SharedMemoryError, match=r"wanted 1,125,899,906,842,624 bytes, [\d,]+ bytes are available"):
        SharedSegment.create("test", 1 << 50)


def test_failing_reservation_is_the_same_error_and_closes(
    kinds: tuple[Backing, DoorbellKind], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(fd: int, num_bytes: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(segment_module, "reserve", no_space)
    num_fds = len(os.listdir("/dev/fd"))
    with pytest.raises(SharedMemoryError, match="No space left on device"):
        SharedSegment.create("test", 4096, backing=kinds[0])
    assert len(os.listdir("/dev/fd")) == num_fds


def test_reservation_without_posix_fallocate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    segment = SharedSegment.create("test", (1 << 20) + 5)
    assert os.fstat(segment.fd).st_size == (1 << 20) + 5
    assert os.fstat(segment.fd).st_blocks * 512 >= 1 << 20
    segment.close()


@pytest.mark.parametrize("num_bytes", [0, -1])
def test_empty_segments_are_refused(num_bytes: int) -> None:
    with pytest.raises(ValueError, match=f"at least 1, got {num_bytes}"):
        SharedSegment.create("test", num_bytes)


def test_attaching_more_than_there_is() -> None:
    segment = SharedSegment.create("test", 100)
    with pytest.raises(ValueError, match="expected 101 bytes, it has 100"):
        SharedSegment.attach(segment.fd, 101)
    segment.close()


def test_arrays_are_bounded() -> None:
    segment = SharedSegment.create("test", 100)
    assert segment.array(np.uint8, (4,), 96).shape == (4,)
    for shape, offset_bytes in (((5,), 96), ((1,), -1), ((-1,), 0)):
        with pytest.raises(ValueError, match="do not fit in 100 bytes"):
            segment.array(np.uint8, shape, offset_bytes)
    segment.close()


@pytest.mark.parametrize(
    "look",
    [
        pytest.param(lambda segment: segment.array(np.uint8, (8192,)), id="array"),
        pytest.param(lambda segment: np.frombuffer(segment.view, np.uint8), id="np.frombuffer"),
        pytest.param(lambda segment: np.ndarray((8192,), np.uint8, buffer=segment.view), id="np.ndarray"),
        pytest.param(lambda segment: torch.frombuffer(segment.view, dtype=torch.uint8), id="torch.frombuffer"),
        pytest.param(lambda segment: torch.frombuffer(segment.view[:], dtype=torch.uint8), id="torch of a slice"),
    ],
)
def test_closing_while_it_is_looked_at_keeps_the_memory(look: Callable[[SharedSegment], Any]) -> None:
    segment = SharedSegment.create("test", 8192)
    array = look(segment)
    segment.close()
    segment.close()
    array[:] = 7
    assert int(array.sum()) == 7 * 8192 and segment.fd == -1 and len(segment.view) == 0


def test_closing_unmaps_what_nobody_looks_at(kinds: tuple[Backing, DoorbellKind]) -> None:
    num_fds = len(os.listdir("/dev/fd"))
    for _ in range(3):
        segment = SharedSegment.create("test", 4096, backing=kinds[0])
        segment.array(np.uint8, (4096,))[...] = 1
        segment.close()
    assert len(os.listdir("/dev/fd")) == num_fds, "a mapping holds a descriptor of its own"


def test_an_anonymous_file_is_empty_and_not_inherited(kinds: tuple[Backing, DoorbellKind]) -> None:
    fd = open_anonymous_file("test", kinds[0])
    assert os.fstat(fd).st_size == 0 and os.fstat(fd).st_nlink == 0 and not os.get_inheritable(fd)
    os.close(fd)
