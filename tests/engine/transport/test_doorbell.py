import asyncio
import os
import select

from tetrion.engine.transport.doorbell import Doorbell, DoorbellKind
from tetrion.engine.transport.segment import Backing


def readable(bell: Doorbell) -> bool:
    poller = select.poll()
    poller.register(bell.fileno(), select.POLLIN)
    return bool(poller.poll(0))


def test_rings_add_up_to_one(kinds: tuple[Backing, DoorbellKind]) -> None:
    bell = Doorbell.create(kinds[1])
    assert not readable(bell)
    bell.clear()
    for _ in range(300):
        bell.ring()
    assert readable(bell)
    bell.clear()
    assert not readable(bell)
    bell.close()
    bell.close()


def test_ringing_never_blocks(kinds: tuple[Backing, DoorbellKind]) -> None:
    bell = Doorbell.create(kinds[1])
    if kinds[1] == "eventfd":
        os.eventfd_write(bell.fileno(), 2**64 - 2)  # the largest it can hold
    for _ in range(20_000):  # more than a pipe holds
        bell.ring()
    bell.clear()
    assert not readable(bell)
    bell.ring()
    assert readable(bell)
    bell.close()


def test_the_other_process_has_the_same_bell(kinds: tuple[Backing, DoorbellKind]) -> None:
    bell = Doorbell.create(kinds[1])
    other = Doorbell.attach(*(os.dup(fd) for fd in bell.fds))
    assert not any(os.get_inheritable(fd) for fd in (*bell.fds, *other.fds))
    other.ring()
    assert readable(bell)
    bell.clear()
    assert not readable(other)
    bell.close()
    other.close()


async def test_it_wakes_an_event_loop(kinds: tuple[Backing, DoorbellKind]) -> None:
    bell, rung = Doorbell.create(kinds[1]), asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(bell.fileno(), rung.set)
    await asyncio.sleep(0.01)
    assert not rung.is_set()
    bell.ring()
    await asyncio.wait_for(rung.wait(), 10)
    loop.remove_reader(bell.fileno())
    bell.close()
