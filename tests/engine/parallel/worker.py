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
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import msgspec
import torch
from torch import Tensor

from tetrion.engine.parallel.barrier import Aborted, PairwiseBarrier
from tetrion.engine.parallel.exchange import Exchange, Stream, make_exchange
from tetrion.engine.parallel.layout import SlabLayout
from tetrion.engine.parallel.shared_slab import SharedSlabs
from tetrion.engine.parallel.words import SleepWaiter, platform_waiter, slot_version

HEAD_DIM = 8


class Device:
    def __init__(self, layout: SlabLayout, device_id: int, slab_fds: list[int], control_fd: int) -> None:
        self.layout, self.device_id = layout, device_id
        self.buffers = [memoryview(mmap.mmap(fd, 0)) for fd in slab_fds]
        self.control = memoryview(mmap.mmap(control_fd, 0))
        self.op_waiter("platform")

    def op_waiter(self, kind: str) -> None:
        waiter = SleepWaiter() if kind == "sleep" else platform_waiter()
        self.slabs = SharedSlabs(self.layout, self.device_id, self.buffers, waiter=waiter)
        self.barrier = PairwiseBarrier(self.layout, self.device_id, self.buffers, self.control, waiter=waiter)

    def op_reset(self) -> None:
        self.barrier.reset()

    def op_sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def op_barrier(self, members: list[int], ticket: int = 0) -> list[int]:
        """Hand in a ticket in our own slab, meet the others, return the tickets then found in their slabs."""
        self.slabs.slot(self.device_id, 0).pooled[0] = ticket
        self.barrier.arrive_and_wait(members)
        return [int(self.slabs.slot(member, 0).pooled[0]) for member in members]

    def op_time_barriers(self, members: list[int], count: int) -> list[int]:
        ended_ns = [time.perf_counter_ns()]
        for _ in range(count):
            self.barrier.arrive_and_wait(members)
            ended_ns.append(time.perf_counter_ns())
        return [after - before for before, after in pairwise(ended_ns)]

    def op_set_version(self, slot: int, state_id: int, step_index: int) -> None:
        self.slabs.slot(self.device_id, slot).version = slot_version(state_id, step_index)

    def op_wait_version(self, device: int, slot: int, state_id: int, step_index: int) -> list[int]:
        self.barrier.wait_version(device, slot, slot_version(state_id, step_index))
        return list(divmod(self.slabs.slot(device, slot).version, 1 << 32))

    def op_encode(self, slot: int, state_id: int, num_text: int, num_image: int) -> None:
        state, generator = (
            self.slabs.slot(self.device_id, slot),
            torch.Generator().manual_seed(1000 * num_text + num_image),
        )
        state.text[:num_text].normal_(generator=generator)
        state.pooled.normal_(generator=generator)
        state.latents[:num_image].normal_(generator=generator)
        state.version = slot_version(state_id, 0)

    def op_pull(self, source: int, slot: int, state_id: int, step_index: int, num_text: int, num_image: int) -> None:
        exchange = make_exchange(self.slabs, self.barrier, (self.device_id,), num_text, num_image, 1, HEAD_DIM)
        exchange.pull_state(source, slot, slot_version(state_id, step_index))

    def op_denoise(
        self,
        members: list[int],
        holders: list[int],
        source: int,
        slot: int,
        state_id: int,
        step_index: int,
        chunk_steps: int,
        num_text: int,
        num_image: int,
        num_heads: int,
        delay_s: float = 0.0,
    ) -> None:
        time.sleep(delay_s)
        exchange = make_exchange(self.slabs, self.barrier, tuple(members), num_text, num_image, num_heads, HEAD_DIM)
        if self.device_id not in holders:
            exchange.pull_state(source, slot, slot_version(state_id, step_index))
        exchange.enter(slot)
        state = self.slabs.slot(self.device_id, slot)
        text = slice(exchange.shard.text.start, exchange.shard.text.stop)
        image = slice(exchange.shard.image.start, exchange.shard.image.stop)
        last = step_index + chunk_steps
        for step in range(step_index, last):
            table = Table(step, num_text, num_image, num_heads)
            hidden = toy_step(exchange, table, state.text[text], state.latents[image])
            latents = 0.9 * state.latents[image] + 0.1 * hidden[:, : self.layout.in_channels] + 0.01 * state.pooled[0]
            exchange.share_latents(latents, slot, slot_version(state_id, step + 1) if step + 1 == last else None)


class Table:
    """What a model would have as weights: the same on every device. Only elementwise, so that rows stay exact."""

    def __init__(self, step: int, num_text: int, num_image: int, num_heads: int) -> None:
        generator = torch.Generator().manual_seed(1000 + step)
        self.width = num_heads * HEAD_DIM
        self.bias = torch.randn(num_text + num_image, 3 * self.width, generator=generator)
        self.norms = 1 + 0.1 * torch.randn(4, HEAD_DIM, generator=generator)
        angles = torch.randn(num_text + num_image, HEAD_DIM // 2, generator=generator).repeat_interleave(2, dim=1)
        self.cos, self.sin = angles.cos(), angles.sin()
        self.num_text = num_text


def toy_step(exchange: Exchange, table: Table, text: Tensor, latents: Tensor) -> Tensor:
    """Two double blocks, then two single blocks, of local tokens; returns the image tokens [n, H * D]."""
    text_rows, image_rows = exchange.shard.text, exchange.shard.image
    rows = torch.tensor([*text_rows, *(table.num_text + row for row in image_rows)])
    bias, rope = table.bias[rows], (table.cos[rows], table.sin[rows])
    hidden = torch.cat([pad(text, table.width), pad(latents, table.width)])
    for layer in range(4):
        qkv = bias + hidden.repeat(1, 3)
        if layer < 2:
            parts = qkv.split([len(text_rows), len(image_rows)])
            streams = [Stream(part, table.norms[2 * i], table.norms[2 * i + 1]) for i, part in enumerate(parts)]
        else:
            streams = [Stream(qkv.unflatten(1, (3, -1, HEAD_DIM)), table.norms[0], table.norms[1])]
        hidden = 0.5 * hidden + exchange.attend(streams, rope)
    return hidden[len(text_rows) :]


def pad(x: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, width - x.shape[1]))


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
    return Device(layout, start["device_id"], start["slab_fds"], start["control_fd"])


if __name__ == "__main__":
    serve(make_device)
