"""A GPU worker of the tests, as a real process, with a toy model; without a GPU Triton interprets its kernels.

Like worker.py, whose loop it uses. Its neighbours are found because programs of this folder are started without -P.
"""

import base64
import ctypes
import time
from typing import Any

import msgspec
import torch
from device_toy import Toy, first_state
from worker import serve

from tetrion.engine.messages import PeerSlab
from tetrion.engine.parallel.device_exchange import (
    DeviceExchange,
    DeviceGroup,
    GroupShape,
    group_shape,
    raise_for_status,
)
from tetrion.engine.parallel.device_memory import DeviceMemory
from tetrion.engine.parallel.group import GroupPlan, plan_group
from tetrion.engine.parallel.layout import SlabLayout
from tetrion.engine.parallel.words import slot_version


class Step:
    """The static buffers of one shape, and its graph once captured."""

    def __init__(self, exchange: DeviceExchange, shape: GroupShape) -> None:
        slabs = exchange.slabs
        self._exchange, self._shape = exchange, shape
        self.group: DeviceGroup = exchange.group(shape)
        width = exchange.num_heads * exchange.head_dim
        toy = Toy(shape.num_text, shape.num_image, exchange.num_heads, exchange.head_dim, slabs.dtype)
        self._toy = toy.to(slabs.device)
        self._text = torch.zeros(shape.padded_text, width, dtype=slabs.dtype, device=slabs.device)
        self._pooled = torch.zeros(1, dtype=slabs.dtype, device=slabs.device)
        self._bias = torch.zeros(shape.num_local, 3 * width, dtype=slabs.dtype, device=slabs.device)
        self._graph: torch.cuda.CUDAGraph | None = None

    def capture(self) -> None:
        """Rehearse, then capture. Nobody else takes part."""
        if self._graph is None:
            self.group.rehearse()
            self.run()
            torch.cuda.synchronize()
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self.run()

    def load(self, plan: GroupPlan, slot: int) -> None:
        """This member's part of the request, once the slot holds it."""
        slabs, shard = self._exchange.slabs, plan.shard_of(self._exchange.slabs.device_id)
        state, layout = slabs.slot(slabs.device_id, slot), slabs.layout
        self._text[: len(shard.text), : layout.text_dim] = state.text[shard.text.start : shard.text.stop]
        self._pooled.copy_(state.pooled[:1])
        text, image = plan.canonical_rows(shard)
        self._bias[: len(text)] = self._toy.bias[text.start : text.stop]
        first = self._shape.padded_text
        self._bias[first : first + len(image)] = self._toy.bias[image.start : image.stop]

    def run(self) -> None:
        latents = self.group.local_latents()
        rope = self._toy.cos, self._toy.sin
        new = self._toy.step(latents, self._text, self._pooled, self._bias, rope, self.group.attend)
        self.group.share_latents(new)

    def __call__(self) -> None:
        if self._graph is None:
            self.run()
        else:
            self._graph.replay()


class DeviceWorker:
    def __init__(self, start: dict[str, Any]) -> None:
        self.layout, self.device_id = msgspec.convert(start["layout"], SlabLayout), start["device_id"]
        self.device = torch.device(start["device"])
        if self.device.type == "cuda":
            self.device = torch.device("cuda", self.device_id % torch.cuda.device_count())
            torch.cuda.set_device(self.device)
        self.memory = DeviceMemory(self.layout, self.device_id, self.device, start["slab_fds"], start["control_fd"])
        self.num_heads, self.head_dim = start["num_heads"], start["head_dim"]
        self.exchange: DeviceExchange | None = None
        self.steps: dict[GroupShape, Step] = {}

    def op_describe(self) -> dict[str, Any]:
        slab = self.memory.description
        return {"device_id": slab.device_id, "handle": base64.b64encode(slab.handle).decode(), "uuid": slab.device_uuid}

    def op_map(self, slabs: list[dict[str, Any]], host_memory: bool) -> list[Any]:
        peers = [
            PeerSlab(device_id=s["device_id"], handle=base64.b64decode(s["handle"]), device_uuid=s["uuid"])
            for s in slabs
        ]
        mapped, reason = self.memory.map_peers(peers, host_memory=host_memory)
        if self.exchange is None:
            self.exchange = DeviceExchange(
                self.memory.slabs, self.memory.abort, self.memory.clear_abort, self.num_heads, self.head_dim
            )
            self.exchange.warm_up(range(1, len(mapped) + 1))
        return [list(mapped), reason]

    def op_unmap(self, devices: list[int]) -> list[int]:
        self.memory.unmap_peers(devices)
        return list(self.memory.slabs.mapped)

    def op_encode(self, slot: int, state_id: int, num_text: int, num_image: int) -> None:
        assert self.exchange is not None
        state = self.memory.slabs.slot(self.device_id, slot)
        text, pooled, latents = first_state(self.layout, num_text, num_image, state_id)
        state.text[:num_text].copy_(text)
        state.pooled.copy_(pooled)
        state.latents[:num_image].copy_(latents)
        self.exchange.publish(slot, slot_version(state_id, 0))

    def op_pull(self, source: int, slot: int, state_id: int, step_index: int, num_text: int, num_image: int) -> None:
        assert self.exchange is not None
        plan, group = self.exchange.alone(num_text, num_image)
        group.bind(plan, slot, source=source, start_version=slot_version(state_id, step_index), end_version=0)
        group.pull_state()

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
        delay_s: float = 0.0,
    ) -> None:
        assert self.exchange is not None
        time.sleep(delay_s)
        plan = plan_group(tuple(members), num_text, num_image, self.num_heads)
        shape = group_shape(plan, self.device_id)
        if shape not in self.steps:
            self.steps[shape] = Step(self.exchange, shape)
        step = self.steps[shape]
        if self.device.type == "cuda":
            step.capture()
        versions = [slot_version(state_id, index) for index in (step_index, step_index + chunk_steps)]
        source = self.device_id if self.device_id in holders else source
        step.group.bind(plan, slot, source=source, start_version=versions[0], end_version=versions[1])
        if source != self.device_id:
            step.group.pull_pooled()
        step.group.pull_state()
        step.group.enter()
        step.load(plan, slot)
        for _ in range(chunk_steps):
            step()
        step.group.finish()

    def op_check(self) -> None:
        assert self.exchange is not None
        raise_for_status(self.exchange.status.tolist())

    def op_reset(self) -> None:
        assert self.exchange is not None
        self.exchange.reset()

    def op_counts(self) -> list[int]:
        """How often this device has begun a barrier with each other since the last reset."""
        assert self.exchange is not None
        return self.exchange.expected.tolist()

    def op_version(self, slot: int) -> int:
        return int.from_bytes(self._own_bytes(self.layout.version_offset(slot), 8), "little")

    def op_state(self, slot: int, num_text: int, num_image: int) -> list[Any]:
        text, pooled, latents = self.memory.slabs.slot(self.device_id, slot)
        return [part.float().tolist() for part in (text[:num_text], pooled, latents[:num_image])]

    def _own_bytes(self, offset: int, size: int) -> bytes:
        address = int(self.memory.slabs.bases[self.device_id]) + offset
        if self.device.type == "cpu":
            return ctypes.string_at(address, size)
        assert self.memory._runtime is not None
        return self.memory._runtime.read(address, size)


if __name__ == "__main__":
    serve(DeviceWorker)
