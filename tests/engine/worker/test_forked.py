"""Workers forked from a real fork server: what they inherit, and every way they end."""

import os
import select
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tetrion.engine.config import EngineConfig, parse_devices
from tetrion.engine.families.registry import read_model_spec
from tetrion.engine.fleet.segments import Segments, inherited
from tetrion.engine.messages import Event, Ping, Pong, Shutdown, Started
from tetrion.engine.models.locate import resolve_model
from tetrion.engine.transport.channel import create_channel, send_to_all
from tetrion.engine.worker import fork_server
from tetrion.engine.worker.forked import ForkedWorker, ForkServer

PATIENCE_S = 120.0


class Employer:
    """The memory that an engine shares, and one forked worker."""

    def __init__(self, server: ForkServer) -> None:
        config = EngineConfig(devices="cpu:1", num_threads=1)
        self.segments = Segments(parse_devices("cpu:1"), read_model_spec(resolve_model("shapes")), config)
        self.channel = create_channel("worker")
        self.life_fd, worker_life_fd = os.pipe()
        spec = self.segments.worker_spec(parse_devices("cpu:1")[0], self.channel.spec, worker_life_fd)
        self.fds = {fd: os.readlink(f"/proc/self/fd/{fd}") for fd in (1, 2, *inherited(spec))}
        self.worker: ForkedWorker = server.fork(spec, inherited(spec))
        os.close(worker_life_fd)

    def next_event(self) -> Event:
        give_up_s = time.monotonic() + PATIENCE_S
        while not (events := self.channel.events.drain()):
            assert select.select([self.channel.events], [], [], give_up_s - time.monotonic())[0]
        return events[0]

    def close(self) -> None:
        os.close(self.life_fd)
        self.channel.close()
        self.segments.close()


@pytest.fixture
def server(fork_server: None) -> Iterator[ForkServer]:
    shared = ForkServer.acquire()
    yield shared
    shared.release()


@pytest.fixture
def employer(server: ForkServer) -> Iterator[Employer]:
    it = Employer(server)
    yield it
    it.worker.kill()
    it.close()


def test_a_worker_inherits_what_it_is_told_of_and_nothing_else(employer: Employer) -> None:
    started = employer.next_event()
    assert isinstance(started, Started) and started.pid == employer.worker.pid
    process = psutil.Process(started.pid)
    held = {int(fd): os.readlink(f"/proc/{started.pid}/fd/{fd}") for fd in os.listdir(f"/proc/{started.pid}/fd")}
    assert held | employer.fds | {0: "/dev/null"} == held
    assert set(held.values()) == {"/dev/null", *employer.fds.values()}, "the rest are its own, on the same memory"
    assert process.cwd() == os.getcwd()
    assert os.getpgid(started.pid) == started.pid


def test_it_answers_and_ends_when_told_to(employer: Employer) -> None:
    employer.next_event()
    send_to_all([employer.channel.commands], Ping(command_id=4))
    assert employer.next_event() == Pong(command_id=4, device_id=0)
    send_to_all([employer.channel.commands], Shutdown(command_id=5))
    assert employer.worker.end() == "exited with status 0"
    assert os.read(employer.life_fd, 1) == b""
    employer.worker.kill()  # of one that is gone: nothing


def test_one_that_is_killed_says_so(employer: Employer) -> None:
    employer.next_event()
    pid = employer.worker.pid
    employer.worker.kill()
    assert employer.worker.end() == "killed by signal 9"
    assert not psutil.pid_exists(pid)


def test_a_worker_outlives_its_server_and_can_still_be_ended(own_fork_server: None) -> None:
    server = ForkServer.acquire()
    employer = Employer(server)
    employer.next_event()
    pid = employer.worker.pid
    server.kill()
    assert server.how_it_ended() == "killed by signal 9" and not server.is_running
    send_to_all([employer.channel.commands], Ping(command_id=1))
    assert employer.next_event() == Pong(command_id=1, device_id=0)
    employer.worker.kill()
    assert employer.worker.end() == "no exit status, its fork server killed by signal 9"
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    other = ForkServer.acquire()
    assert other is not server
    for each in (server, other):
        each.release()
    employer.close()


def test_one_that_is_killed_before_it_was_forked_never_is(own_fork_server: None) -> None:
    server = ForkServer.acquire()  # it imports for seconds
    employer = Employer(server)
    employer.worker.kill()
    assert employer.worker.end() == "no exit status, its fork server killed by signal 9"
    assert os.read(employer.life_fd, 1) == b""
    late = Employer(server)  # as if its end had not been noticed yet
    assert os.read(late.life_fd, 1) == b""
    assert "its fork server killed" in late.worker.end()
    server.release()
    employer.close()
    late.close()


def test_engines_of_a_process_share_a_server_while_they_live(
    own_fork_server: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    waits = tmp_path / "waits"
    waits.write_text("#!/bin/sh\nexec sleep 600\n")
    waits.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(waits))
    first, second = ForkServer.acquire(), ForkServer.acquire()
    assert first is second
    first.release()
    assert first.is_running
    second.release()
    assert not first.is_running
    third = ForkServer.acquire()
    assert third is not first
    third.release()


@given(order=st.permutations(range(4)), num_moved=st.integers(0, 4))
def test_descriptors_go_where_they_are_wanted_whatever_lies_there(order: list[int], num_moved: int) -> None:
    folder = Path("/proc/self/fd")
    files = [os.memfd_create(f"moved-{i}") for i in range(4)]
    names = [os.readlink(folder / str(fd)) for fd in files]
    targets = [files[i] for i in order[:num_moved]]
    fork_server.move_descriptors([os.dup(fd) for fd in files[:num_moved]], targets)
    assert [os.readlink(folder / str(fd)) for fd in targets] == names[:num_moved]
    for fd in files:
        os.close(fd)
