"""One denoising step of a shape, recorded once and replayed for any request, any members and any step.

Owns what a recorded step reads: the step counter, the tables it indexes, rotary tables and projected text, each at one
place in device memory that is filled before a chunk. Knows no commands; what peers do is the group's.
"""

from collections import OrderedDict
from collections.abc import Iterator

import torch
from torch import Tensor

from tetrion.engine.models.flux import FluxTransformer
from tetrion.engine.parallel.device_exchange import DeviceExchange, DeviceGroup, GroupShape
from tetrion.engine.worker.work_queue import WorkQueue
from tetrion.kernels.euler_step import euler_step

TABLE_STEPS = 32
"""Rows of the tables. Those of a request with more steps are made, and its chunks run, in parts."""
MAX_GRAPHS = 128


class StepTables:
    """What all shapes' steps have in common.

    `step`: int32 [1], the row that the next step uses; each step ends by adding 1. `deltas`: fp32 [TABLE_STEPS],
    changes of the noise level. `modulation`: [TABLE_STEPS, V, C].
    """

    def __init__(self, step: Tensor, num_vectors: int, hidden_size: int, dtype: torch.dtype) -> None:
        device = step.device
        self.step = step
        self.deltas = torch.zeros(TABLE_STEPS, dtype=torch.float32, device=device)
        self.modulation = torch.zeros(TABLE_STEPS, num_vectors, hidden_size, dtype=dtype, device=device)

    def load(self, deltas: Tensor, modulation: Tensor) -> None:
        """Enqueue: the next steps have these; [k] and [k, V, C] with k at most TABLE_STEPS."""
        assert len(deltas) == len(modulation) <= TABLE_STEPS, f"{len(deltas)} and {len(modulation)} rows"
        self.deltas[: len(deltas)].copy_(deltas)
        self.modulation[: len(modulation)].copy_(modulation)
        self.step.zero_()


class StepGraph:
    """A recorded step of one shape. Before replays: load tables, rope and text, and bind the group."""

    def __init__(self, queue: WorkQueue, flux: FluxTransformer, group: DeviceGroup, tables: StepTables) -> None:
        self.group = group
        self._queue, self._flux = queue, flux
        shape, dtype, device = group.shape, tables.modulation.dtype, queue.device
        self._text = torch.zeros(shape.padded_text, flux.config.hidden_size, dtype=dtype, device=device)
        half_dim = flux.config.attention_head_dim // 2
        self._rope = cos, sin = torch.zeros(2, shape.num_tokens, half_dim, device=device).unbind()
        self._size: tuple[int, int] | None = None

        def step() -> None:
            latents = group.local_latents()
            velocity = flux.step(latents.to(dtype), self._text, tables.modulation, (cos, sin), group.attend)
            group.share_latents(euler_step(latents, velocity, tables.deltas, tables.step))
            tables.step.add_(1)

        group.rehearse()
        step()  # loads kernels and makes the libraries choose theirs, none of which can be recorded
        tables.step.zero_()
        self.replay = queue.record(step)

    def load_rope(self, size: tuple[int, int]) -> None:
        """Enqueue: from now on for pictures of (height, width) tokens; shapes of one size may differ in that."""
        if size != self._size:
            for ours, table in zip(self._rope, self._flux.rope(*size, self.group.shape.num_text), strict=True):
                ours.copy_(self._queue.to_device(table[:, ::2].contiguous()))
            self._size = size

    def load_text(self, text: Tensor) -> None:
        """Enqueue: this member's projected text tokens, at most padded_text."""
        self._text[: len(text)].copy_(text)


class StepGraphs:
    """Recorded steps by shape; the least recently used go when there are too many."""

    def __init__(self, queue: WorkQueue, flux: FluxTransformer, exchange: DeviceExchange, tables: StepTables) -> None:
        self._queue, self._flux, self._exchange, self._tables = queue, flux, exchange, tables
        self._graphs: OrderedDict[GroupShape, StepGraph] = OrderedDict()

    def get(self, shape: GroupShape) -> StepGraph:
        """The step of `shape`, recorded now if it is new. Recording signals no other device."""
        if shape not in self._graphs:
            if len(self._graphs) == MAX_GRAPHS:
                self._queue.drain()
                self._graphs.popitem(last=False)
            self._graphs[shape] = StepGraph(self._queue, self._flux, self._exchange.group(shape), self._tables)
        self._graphs.move_to_end(shape)
        return self._graphs[shape]


def table_parts(start: int, stop: int) -> Iterator[range]:
    """Steps `start … stop` cut where a table of TABLE_STEPS steps ends."""
    while start < stop:
        end = min(stop, start - start % TABLE_STEPS + TABLE_STEPS)
        yield range(start, end)
        start = end
