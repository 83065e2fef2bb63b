"""Four CPU workers with models of any segments that share the pool."""

import mmap
import time

from torch import Tensor

from tests.engine.parallel.conftest import NUM_DEVICES, Fleet, anonymous_file
from tests.engine.parallel.toy_models import SPECS
from tetrion.engine.parallel.cpu.slab import SharedSlabs
from tetrion.engine.parallel.layout import NUM_BUFFERS, slab_layout
from tetrion.engine.parallel.words import SharedWord, Waiter
from tetrion.engine.shape import StepShape


class SegmentsFleet(Fleet):
    program = "segments_worker.py"

    def __init__(self) -> None:
        specs = tuple(SPECS.values())
        self.layout, self.spec = slab_layout(specs, NUM_DEVICES, num_slots=4), specs[0]
        self._slab_fds = [anonymous_file(self.layout.num_bytes) for _ in range(NUM_DEVICES)]
        self.buffers = [memoryview(mmap.mmap(fd, 0)) for fd in self._slab_fds]
        self._start_all()

    def state(self, device: int, model: str, slot: int, shape: StepShape, chunk_index: int = 0) -> dict[str, Tensor]:
        """All fields of a slot with the rows of a request of `shape` that has so many chunks behind it, as they lie in
        the slab now; branches apart."""
        slabs, rows = SharedSlabs(self.layout, device, self.buffers), {}
        changing = {SPECS[model].latents.name: slabs.state(device, model, slot, chunk_index % NUM_BUFFERS)}
        for branch in range(shape.num_branches):
            fields = slabs.constants(device, model, slot, branch) | changing
            for field in SPECS[model].fields:
                if field.per_branch or not branch:
                    own = fields[field.name][: shape.rows(field.rows, branch)]
                    rows[f"{field.name} {branch}"] = own.clone()
        return rows

    def wait_for_arrival(self, device: int, peer: int, count: int) -> None:
        """Return once `device` has arrived at its barrier number `count` with `peer` since the last reset."""
        word, waiter = SharedWord(self.buffers[peer], self.layout.counter_offset(device)), Waiter()
        until_s = time.monotonic() + self.answer_timeout_s
        while (seen := word.load()) < count:
            assert time.monotonic() < until_s, f"device {device} has arrived {seen} times of {count}"
            waiter.wait(word, seen, 1.0)
