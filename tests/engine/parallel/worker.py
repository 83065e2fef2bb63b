"""A device of the tests, as a real process: carries out the operations that arrive as JSON lines on stdin.

One line is a list of operations; the answer is one line: {"results": […]}, {"aborted": …} or {"error": …}.
"""

import json
import mmap
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import msgspec
import torch
from toy import Toy, reference_step, step_shape

from tetrion.engine.model_spec import ModelSpec
from tetrion.engine.parallel.cpu.barrier import Aborted, PairwiseBarrier
from tetrion.engine.parallel.cpu.exchange import CpuExchange
from tetrion.engine.parallel.cpu.slab import SharedSlabs
from tetrion.engine.parallel.layout import SlabLayout
from tetrion.engine.parallel.words import slot_version


class MortalBarrier(PairwiseBarrier):
    """Of a device that is lost once it has passed so many barriers; None: never."""

    num_left: int | None = None

    def arrive_and_wait(self, members: Sequence[int]) -> None:
        if self.num_left == 0:
            raise Aborted(f"device {self.device_id} is lost")
        super().arrive_and_wait(members)
        self.num_left = None if self.num_left is None else self.num_left - 1


class Device:
    def __init__(
        self, layout: SlabLayout, spec: ModelSpec, device_id: int, slab_fds: list[int], control_fd: int
    ) -> None:
        self.layout, self.spec, self.device_id = layout, spec, device_id
        self.buffers = [memoryview(mmap.mmap(fd, 0)) for fd in slab_fds]
        self.control = memoryview(mmap.mmap(control_fd, 0))
        self.slabs = SharedSlabs(self.layout, self.device_id, self.buffers)
        self.barrier = MortalBarrier(self.layout, self.device_id, self.buffers, self.control)
        self.exchange = CpuExchange(self.slabs, self.barrier, self.spec)
        self.toy = Toy(self.exchange, self.spec, reference_step, torch.float32, torch.device("cpu"), lambda work: work)

    def op_reset(self) -> None:
        self.barrier.reset()
        self.barrier.num_left = None

    def op_die_after(self, num_barriers: int) -> None:
        self.barrier.num_left = num_barriers

    def op_sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def op_barrier(self, members: list[int], ticket: int = 0) -> list[int]:
        """Hand in a ticket in our own slab, meet the others, return the tickets then found in their slabs."""
        pooled = [self.slabs.constants(member, self.spec.name, 0)["pooled"] for member in members]
        pooled[members.index(self.device_id)][0, 0] = ticket
        self.barrier.arrive_and_wait(members)
        return [int(tickets[0, 0]) for tickets in pooled]

    def op_time_barriers(self, members: list[int], count: int) -> list[int]:
        ended_ns = [time.perf_counter_ns()]
        for _ in range(count):
            self.barrier.arrive_and_wait(members)
            ended_ns.append(time.perf_counter_ns())
        return [after - before for before, after in pairwise(ended_ns)]

    def op_set_version(self, slot: int, state_id: int, step_index: int, buffer: int = 0) -> None:
        self.slabs.version(self.device_id, slot, buffer).store(slot_version(state_id, step_index))

    def op_wait_version(self, device: int, slot: int, state_id: int, step_index: int, buffer: int = 0) -> list[int]:
        self.barrier.wait_version(device, slot, buffer, slot_version(state_id, step_index))
        return list(divmod(self.slabs.version(device, slot, buffer).load(), 1 << 32))

    def op_encode(self, slot: int, state_id: int, text: list[int], image: int, turned: int = 0) -> None:
        self.toy.encode(slot, state_id, step_shape(text, image, turned))

    def op_state(self, slot: int, chunk_index: int, text: list[int], image: int, turned: int = 0) -> list[Any]:
        return [part.tolist() for part in self.toy.state(slot, step_shape(text, image, turned), chunk_index)]

    def op_pull(
        self,
        source: int,
        slot: int,
        state_id: int,
        step_index: int,
        chunk_index: int,
        text: list[int],
        image: int,
        turned: int = 0,
    ) -> None:
        steps, shape = range(step_index, step_index), step_shape(text, image, turned)
        state_ids = state_id, state_id
        self.toy.pull(self.toy.chunk(shape, (self.device_id,), slot, chunk_index, source, state_ids, steps))

    def op_denoise(
        self,
        members: list[int],
        holders: list[int],
        source: int,
        slot: int,
        state_id: int,
        source_state_id: int,
        step_index: int,
        chunk_index: int,
        chunk_steps: int,
        text: list[int],
        image: int,
        turned: int = 0,
        delay_s: float = 0.0,
    ) -> None:
        time.sleep(delay_s)
        steps, shape = range(step_index, step_index + chunk_steps), step_shape(text, image, turned)
        source = self.device_id if self.device_id in holders else source
        state_ids = source_state_id, state_id
        self.toy.denoise(self.toy.chunk(shape, members, slot, chunk_index, source, state_ids, steps), steps)


def answer(device: Any, operations: list[dict[str, Any]]) -> dict[str, Any]:
    try:
        return {"results": [getattr(device, "op_" + operation.pop("op"))(**operation) for operation in operations]}
    except Aborted as error:
        return {"aborted": str(error)}
    except Exception:
        return {"error": traceback.format_exc()}


def exit_with_parent(parent: int) -> None:
    """Also out of a wait that would never end, should the test run be killed."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def serve(make_device: Callable[[dict[str, Any]], Any]) -> None:
    """Make the device from the program's argument, then answer each line with what its `op_…` methods return."""
    start = json.loads(sys.argv[1])
    exit_with_parent(start["parent"])
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    device = make_device(start)
    print(json.dumps({"results": ["started"]}), flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(device, json.loads(line))), flush=True)


def make_device(start: dict[str, Any]) -> Device:
    layout = msgspec.convert(start["layout"], SlabLayout)
    spec = msgspec.convert(start["spec"], ModelSpec)
    return Device(layout, spec, start["device_id"], start["slab_fds"], start["control_fd"])


if __name__ == "__main__":
    serve(make_device)
