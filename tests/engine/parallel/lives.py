"""Requests on their way through a schedule, as operations for every device that takes part."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tests.engine.parallel.toy import Toy, reference_step, step_shape
from tetrion.engine.model_spec import ModelSpec
from tetrion.engine.parallel.cpu.barrier import PairwiseBarrier
from tetrion.engine.parallel.cpu.exchange import CpuExchange
from tetrion.engine.parallel.cpu.slab import SharedSlabs
from tetrion.engine.parallel.layout import ControlLayout, slab_layout

ALONE_SLOT = 3
Operations = dict[int, list[dict[str, Any]]]


class Life:
    """A request in a slot: which step and chunk are next, and who holds its state, published as `source_state_id`."""

    def __init__(self, slot: int, state_id: int, encoder: int, shape: dict[str, Any]) -> None:
        self.slot = {"slot": slot, "state_id": state_id}
        self.first_state_id = self.source_state_id = state_id
        self.shape, self.holders, self.step_index, self.chunk_index = shape, [encoder], 0, 0

    def encode(self) -> dict[str, Any]:
        return {"op": "encode", **self.slot, **self.shape}

    def denoise(
        self, members: list[int], chunk_steps: int, operations: Operations, delays_s: Sequence[float] = (0.0, 0.01)
    ) -> None:
        chunk = {"op": "denoise", "members": members, "holders": self.holders, "source": self.holders[-1]}
        chunk |= {"step_index": self.step_index, "chunk_steps": chunk_steps, "chunk_index": self.chunk_index}
        chunk |= {"source_state_id": self.source_state_id, **self.slot, **self.shape}
        for rank, member in enumerate(members):
            operations[member].append(chunk | {"delay_s": delays_s[rank % len(delays_s)]})
        self.holders, self.step_index = members, self.step_index + chunk_steps
        self.source_state_id, self.chunk_index = self.slot["state_id"], self.chunk_index + 1

    def goes_on_from(self, other: "Life", state_id: int) -> None:
        """What was dispatched since `other` was copied from this has come to nothing."""
        self.__dict__ |= other.__dict__ | {"slot": {**other.slot, "state_id": state_id}}


def state(fleet: Any, device: int, slot: int, shape: dict[str, Any], chunk_index: int = 0) -> list[Tensor]:
    """All fields of a request that has so many chunks behind it in the device's slot."""
    operation = {"op": "state", "slot": slot, "chunk_index": chunk_index, **shape}
    return [torch.tensor(part) for part in fleet.run({device: [operation]})[device][0]]


def alone(fleet: Any, life: Life) -> list[Tensor]:
    """The same request on device 0, from its prompt on."""
    twin, operations = Life(ALONE_SLOT, life.first_state_id, 0, life.shape), {0: []}
    operations[0].append(twin.encode())
    twin.denoise([0], life.step_index, operations)
    fleet.run(operations)
    return state(fleet, 0, ALONE_SLOT, life.shape, twin.chunk_index)


def in_this_process(spec: ModelSpec, life: Life) -> list[Tensor]:
    """The same request by the exchange of one CPU worker, in fp32."""
    layout = slab_layout([spec], 1, 1)
    buffers = [memoryview(bytearray(layout.num_bytes))]
    control = memoryview(bytearray(ControlLayout(num_devices=1).num_bytes))
    exchange = CpuExchange(SharedSlabs(layout, 0, buffers), PairwiseBarrier(layout, 0, buffers, control), spec)
    toy = Toy(exchange, spec, reference_step, torch.float32, torch.device("cpu"), lambda work: work)
    shape, steps, state_id = step_shape(**life.shape), range(life.step_index), life.first_state_id
    toy.encode(0, state_id, shape)
    toy.denoise(toy.chunk(shape, (0,), 0, 0, 0, (state_id, state_id), steps), steps)
    return toy.state(0, shape, chunk_index=1)
