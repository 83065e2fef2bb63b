"""The engine's side of several GPU worker processes: starts them, exchanges their handles, replaces a dead one."""

import os
from typing import Any, ClassVar

from tests.engine.parallel.conftest import Fleet, anonymous_file, tiny_spec
from tetrion.engine.model_spec import ModelSpec
from tetrion.engine.parallel.layout import SlabLayout, slab_layout
from tetrion.engine.transport.segment import reserve

NUM_HEADS, HEAD_DIM = 5, 32
ON_GPU = os.environ["TRITON_INTERPRET"] == "0"


class DeviceFleet(Fleet):
    """Workers on the host's GPUs in turn, or with their kernels interpreted. `host_memory`: that is where slabs are."""

    program = "device_worker.py"
    answer_timeout_s = 120.0
    more_to_start: ClassVar[dict[str, Any]] = {"device": "cuda" if ON_GPU else "cpu"}

    def __init__(self, num_devices: int, *, host_memory: bool, itemsize: int = 2) -> None:
        self.layout, self.spec = device_layout(num_devices, itemsize), device_spec()
        self.host_memory = host_memory
        self._slab_fds = [anonymous_file(0) for _ in range(num_devices)]
        if host_memory:
            self.reserve()
        self._start_all()
        self.handles = {} if host_memory else {d: self.describe(d) for d in range(num_devices)}
        self.map({d: list(self.handles.values()) for d in range(num_devices)})

    def reserve(self) -> None:
        """Give the slabs' files their size."""
        for fd in self._slab_fds:
            reserve(fd, self.layout.num_bytes)

    def describe(self, device: int) -> dict[str, Any]:
        return self.run({device: [{"op": "describe"}]})[device][0]

    def map(self, slabs: dict[int, list[dict[str, Any]]]) -> None:
        """Every device maps what it is given; all must then be able to reach all."""
        operation = {"op": "map", "host_memory": self.host_memory}
        results = self.run({device: [operation | {"slabs": own}] for device, own in slabs.items()})
        for device, ((mapped, reason),) in results.items():
            assert mapped == list(range(self.layout.num_devices)), f"device {device}: {reason}"

    def replace(self, device: int) -> None:
        """A dead device gets a successor. Everybody else is idle."""
        survivors = [d for d in range(self.layout.num_devices) if d != device]
        if not self.host_memory:
            self.run({d: [{"op": "unmap", "devices": [device]}] for d in survivors})
        self.start(device)
        self.results(device)
        if not self.host_memory:
            self.handles[device] = self.describe(device)
            self.map({d: [self.handles[device]] for d in survivors})
        self.map({device: list(self.handles.values())})
        self.reset()

    def stop(self) -> None:
        for process in self._processes.values():
            process.kill()
            process.communicate()
        for fd in (*self._slab_fds, self._control_fd):
            os.close(fd)


def device_spec() -> ModelSpec:
    """At most 13 text and 100 image rows; heads that do not divide evenly."""
    return tiny_spec(num_heads=NUM_HEADS, head_dim=HEAD_DIM)


def device_layout(num_devices: int, itemsize: int) -> SlabLayout:
    return slab_layout([device_spec()], num_devices, num_slots=4, itemsize=itemsize)
