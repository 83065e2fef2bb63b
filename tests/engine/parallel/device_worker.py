"""A GPU worker of the tests, as a real process, with a toy model; without a GPU Triton interprets its kernels.

Like worker.py, whose loop it uses. Its neighbours are found because programs of this folder are started without -P.
"""

import base64
import ctypes
import time
from collections.abc import Sequence
from typing import Any

import msgspec
import quick_interpreter  # noqa: F401
import torch
from toy import Toy, Work, step_shape
from worker import serve

from tetrion.engine.messages import PeerSlab
from tetrion.engine.model_spec import ModelSpec
from tetrion.engine.parallel.gpu.exchange import GpuExchange, SharedResources
from tetrion.engine.parallel.gpu.memory import GpuMemory
from tetrion.engine.parallel.layout import NUM_BUFFERS, SlabLayout
from tetrion.engine.parallel.words import slot_version
from tetrion.kernels.guided_step import guided_step


def record(work: Work) -> Work:
    """A graph of the work where there are graphs."""
    if not torch.cuda.is_available():
        return work
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="relaxed"):
        work()
    return graph.replay


class DeviceWorker:
    def __init__(self, start: dict[str, Any]) -> None:
        self.layout, self.device_id = msgspec.convert(start["layout"], SlabLayout), start["device_id"]
        self.spec = msgspec.convert(start["spec"], ModelSpec)
        self.device = torch.device(start["device"])
        if self.device.type == "cuda":
            self.device = torch.device("cuda", self.device_id % torch.cuda.device_count())
            torch.cuda.set_device(self.device)
        self.memory = GpuMemory(self.layout, self.device_id, self.device, start["slab_fds"], start["control_fd"])
        self._shared: SharedResources | None = None
        self._toy: Toy | None = None

    def op_describe(self) -> dict[str, Any]:
        slab = self.memory.description
        return {"device_id": slab.device_id, "handle": base64.b64encode(slab.handle).decode(), "uuid": slab.device_uuid}

    def op_map(self, slabs: list[dict[str, Any]], host_memory: bool) -> list[Any]:
        peers = [
            PeerSlab(device_id=s["device_id"], handle=base64.b64decode(s["handle"]), device_uuid=s["uuid"])
            for s in slabs
        ]
        mapped, reason = self.memory.map_peers(peers, host_memory=host_memory)
        if self._shared is None:
            slabs = self.memory.slabs
            self._shared = SharedResources(slabs, self.memory.abort, self.memory.clear_abort, [self.spec])
            exchange = GpuExchange(self._shared, self.spec, lambda tensor: tensor.cpu())
            exchange.warm_up()
            self._toy = Toy(exchange, self.spec, guided_step, slabs.dtype, self.device, record)
        return [list(mapped), reason]

    def op_unmap(self, devices: list[int]) -> list[int]:
        self.memory.unmap_peers(devices)
        return list(self.memory.slabs.mapped)

    def op_encode(self, slot: int, state_id: int, text: list[int], image: int, turned: int = 0) -> None:
        self.toy.encode(slot, state_id, step_shape(text, image, turned))

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

    def op_check(self) -> None:
        self.toy.exchange.outcome()()

    def op_reset(self) -> None:
        self.toy.exchange.reset()

    def op_counts(self) -> list[int]:
        """How often this device has begun a barrier with each other since the last reset."""
        return self.shared.expected.tolist()

    def op_set_version(self, slot: int, state_id: int, step_index: int, buffer: int) -> None:
        self.toy.exchange.publish(slot, buffer, slot_version(state_id, step_index))

    def op_versions(self, slot: int) -> list[int]:
        """Of the slot's buffers."""
        words = self._own_bytes(self.layout.version_offset(slot), 8 * NUM_BUFFERS)
        return list(memoryview(words).cast("Q"))

    def op_state(self, slot: int, chunk_index: int, text: Sequence[int], image: int, turned: int = 0) -> list[Any]:
        return [part.tolist() for part in self.toy.state(slot, step_shape(text, image, turned), chunk_index)]

    @property
    def toy(self) -> Toy:
        assert self._toy is not None, "slabs are not mapped"
        return self._toy

    @property
    def shared(self) -> SharedResources:
        assert self._shared is not None, "slabs are not mapped"
        return self._shared

    def _own_bytes(self, offset: int, size: int) -> bytes:
        address = int(self.memory.slabs.bases[self.device_id]) + offset
        if self.device.type == "cpu":
            return ctypes.string_at(address, size)
        assert self.memory._runtime is not None
        return self.memory._runtime.read(address, size)


if __name__ == "__main__":
    serve(DeviceWorker)
