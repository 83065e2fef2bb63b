"""Workers forked from a real fork server: what they inherit, and every way they end."""

import contextlib
import os
import resource
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tetrion.engine.config import EngineConfig, parse_devices
from tetrion.engine.executors.fleet.forked import ForkedWorker, ForkServer
from tetrion.engine.executors.fleet.segments import Segments, inherited
from tetrion.engine.families.locate import resolve_model
from tetrion.engine.families.registry import read_model_spec
from tetrion.engine.messages import Event, Ping, Pong, Shutdown, Started
from tetrion.engine.transport.channel import create_channel, send_to_all
from tetrion.engine.worker import fork_server

PATIENCE_S = 120.0


def until(ask: Callable[[], str | None]) -> str:
    """Ask until there is an answer."""
    give_up_s = time.monotonic() + PATIENCE_S
    while (answer := ask()) is None:
        assert time.monotonic() < give_up_s
        time.sleep(0.001)
    return answer


@contextlib.contextmanager
def no_free_descriptor() -> Iterator[None]:
    """Every descriptor that this process may have is taken."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 8, hard))
    taken: list[int] = []
    try:
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.dup(0))
        yield
    finally:
        for fd in taken:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


class Employer:
    """The memory that an engine shares, and one forked worker."""

    def __init__(self, server: ForkServer) -> None:
        config = EngineConfig(devices="cpu:1", num_threads=1)
        self.segments = Segments(parse_devices("cpu:1"), [read_model_spec(resolve_model("shapes"))], config)
        self.channel = create_channel("worker")
        self.life_fd, worker_life_fd = os.pipe()
        spec = self.segments.worker_spec(parse_devices("cpu:1")[0], self.channel.spec, worker_life_fd)
        self.fds = {fd: os.readlink(f"/proc/self/fd/{fd}") for fd in (1, 2, *inherited(spec))}
        self.worker: ForkedWorker = server.fork(spec, inherited(spec), self.life_fd)
        os.close(worker_life_fd)

    def next_event(self) -> Event:
        give_up_s = time.monotonic() + PATIENCE_S
        while not (events := self.channel.events.drain()):
            poller = select.poll()
            poller.register(self.channel.events.fileno(), select.POLLIN)
            assert poller.poll(1e3 * (give_up_s - time.monotonic()))
        return events[0]

    def started(self) -> Started:
        event = self.next_event()
        assert isinstance(event, Started)
        self.worker.started(event.pid)
        return event

    def end(self) -> str:
        """How the worker ends, which is dying or was told to."""
        return until(self.worker.how_it_ended)

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
    it.end()
    it.close()


def test_a_worker_inherits_what_it_is_told_of_and_nothing_else(employer: Employer) -> None:
    started = employer.started()
    assert started.pid == employer.worker.pid
    process = psutil.Process(started.pid)
    held = {int(fd): os.readlink(f"/proc/{started.pid}/fd/{fd}") for fd in os.listdir(f"/proc/{started.pid}/fd")}
    assert held | employer.fds | {0: "/dev/null"} == held
    assert set(held.values()) == {"/dev/null", *employer.fds.values()}, "the rest are its own, on the same memory"
    assert process.cwd() == os.getcwd()
    assert os.getpgid(started.pid) == started.pid


def test_it_answers_and_ends_when_told_to(employer: Employer) -> None:
    employer.started()
    send_to_all([employer.channel.commands], Ping(command_id=4))
    assert employer.next_event() == Pong(command_id=4, device_id=0)
    send_to_all([employer.channel.commands], Shutdown(command_id=5))
    assert employer.end() == "exited with status 0"
    assert os.read(employer.life_fd, 1) == b""
    employer.worker.kill()  # of one that is gone: nothing


def test_workers_are_reaped_though_their_engine_was_started_with_children_ignored(
    own_fork_server: None, capfd: pytest.CaptureFixture[str]
) -> None:
    """As some supervisors and shells do; what is ignored stays so in every child."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        server = ForkServer.acquire()
        employer = Employer(server)
        employer.started()
        send_to_all([employer.channel.commands], Shutdown(command_id=5))
        assert employer.end() == "exited with status 0"
        employer.close()
        server.release()
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert "Traceback" not in capfd.readouterr().err


def test_one_that_is_killed_says_so(employer: Employer) -> None:
    employer.started()
    pid = employer.worker.pid
    employer.worker.kill()
    assert employer.end() == "killed by signal 9"
    assert not psutil.pid_exists(pid)


def test_a_worker_outlives_its_server_and_can_still_be_ended(own_fork_server: None) -> None:
    server = ForkServer.acquire()
    employer = Employer(server)
    employer.started()
    pid = employer.worker.pid
    server.kill()
    assert until(server.how_it_ended) == "killed by signal 9" and not server.is_running
    send_to_all([employer.channel.commands], Ping(command_id=1))
    assert employer.next_event() == Pong(command_id=1, device_id=0)
    employer.worker.kill()
    assert employer.end() == "no exit status, its fork server killed by signal 9"
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    other = ForkServer.acquire()
    assert other is not server
    for each in (server, other):
        each.release()
    employer.close()


def test_without_a_free_descriptor_a_worker_can_be_killed_and_its_end_is_seen(employer: Employer) -> None:
    """None was free when it started either, so that it has no pidfd."""
    started = employer.next_event()
    assert isinstance(started, Started)
    with no_free_descriptor():
        with pytest.raises(OSError, match="Too many open files"):
            os.pidfd_open(started.pid)
        employer.worker.started(started.pid)
        assert employer.worker.how_it_ended() is None
        employer.worker.kill()
        assert employer.end() == "killed by signal 9"


@pytest.mark.parametrize("has_pidfd", [True, False])
def test_the_end_of_a_worker_is_certain_though_its_server_is_stopped(own_fork_server: None, has_pidfd: bool) -> None:
    server = ForkServer.acquire()
    employer = Employer(server)
    with contextlib.nullcontext() if has_pidfd else no_free_descriptor():
        started = employer.started()
        os.kill(psutil.Process(started.pid).ppid() if has_pidfd else server._process.pid, signal.SIGSTOP)
        employer.worker.kill()
        assert employer.end() == "no exit status, its fork server does not answer"
    assert os.read(employer.life_fd, 1) == b""
    server.release()
    employer.close()


def test_a_fork_server_without_descriptors_refuses_and_forks_again_later(own_fork_server: None) -> None:
    server = ForkServer.acquire()
    first = Employer(server)
    first.started()
    pid = server._process.pid
    limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    held = set(map(int, os.listdir(f"/proc/{pid}/fd")))
    free = [fd for fd in range(max(held) + 100) if fd not in held]  # its own may leave gaps
    num_sent = 1 + len(first.fds)
    ends = []
    for num_free in (0, 1, num_sent - 1, num_sent, num_sent + 1):  # not all of them come; or there is none for a pidfd
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (free[num_free], limits[1]))
        failed = Employer(server)
        ends.append(failed.end())
        assert failed.worker.was_refused == (ends[-1] == "could not be forked")
        assert os.read(failed.life_fd, 1) == b""
        failed.close()
    assert ends[0] == "could not be forked"
    assert set(ends) <= {"could not be forked", "exited with status 1"}, "forked, but with no room to move them"
    resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
    assert len(os.listdir(f"/proc/{pid}/fd")) <= len(held), "nothing is left of those that were refused"
    late = Employer(server)
    late.started()
    for each in (first, late):
        each.worker.kill()
        assert each.end() == "killed by signal 9"
        each.close()
    server.release()


def test_one_that_is_killed_before_it_was_forked_never_is(own_fork_server: None) -> None:
    server = ForkServer.acquire()  # it imports for seconds
    employer = Employer(server)
    employer.worker.kill()
    assert employer.end() == "no exit status, its fork server killed by signal 9"
    assert os.read(employer.life_fd, 1) == b""
    late = Employer(server)  # as if its end had not been noticed yet
    assert os.read(late.life_fd, 1) == b""
    assert "its fork server killed" in late.end()
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
