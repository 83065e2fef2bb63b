"""Four real processes over shared memory, started once for all tests of this folder."""

import json
import mmap
import os
import selectors
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, ClassVar

import msgspec
import pytest

from tests.engine.specs import make_spec
from tetrion.engine.model_spec import ModelSpec
from tetrion.engine.parallel.layout import ControlLayout, SlabLayout, slab_layout
from tetrion.engine.parallel.words import AbortWords

NUM_DEVICES = 4


def _readable(files: list[Any], timeout_s: float) -> list[Any]:
    """Those that can be read from, waiting for the first; of descriptors beyond 1023, too."""
    with selectors.DefaultSelector() as selector:
        for file in files:
            selector.register(file, selectors.EVENT_READ)
        return [key.fileobj for key, _ in selector.select(timeout_s)]


class Fleet:
    """The engine's side: memory, abort words, and a pipe to each device."""

    program = "worker.py"
    answer_timeout_s = 120.0
    more_to_start: ClassVar[dict[str, Any]] = {}

    def __init__(self, layout: SlabLayout, spec: ModelSpec) -> None:
        self.layout, self.spec = layout, spec
        self._slab_fds = [anonymous_file(layout.num_bytes) for _ in range(layout.num_devices)]
        self.buffers = [memoryview(mmap.mmap(fd, 0)) for fd in self._slab_fds]
        self._start_all()

    def _start_all(self) -> None:
        layout = self.layout
        control = ControlLayout(num_devices=layout.num_devices)
        self._control_fd = anonymous_file(control.num_bytes)
        self.abort = AbortWords(memoryview(mmap.mmap(self._control_fd, 0)), layout.num_devices)
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        for device in range(layout.num_devices):
            self.start(device)
        for device in range(layout.num_devices):
            self.receive(device)

    def start(self, device: int) -> None:
        start = {
            "layout": msgspec.to_builtins(self.layout),
            "spec": msgspec.to_builtins(self.spec),
            "device_id": device,
            "parent": os.getpid(),
            "slab_fds": self._slab_fds,
            "control_fd": self._control_fd,
        } | self.more_to_start
        self._processes[device] = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name(self.program)), json.dumps(start)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=[*self._slab_fds, self._control_fd],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )

    def send(self, device: int, *operations: dict[str, Any]) -> None:
        stdin = self._processes[device].stdin
        assert stdin is not None
        stdin.write(json.dumps(operations).encode() + b"\n")
        stdin.flush()

    def _stdout(self, device: int) -> IO[bytes]:
        stdout = self._processes[device].stdout
        assert stdout is not None
        return stdout

    def has_answered(self, device: int, timeout_s: float) -> bool:
        return bool(_readable([self._stdout(device)], timeout_s))

    def receive(self, device: int) -> dict[str, Any]:
        assert self.has_answered(device, self.answer_timeout_s), f"device {device} does not answer"
        answer: dict[str, Any] = json.loads(self._stdout(device).readline())
        return answer

    def results(self, device: int) -> list[Any]:
        return results_of(self.receive(device))

    def run(self, operations: dict[int, list[dict[str, Any]]]) -> dict[int, list[Any]]:
        """Send every device its operations, then collect all results. If one fails, the others are freed first."""
        for device, own in operations.items():
            self.send(device, *own)
        answers: dict[int, dict[str, Any]] = {}
        pipes = {self._stdout(device): device for device in operations}
        while pipes:
            ready = _readable(list(pipes), self.answer_timeout_s)
            answers |= {device: self.receive(device) for device in map(pipes.pop, ready)}
            if not ready or any("error" in answer for answer in answers.values()):
                for device in pipes.values():
                    self.abort.set(device)
        if any("results" not in answer for answer in answers.values()):
            self.reset()
        for answer in sorted(answers.values(), key=lambda answer: "error" not in answer):
            results_of(answer)
        return {device: answers[device]["results"] for device in operations}

    def reset(self) -> None:
        self.run({device: [{"op": "reset"}] for device in self._processes})

    def kill(self, device: int) -> None:
        self._processes[device].kill()
        self._processes[device].wait()

    def version(self, device: int, slot: int, buffer: int = 0) -> int:
        return self.buffers[device].cast("Q")[self.layout.version_offset(slot) // 8 + buffer]

    def stop(self) -> None:
        for process in self._processes.values():
            process.kill()
            process.communicate()
        for fd in (*self._slab_fds, self._control_fd):
            os.close(fd)


def results_of(answer: dict[str, Any]) -> list[Any]:
    assert "results" in answer, answer.get("error", answer)
    results: list[Any] = answer["results"]
    return results


def anonymous_file(num_bytes: int) -> int:
    with tempfile.TemporaryFile() as file:
        fd = os.memfd_create("test") if hasattr(os, "memfd_create") else os.dup(file.fileno())
    os.ftruncate(fd, num_bytes)
    return fd


def tiny_spec(num_heads: int = 6, head_dim: int = 8) -> ModelSpec:
    """At most 13 text rows a branch and 100 image rows; 6 heads of 8."""
    return make_spec(
        num_heads=num_heads, head_dim=head_dim, pooled_dim=10, num_steps=4, max_text_tokens=13, min_size=16,
        max_size=160, default_size=(160, 160),
    )  # fmt: skip


@pytest.fixture(scope="session")
def shared_fleet() -> Iterator[Fleet]:
    fleet = Fleet(slab_layout([tiny_spec()], NUM_DEVICES, num_slots=4), tiny_spec())
    yield fleet
    fleet.stop()


@pytest.fixture
def fleet(shared_fleet: Fleet) -> Fleet:
    shared_fleet.reset()
    return shared_fleet


@pytest.fixture
def spec() -> ModelSpec:
    return tiny_spec()
