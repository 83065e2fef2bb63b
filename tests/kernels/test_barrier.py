"""The pairwise barrier: what it tells whom, when it lets go, abort, wrap-around; then several devices at once.

Several devices are forked processes with shared memory in the interpreter (which is not thread-safe), and streams of
one GPU otherwise.
"""

import multiprocessing
import time
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from tetrion.kernels.barrier import ABORT_INTERVAL, ABORTED, CACHE_LINE, barrier

NUM_DEVICES = 4
WORD = CACHE_LINE // 4
COUNTERS_OFFSET = 2 * CACHE_LINE
FIRST_COUNTER = COUNTERS_OFFSET // 4
PATIENCE_S = 60.0
LOWEST, HIGHEST = -(2**31), 2**31 - 1


class Fleet:
    """Every device's words, all in one process' reach. `counter(receiver, sender)` is a view of one word."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.slabs = self._shared(NUM_DEVICES, (2 + NUM_DEVICES + 1) * WORD)
        self.expected = self._shared(NUM_DEVICES, NUM_DEVICES)
        self.status = self._shared(NUM_DEVICES, 1)
        self.abort = torch.zeros(NUM_DEVICES, 1, dtype=torch.int32, device="cpu")
        self.abort = self.abort.pin_memory() if self.on_gpu else self.abort.share_memory_()
        self.bases = torch.tensor([slab.data_ptr() for slab in self.slabs], dtype=torch.int64)
        self.values, self.seen = self._shared(NUM_DEVICES), self._shared(NUM_DEVICES, 16)

    def counter(self, receiver: int, sender: int) -> Tensor:
        return self.slabs[receiver, FIRST_COUNTER + sender * WORD]

    def lanes(self, me: int, members: Sequence[int]) -> Tensor:
        return torch.tensor([*members, *[me] * (NUM_DEVICES - len(members))], dtype=torch.int32)

    def barrier(self, me: int, members: Sequence[int], lanes: Tensor | None = None) -> None:
        barrier(
            self.lanes(me, members) if lanes is None else lanes,
            self.bases,
            self.expected[me],
            self.abort[me],
            self.status[me],
            device_id=me,
            counters_offset=COUNTERS_OFFSET,
        )

    def _shared(self, *shape: int) -> Tensor:
        words = torch.zeros(shape, dtype=torch.int32)
        return words if self.on_gpu else words.share_memory_()


@pytest.fixture
def fleet(device: torch.device) -> Fleet:
    return Fleet(device)


@pytest.mark.parametrize("members", [(0, 1, 2, 3), (3, 1, 0), (1, 3), (2, 1, 3)])
def test_tells_each_other_member_once(fleet: Fleet, members: tuple[int, ...]) -> None:
    others = [member for member in members if member != 1]
    for other in others:
        fleet.counter(1, other).fill_(1)  # everybody else is there
    before = fleet.slabs.clone()
    fleet.barrier(1, members)
    assert fleet.expected[1].tolist() == [int(device in others) for device in range(NUM_DEVICES)]
    for other in others:
        assert fleet.counter(other, 1).item() == 1
        fleet.counter(other, 1).fill_(0)
    assert torch.equal(fleet.slabs, before), "a word beside the counters changed"
    assert fleet.status[1].item() == 0


def test_a_group_of_one_tells_nobody(fleet: Fleet) -> None:
    fleet.barrier(2, (2,))
    assert not fleet.slabs.any() and not fleet.expected.any() and not fleet.status.any()


def test_counts_go_on_where_the_pair_left_off(fleet: Fleet) -> None:
    """A peer may be one barrier ahead; groups of any order and size share the pairs' counts."""
    fleet.counter(0, 1).fill_(3)
    fleet.counter(0, 2).fill_(2)
    for members in ((0, 1), (1, 2, 0), (2, 0)):
        fleet.barrier(0, members)
    assert fleet.expected[0].tolist() == [0, 2, 2, 0]
    assert [fleet.counter(peer, 0).item() for peer in range(NUM_DEVICES)] == [0, 2, 2, 0]


@pytest.mark.parametrize(("begun", "counter"), [(HIGHEST, LOWEST), (HIGHEST, LOWEST + 1), (HIGHEST - 1, LOWEST)])
def test_counters_wrap(fleet: Fleet, begun: int, counter: int) -> None:
    """The peer is there, or one barrier ahead, on either side of the wrap; an abort would end a wait for it."""
    fleet.expected[0, 1] = begun
    fleet.counter(1, 0).fill_(begun)
    fleet.counter(0, 1).fill_(counter)
    fleet.abort[0] = 1
    fleet.barrier(0, (0, 1))
    assert fleet.status[0].item() == 0, "waited for a peer that had arrived"
    next_count = LOWEST if begun == HIGHEST else begun + 1
    assert fleet.expected[0, 1].item() == fleet.counter(1, 0).item() == next_count


def test_a_peer_behind_the_wrap_is_waited_for(fleet: Fleet) -> None:
    fleet.expected[0, 1] = HIGHEST
    fleet.counter(0, 1).fill_(HIGHEST)
    fleet.abort[0] = 1
    fleet.barrier(0, (0, 1))
    assert fleet.status[0].item() == ABORTED


def test_abort_ends_the_wait_and_all_that_follow(fleet: Fleet) -> None:
    fleet.counter(0, 1).fill_(1)  # device 2 never comes
    fleet.abort[0] = 1
    fleet.barrier(0, (0, 1, 2))
    assert fleet.status[0].item() == ABORTED
    arrived = fleet.slabs.clone()
    fleet.barrier(0, (0, 1))
    assert torch.equal(fleet.slabs, arrived), "an aborted device told somebody that it arrived"
    assert fleet.expected[0].tolist() == [0, 1, 1, 0]


def test_an_abort_word_does_not_stop_what_need_not_wait(fleet: Fleet) -> None:
    """The host's word is slow to read: it is looked at only after ABORT_INTERVAL looks at the counters."""
    assert ABORT_INTERVAL > 1
    fleet.counter(0, 1).fill_(1)
    fleet.abort[0] = 1
    fleet.barrier(0, (0, 1))
    assert fleet.status[0].item() == 0


SCHEDULES: dict[int, list[tuple[int, ...]]] = {
    0: [(0, 1, 2), (0, 2), (2, 1, 0), (0, 1, 2)],
    1: [(0, 1, 2), (3, 1), (2, 1, 0), (3, 1), (0, 1, 2)],
    2: [(0, 1, 2), (0, 2), (2, 1, 0), (0, 1, 2)],
    3: [(3, 1), (3, 1)],
}


def test_nobody_passes_before_all_have_arrived(fleet: Fleet) -> None:
    """Each device writes its round's number, meets the group, and notes whether all members had got that far."""
    rounds = {me: [Round(fleet, me, index) for index in range(len(SCHEDULES[me]))] for me in SCHEDULES}

    def work(me: int) -> None:
        for index, members in enumerate(SCHEDULES[me]):
            fleet.values[me].fill_(index + 1)
            if not fleet.on_gpu:
                time.sleep(0.02 * ((me + index) % 3))
            this = rounds[me][index]
            fleet.barrier(me, members, this.lanes)
            fleet.seen[me, index] = (fleet.values[this.members] >= this.least).all()

    if fleet.on_gpu:
        _run_streams(fleet, work)
    else:
        _run_processes(work)
    for me, schedule in SCHEDULES.items():
        assert fleet.seen[me, : len(schedule)].tolist() == [1] * len(schedule), f"device {me} passed too early"
    for me, schedule in SCHEDULES.items():
        meetings = [sum(peer != me and peer in group for group in schedule) for peer in range(NUM_DEVICES)]
        assert fleet.expected[me].tolist() == meetings
        assert [fleet.counter(peer, me).item() for peer in range(NUM_DEVICES)] == meetings
    assert not fleet.status.any()


class Round:
    """What a device needs for its `index`-th group; made beforehand, since a copy to a GPU waits for its stream.

    `least`: the round number that each member has written before it comes to this meeting.
    """

    def __init__(self, fleet: Fleet, me: int, index: int) -> None:
        group = SCHEDULES[me][index]
        occurrence = SCHEDULES[me][:index].count(group)
        meetings = [[i for i, other in enumerate(SCHEDULES[member]) if other == group] for member in group]
        self.lanes = fleet.lanes(me, group)
        self.members = torch.tensor(group)
        self.least = torch.tensor([indices[occurrence] + 1 for indices in meetings], dtype=torch.int32)


def _run_streams(fleet: Fleet, work: Callable[[int], None]) -> None:
    """One graph a device, captured before any runs: while a device waits, nothing may be loaded or allocated."""
    for members in ((0, 1), (0, 1, 2)):
        for peer in members[1:]:
            fleet.counter(0, peer).fill_(1)
        fleet.expected.zero_()
        fleet.barrier(0, members)
    torch.cuda.synchronize()
    for words in (fleet.slabs, fleet.expected, fleet.status):
        words.zero_()
    graphs = [torch.cuda.CUDAGraph() for _ in range(NUM_DEVICES)]
    for me, graph in enumerate(graphs):
        with torch.cuda.graph(graph):
            work(me)
    torch.cuda.synchronize()
    ends = [torch.cuda.Event() for _ in graphs]
    for graph, end in zip(graphs, ends, strict=True):
        with torch.cuda.stream(torch.cuda.Stream()):
            graph.replay()
            end.record()
    deadline_s = time.monotonic() + PATIENCE_S
    while not all(end.query() for end in ends):
        if time.monotonic() > deadline_s:
            fleet.abort.fill_(1)
        time.sleep(0.01)
    torch.cuda.synchronize()


def _run_processes(work: Callable[[int], None]) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=work, args=(me,)) for me in range(NUM_DEVICES)]
    for process in processes:
        process.start()
    deadline_s = time.monotonic() + PATIENCE_S
    for process in processes:
        process.join(max(0.0, deadline_s - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    assert codes == [0] * NUM_DEVICES, f"exit codes {codes}"
