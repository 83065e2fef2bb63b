"""The ring against a queue that cannot be wrong; then what happens when it is misused or overwritten."""

import os
import threading
from collections import deque
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tetrion.engine.transport.ring import MessageTooLong, Ring, RingCorrupt
from tetrion.engine.transport.segment import SharedSegment

MakeRing = Callable[[int], tuple[Ring, Ring]]
TAIL, HEAD, RECORDS = 64, 128, 256


def record_bytes(message_bytes: int) -> int:
    return 8 + -(-message_bytes // 8) * 8


class RingAgainstQueue(RuleBasedStateMachine):
    """Any order of writes and reads, of any size, leaves ring and queue in agreement."""

    @initialize(words=st.integers(8, 40))
    def make(self, words: int) -> None:
        self.producer = Ring.create("test", 8 * words)
        self.consumer = Ring.attach(os.dup(self.producer.segment.fd), self.producer.segment.num_bytes)
        self.queue: deque[bytes] = deque()

    def used(self) -> int:
        return sum(record_bytes(len(data)) for data in self.queue)

    @rule(data=st.binary(max_size=120))
    def write(self, data: bytes) -> None:
        room = self.producer.capacity_bytes - self.used()
        assert self.producer.can_write(0) == (room >= 8)
        if len(data) > self.producer.max_message_bytes:
            with pytest.raises(MessageTooLong):
                self.producer.try_write(data)
            return
        fits = record_bytes(len(data)) <= room
        assert self.producer.can_write(len(data)) == fits
        assert self.producer.try_write(data) == fits
        if fits:
            self.queue.append(data)

    @rule()
    def write_all_that_fits(self) -> None:
        if self.producer.free_bytes >= 8:
            data = os.urandom(self.producer.free_bytes - 8)
            assert self.producer.try_write(data)
            self.queue.append(data)
        assert self.producer.free_bytes == 0 and not self.producer.try_write(b"")

    @rule()
    def read(self) -> None:
        assert self.consumer.try_read() == (self.queue.popleft() if self.queue else None)

    @rule()
    def read_everything(self) -> None:
        while self.queue:
            self.read()
        self.read()

    @rule()
    def replace_both_ends(self) -> None:
        """Each end can be found again in the memory alone."""
        fd, num_bytes = os.dup(self.producer.segment.fd), self.producer.segment.num_bytes
        ends = Ring.attach(fd, num_bytes), Ring.attach(os.dup(fd), num_bytes)
        self.teardown()
        self.producer, self.consumer = ends

    @invariant()
    def sizes_agree(self) -> None:
        assert self.producer.free_bytes == self.producer.capacity_bytes - self.used()
        assert self.consumer.arm() == (not self.queue)
        assert self.producer.consumer_sleeps()
        self.consumer.disarm()
        assert not self.producer.consumer_sleeps()

    def teardown(self) -> None:
        self.producer.close()
        self.consumer.close()


RingAgainstQueue.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestRingAgainstQueue = RingAgainstQueue.TestCase


@given(sizes=st.lists(st.integers(0, 3000), max_size=60), capacity_words=st.integers(380, 1000))
@settings(max_examples=40, deadline=None)
def test_two_threads_lose_and_reorder_nothing(sizes: list[int], capacity_words: int) -> None:
    """Producer and consumer at once; the producer tries again while the ring is full."""
    producer = Ring.create("test", 8 * capacity_words)
    consumer = Ring.attach(os.dup(producer.segment.fd), producer.segment.num_bytes)
    messages = [bytes([i % 256]) * size for i, size in enumerate(sizes)]
    received: list[bytes] = []

    def produce() -> None:
        for message in messages:
            while not producer.try_write(message):
                os.sched_yield()

    thread = threading.Thread(target=produce)
    thread.start()
    while len(received) < len(messages):
        if (data := consumer.try_read()) is not None:
            received.append(data)
        else:
            os.sched_yield()
    thread.join()
    assert received == messages and consumer.try_read() is None
    producer.close()
    consumer.close()


def test_the_order_for_weakly_ordered_processors_is_the_same_ring(ring_ends: MakeRing) -> None:
    producer, consumer = ring_ends(64)
    fences = []
    for end in (producer, consumer):
        end._stores_may_pass_stores, end._fence = True, lambda: fences.append(1)  # type: ignore[assignment]
    for i in range(20):
        assert producer.try_write(b"%d" % i * i) and consumer.try_read() == b"%d" % i * i
    assert len(fences) == 3 * 20


def test_both_sides_look_only_after_their_fence(ring_ends: MakeRing) -> None:
    """What the other side does until the fence has run is seen: no wake-up falls between store and load."""
    producer, consumer = ring_ends(64)
    consumer._fence = lambda: producer.try_write(b"during the consumer's fence")  # type: ignore[assignment]
    assert not consumer.arm()
    consumer.disarm()
    consumer._fence = lambda: None  # type: ignore[assignment]
    assert consumer.try_read() == b"during the consumer's fence"
    producer._fence = consumer.arm  # type: ignore[assignment]
    assert producer.try_write(b"") and producer.consumer_sleeps()


def test_over_long_message(ring_ends: MakeRing) -> None:
    producer, consumer = ring_ends(128)
    assert producer.try_write(bytes(120)) and consumer.try_read() == bytes(120)
    with pytest.raises(MessageTooLong, match="message of 121 bytes; this ring takes at most 120") as e:
        producer.try_write(bytes(121))
    assert isinstance(e.value, ValueError)
    with pytest.raises(MessageTooLong):
        producer.can_write(121)
    assert producer.free_bytes == 128 and consumer.try_read() is None


@pytest.mark.parametrize("capacity_bytes", [0, 56, 100, -8, 1 << 33])
def test_impossible_capacity(capacity_bytes: int) -> None:
    with pytest.raises(ValueError, match=f"multiple of 8 .* got {capacity_bytes}"):
        Ring.create("test", capacity_bytes)


def test_memory_that_holds_no_ring(ring_ends: MakeRing) -> None:
    for num_bytes in (100, 4096):
        segment = SharedSegment.create("test", num_bytes)
        with pytest.raises(RingCorrupt, match="holds no ring of this version"):
            Ring.attach(os.dup(segment.fd), num_bytes)
        segment.close()


@pytest.mark.parametrize("overwrite", [b"\xff" * 4, b"\x09\0\0\0", b"\0\0\0\0"], ids=["huge", "one more", "zero"])
def test_an_overwritten_length_is_noticed(ring_ends: MakeRing, overwrite: bytes) -> None:
    producer, consumer = ring_ends(128)
    producer.try_write(b"12345678")
    producer.segment.view[RECORDS : RECORDS + 4] = overwrite
    with pytest.raises(RingCorrupt, match=r"record at 0: length [\d,]+ with check 0x[0-9a-f]+, 16 bytes readable"):
        consumer.try_read()


@pytest.mark.parametrize("tail", [8, 4, 136, 1 << 40])
def test_an_overwritten_tail_is_noticed_by_the_consumer(ring_ends: MakeRing, tail: int) -> None:
    producer, consumer = ring_ends(128)
    producer.try_write(b"12345678")
    producer.segment.view[TAIL : TAIL + 8].cast("Q")[0] = tail
    with pytest.raises(RingCorrupt):
        consumer.try_read()


@pytest.mark.parametrize("head", [17, 1 << 40])
def test_an_overwritten_head_is_noticed_by_the_producer(ring_ends: MakeRing, head: int) -> None:
    producer, _ = ring_ends(128)
    producer.try_write(b"12345678")
    producer.segment.view[HEAD : HEAD + 8].cast("Q")[0] = head
    with pytest.raises(RingCorrupt, match="bytes in use in a ring of 128"):
        producer.try_write(b"")


def test_a_record_of_the_last_lap_is_not_taken_for_a_new_one(ring_ends: MakeRing) -> None:
    """A tail that runs ahead of the records exposes old ones, whose check belongs to another position."""
    producer, consumer = ring_ends(64)
    for _ in range(4):
        producer.try_write(b"12345678")
        consumer.try_read()
    producer.segment.view[TAIL : TAIL + 8].cast("Q")[0] = 80
    with pytest.raises(RingCorrupt, match="record at 64"):
        consumer.try_read()
