"""Typed messages over rings: commands from the engine down to one worker, events from that worker up.

Owns the codec, the waiting on both sides, and the handle by which a worker process finds its end. Does not know what
a message asks for, how workers are started, or how the engine learns that one died (it watches the process).

    engine   CommandSender ══ ring + doorbell ══▶ CommandReceiver   worker
             EventReceiver ◀══ ring + doorbell ══ EventSender
"""

import os
import select
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from math import ceil, inf
from typing import NamedTuple, Self, TypeVar

import msgspec

from tetrion.engine.messages import Command, Event
from tetrion.engine.transport.doorbell import Doorbell, DoorbellKind
from tetrion.engine.transport.ring import Ring, RingFull
from tetrion.engine.transport.segment import Backing

T = TypeVar("T")

SPIN_S = 200e-6
"""The longest that a reader spins before it sleeps."""

RING_BYTES = 256 * 1024
"""Default capacity of a ring: some thousand events, or a prompt far beyond any text encoder."""

_FULL_RETRY_MS = 1
_MAX_EVENTS = 1024


class MalformedMessage(ValueError):
    """Bytes that are no message of the expected union."""


class EngineGone(ConnectionError):
    """The engine process has ended, and the worker must too."""


class RingSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One direction. The two doorbell descriptors are the same one for an eventfd."""

    segment_fd: int
    segment_bytes: int
    bell_read_fd: int
    bell_write_fd: int


class ChannelSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker process needs to find its end, e.g. as JSON among its arguments: numbers, nothing pickled."""

    commands: RingSpec
    events: RingSpec

    @property
    def fds(self) -> tuple[int, ...]:
        """For `subprocess.Popen(..., pass_fds=spec.fds)`, which keeps the numbers as they are."""
        rings = (self.commands, self.events)
        return tuple({fd for ring in rings for fd in (ring.segment_fd, ring.bell_read_fd, ring.bell_write_fd)})


class Channel:
    """One direction: a ring, and a doorbell rung only while the ring's consumer sleeps. Carries bytes."""

    def __init__(self, ring: Ring, bell: Doorbell) -> None:
        """Internal: owns both. Use `create` or `attach`."""
        self.ring = ring
        self.bell = bell

    @classmethod
    def create(cls, name: str, capacity_bytes: int, *, backing: Backing = "auto", bell: DoorbellKind = "auto") -> Self:
        """Raises ValueError on an impossible capacity, SharedMemoryError if there is no room."""
        ring = Ring.create(name, capacity_bytes, backing=backing)
        try:
            return cls(ring, Doorbell.create(bell))
        except OSError:  # out of file descriptors
            ring.close()
            raise

    @classmethod
    def attach(cls, spec: RingSpec) -> Self:
        """The other end, in the process that inherited the descriptors and owns them from here on."""
        ring = Ring.attach(spec.segment_fd, spec.segment_bytes)
        return cls(ring, Doorbell.attach(spec.bell_read_fd, spec.bell_write_fd))

    @property
    def spec(self) -> RingSpec:
        read_fd, write_fd = self.bell.fds
        segment = self.ring.segment
        return RingSpec(
            segment_fd=segment.fd, segment_bytes=segment.num_bytes, bell_read_fd=read_fd, bell_write_fd=write_fd
        )

    def try_write(self, data: bytes) -> bool:
        """Append a message and wake the consumer if it sleeps; False while there is no room. Raises MessageTooLong."""
        if not self.ring.try_write(data):
            return False
        if self.ring.consumer_sleeps():
            self.bell.ring()
        return True

    def prepare_sleep(self) -> bool:
        """C1 to C4 of `Ring`: True if nothing is there and the doorbell will wake whoever sleeps on it now."""
        self.bell.clear()
        return self.ring.arm()

    def close(self) -> None:
        self.ring.close()
        self.bell.close()


class CommandSender:
    """Engine side, one per worker. Never waits."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def can_send(self, encoded: bytes) -> bool:
        """Whether `send` would succeed; stays true until this sender sends. Raises MessageTooLong if it never would."""
        return self._channel.ring.can_write(len(encoded))

    def try_send(self, encoded: bytes) -> bool:
        """Queue one command encoded by `encode_command`; False while there is no room. Raises MessageTooLong."""
        return self._channel.try_write(encoded)

    def send(self, encoded: bytes) -> None:
        """`try_send`, where room was seen to. Raises RingFull or MessageTooLong, having sent nothing."""
        if not self.try_send(encoded):
            ring = self._channel.ring
            raise RingFull(f"command of {len(encoded):,} bytes: {ring.free_bytes:,} of {ring.capacity_bytes:,} free")


def encode_command(command: Command) -> bytes:
    return msgspec.msgpack.encode(command)


def send_to_all(senders: Sequence[CommandSender], command: Command) -> bool:
    """Queue one command with every sender, or with none and return False if any ring is full.

    Encodes once, reserves in every ring (a sender's room never shrinks behind its back), then writes. There is no
    await in between, so two groups that share members are queued in the same order with each of them. `senders` are
    distinct. Raises MessageTooLong, having sent nothing.
    """
    encoded = encode_command(command)
    if len(senders) == 1:
        return senders[0].try_send(encoded)
    if not all([sender.can_send(encoded) for sender in senders]):  # all of them: a too-long message is always found
        return False
    for sender in senders:
        sender.send(encoded)
    return True


class EventReceiver:
    """Engine side, one per worker. Never blocks: wait on `fileno()`, e.g. `loop.add_reader(r.fileno(), on_events)`.

    Whoever is about to sleep must have called `drain` last: it is what makes the worker ring.
    """

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._decoder = msgspec.msgpack.Decoder(Event)

    def fileno(self) -> int:
        return self._channel.bell.fileno()

    def poll(self) -> list[Event]:
        """What has arrived, without a system call; for a short spin. The worker does not ring until `drain`."""
        self._channel.ring.disarm()
        return list(self._arrived(_MAX_EVENTS))

    def drain(self) -> list[Event]:
        """What has arrived; afterwards `fileno()` is readable as soon as there is more. Raises MalformedMessage.

        At most 1024 events, so that one worker cannot hold up the loop; if more wait, `fileno()` is readable at once.
        After MalformedMessage the worker is not to be read from again: what it says is unknown.
        """
        channel = self._channel
        events: list[Event] = []
        while len(events) < _MAX_EVENTS:
            events += self._arrived(_MAX_EVENTS - len(events))
            if channel.prepare_sleep():
                return events
        channel.bell.ring()
        return events

    def _arrived(self, limit: int) -> Iterator[Event]:
        for _ in range(limit):
            data = self._channel.ring.try_read()
            if data is None:
                return
            yield _decode(self._decoder, data, "event")


class CommandReceiver:
    """Worker side. `life_fd` turns readable or hangs up when the engine ends, e.g. a pipe whose write end only the
    engine holds; None if the worker watches for that elsewhere."""

    def __init__(self, channel: Channel, life_fd: int | None = None, spin_s: float = SPIN_S) -> None:
        self._channel = channel
        self._decoder = msgspec.msgpack.Decoder(Command)
        self._life_fd = life_fd
        self._spin_s = spin_s
        self._poller = select.poll()
        self._poller.register(channel.bell.fileno(), select.POLLIN)
        if life_fd is not None:
            self._poller.register(life_fd, select.POLLIN)

    def receive(self, timeout_s: float | None = None) -> Command | None:
        """The next command; None if none came within `timeout_s` (None: wait for ever).

        Spins for at most `spin_s`, then sleeps. Raises EngineGone when the engine has ended and no command is left,
        MalformedMessage for bytes that are no command.
        """
        deadline_s = inf if timeout_s is None else time.monotonic() + timeout_s
        data = self._spin(min(deadline_s, time.monotonic() + self._spin_s))
        if data is None:
            data = self._sleep(deadline_s)
        return None if data is None else _decode(self._decoder, data, "command")

    def _spin(self, until_s: float) -> bytes | None:
        while (data := self._channel.ring.try_read()) is None and time.monotonic() < until_s:
            os.sched_yield()  # the engine may share this core
        return data

    def _sleep(self, deadline_s: float) -> bytes | None:
        channel, engine_gone = self._channel, False
        while True:
            ready: list[tuple[int, int]] = []
            if channel.prepare_sleep():
                left_s = deadline_s - time.monotonic()
                ready = self._poller.poll(None if left_s == inf else max(0, ceil(left_s * 1000)))
            channel.ring.disarm()
            if (data := channel.ring.try_read()) is not None:
                return data
            if engine_gone:
                raise EngineGone("the engine has ended: its end of the life pipe is closed")
            engine_gone = any(fd == self._life_fd for fd, _ in ready)
            if not engine_gone and time.monotonic() >= deadline_s:
                return None


class EventSender:
    """Worker side. `life_fd` as in `CommandReceiver`."""

    def __init__(self, channel: Channel, life_fd: int | None = None) -> None:
        self._channel = channel
        self._poller = select.poll()
        if life_fd is not None:
            self._poller.register(life_fd, select.POLLIN)

    def send(self, event: Event, timeout_s: float | None = None) -> None:
        """Queue one event; while the ring is full, look again every millisecond.

        Raises EngineGone if the engine ends meanwhile, TimeoutError after `timeout_s`, MessageTooLong at once.
        """
        encoded = msgspec.msgpack.encode(event)
        deadline_s = inf if timeout_s is None else time.monotonic() + timeout_s
        while not self._channel.try_write(encoded):
            if self._poller.poll(_FULL_RETRY_MS):
                raise EngineGone(f"the engine has ended; a {type(event).__name__} event could not be delivered")
            if time.monotonic() >= deadline_s:
                raise TimeoutError(f"event ring still full after {timeout_s} s: the engine does not read")


class EngineEnd(NamedTuple):
    """`spec` is for the worker process; the descriptors it names stay the engine's own until `close`."""

    spec: ChannelSpec
    commands: CommandSender
    events: EventReceiver
    channels: tuple[Channel, Channel]

    def close(self) -> None:
        for channel in self.channels:
            channel.close()


class WorkerEnd(NamedTuple):
    commands: CommandReceiver
    events: EventSender


def create_channel(
    name: str, ring_bytes: int = RING_BYTES, *, backing: Backing = "auto", bell: DoorbellKind = "auto"
) -> EngineEnd:
    """Both directions between the engine and one worker, as the engine holds them. Raises SharedMemoryError."""
    with ExitStack() as undo:
        commands = Channel.create(f"{name}-commands", ring_bytes, backing=backing, bell=bell)
        undo.callback(commands.close)
        events = Channel.create(f"{name}-events", ring_bytes, backing=backing, bell=bell)
        undo.pop_all()
    spec = ChannelSpec(commands=commands.spec, events=events.spec)
    return EngineEnd(spec, CommandSender(commands), EventReceiver(events), (commands, events))


def attach_channel(spec: ChannelSpec, life_fd: int | None = None, spin_s: float = SPIN_S) -> WorkerEnd:
    """The worker's end, in a process started with `pass_fds=(*spec.fds, …)`. Lasts as long as the process.

    `life_fd` as in `CommandReceiver`: without it nothing here notices the end of the engine.
    """
    commands, events = Channel.attach(spec.commands), Channel.attach(spec.events)
    return WorkerEnd(CommandReceiver(commands, life_fd, spin_s), EventSender(events, life_fd))


def _decode(decoder: msgspec.msgpack.Decoder[T], data: bytes, kind: str) -> T:
    try:
        return decoder.decode(data)
    except msgspec.DecodeError as error:
        raise MalformedMessage(f"{len(data):,} bytes that are no {kind}: {error}") from error
