"""The device's clock on the host's, and recording on a real GPU."""

import time

import pytest
import torch

from tetrion.engine.worker.work_queue import REANCHOR_S, CudaQueue, DeviceClock, ImmediateQueue


class FakeEvent:
    """Happens at `device_s` on a clock of its own."""

    def __init__(self, device_s: float) -> None:
        self.device_s = device_s

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, later: "FakeEvent") -> float:
        return 1e3 * (later.device_s - self.device_s)


def clock_at(offset_s: float, monkeypatch: pytest.MonkeyPatch) -> DeviceClock:
    """A clock made when the device's shows 0 and the host's `offset_s`."""
    monkeypatch.setattr(time, "monotonic", lambda: offset_s)
    return DeviceClock(FakeEvent(0.0))


def test_events_lie_where_their_distance_says(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = clock_at(100.0, monkeypatch)
    assert clock.time_s(FakeEvent(2.5)) == pytest.approx(102.5)
    assert clock.time_s(FakeEvent(-1.0)) == pytest.approx(99.0)


def test_an_event_is_never_later_than_it_was_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = clock_at(100.3, monkeypatch)  # the anchor was seen 0.3 s late
    clock.observe(FakeEvent(1.0), 101.1, blocked=True)
    assert clock.time_s(FakeEvent(2.0)) == pytest.approx(102.1)
    clock.observe(FakeEvent(3.0), 103.9, blocked=True)  # seen late: tells nothing
    assert clock.time_s(FakeEvent(4.0)) == pytest.approx(104.1)


def test_drift_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = clock_at(100.0, monkeypatch)
    later_s = REANCHOR_S + 1
    clock.observe(FakeEvent(later_s), 100.0 + later_s + 0.2, blocked=False)  # done long before anybody looked
    assert clock.time_s(FakeEvent(later_s)) == pytest.approx(100.0 + later_s)
    clock.observe(FakeEvent(later_s), 100.0 + later_s + 0.2, blocked=True)
    assert clock.time_s(FakeEvent(later_s)) == pytest.approx(100.2 + later_s)


def test_without_a_gpu_work_is_done_when_it_is_enqueued() -> None:
    queue, done = ImmediateQueue(), []
    before_s, mark = time.monotonic(), queue.mark()
    replay = queue.record(lambda: done.append(1))
    assert not done
    replay()
    mark.wait()
    assert done == [1] and before_s <= mark.time_s() <= time.monotonic()


@pytest.mark.gpu
def test_a_recorded_graph_runs_when_it_is_replayed() -> None:
    queue = CudaQueue(0)
    count = torch.zeros(1, dtype=torch.int32, device=queue.device)

    def work() -> None:
        count.add_(1)

    replay = queue.record(work)
    before_s, start = time.monotonic(), queue.mark()
    for _ in range(3):
        replay()
    copied, end = queue.to_host(count), queue.mark()
    end.wait()
    assert copied.item() == 3
    assert before_s - 0.01 <= start.time_s() <= end.time_s() <= time.monotonic()


@pytest.mark.gpu
def test_what_fails_in_the_midst_of_recording_is_recorded_the_next_time() -> None:
    queue = CudaQueue(0)
    count = torch.zeros(1, dtype=torch.int32, device=queue.device)
    errors = iter([ValueError("in the midst")])

    def work() -> None:
        count.add_(1)
        recording.cut()  # what is before has run
        for error in errors:
            raise error
        count.add_(10)

    recording = queue.record(work)
    with pytest.raises(ValueError, match="in the midst"):
        recording()
    queue.drain()
    assert count.item() == 1
    for expected in (12, 23):
        recording()
        queue.drain()
        assert count.item() == expected


@pytest.mark.gpu
def test_pieces_of_a_recording_follow_each_other_and_have_what_the_ones_before_made() -> None:
    """Through more cuts than pieces, the memory of earlier pieces in use."""
    queue = CudaQueue(0)
    start, result = (torch.ones(1000, device=queue.device) for _ in range(2))

    def work() -> None:
        values = [start]
        for number in range(40):
            values.append(values[-1] + values[number // 2] % 7)
            recording.cut()
        result.copy_(values[-1])

    recording = queue.record(work)
    results = []
    for value in (1.0, 1.0, 2.0, 3.0):
        start.fill_(value)
        recording()
        results.append(queue.to_host(result))
    queue.drain()
    expected = []
    for value in (1.0, 1.0, 2.0, 3.0):
        values = [torch.full((1000,), value)]
        for number in range(40):
            values.append(values[-1] + values[number // 2] % 7)
        expected.append(values[-1])
    assert all(map(torch.equal, results, expected))


@pytest.mark.gpu
def test_a_rehearsal_runs_nothing() -> None:
    queue = CudaQueue(0)
    count = torch.zeros(1, dtype=torch.int32, device=queue.device)
    queue.rehearse(lambda: count.add_(1), num_bytes=0)  # type: ignore[arg-type, func-returns-value]
    queue.rehearse(lambda: pytest.fail("too large"), num_bytes=1 << 50)
    queue.drain()
    assert count.item() == 0
