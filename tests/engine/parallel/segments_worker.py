"""A CPU worker of the tests with models of any segments, as a real process.

Like worker.py, whose loop it uses. Its neighbours are found because programs of this folder are started without -P.
"""

import mmap
import time
from typing import Any

import msgspec
import torch
from toy_models import CHANNELS, SPECS, ToyNetwork, solver_step
from worker import serve

from tetrion.engine.parallel.cpu.barrier import PairwiseBarrier
from tetrion.engine.parallel.cpu.exchange import CpuExchange
from tetrion.engine.parallel.cpu.slab import SharedSlabs
from tetrion.engine.parallel.exchange import Chunk
from tetrion.engine.parallel.group import BranchLayout, plan_group
from tetrion.engine.parallel.layout import SlabLayout
from tetrion.engine.parallel.words import slot_version
from tetrion.engine.shape import StepShape


class Device:
    def __init__(self, layout: SlabLayout, device_id: int, slab_fds: list[int], control_fd: int) -> None:
        self.layout, self.device_id = layout, device_id
        self.buffers = [memoryview(mmap.mmap(fd, 0)) for fd in slab_fds]
        self.control = memoryview(mmap.mmap(control_fd, 0))
        self.slabs = SharedSlabs(layout, device_id, self.buffers)
        self.barrier = PairwiseBarrier(layout, device_id, self.buffers, self.control)
        self.exchanges = {name: CpuExchange(self.slabs, self.barrier, spec) for name, spec in SPECS.items()}

    def op_reset(self) -> None:
        self.barrier.reset()

    def op_barrier(self, members: list[int]) -> None:
        self.barrier.arrive_and_wait(members)

    def op_set_version(self, slot: int, state_id: int, step_index: int, buffer: int = 0) -> None:
        self.slabs.version(self.device_id, slot, buffer).store(slot_version(state_id, step_index))

    def op_wait_version(self, device: int, slot: int, state_id: int, step_index: int) -> list[int]:
        self.barrier.wait_version(device, slot, 0, slot_version(state_id, step_index))
        return list(divmod(self.slabs.version(device, slot, 0).load(), 1 << 32))

    def op_encode(self, model: str, shape: dict[str, Any], slot: int, state_id: int) -> None:
        exchange, size = self.exchanges[model], msgspec.convert(shape, StepShape)
        for branch in range(size.num_branches):
            generator = torch.Generator().manual_seed(1000 * size.text[branch] + size.image + branch)
            fields = {**exchange.constants(slot, branch), SPECS[model].latents.name: exchange.state(slot, 0)}
            for field in SPECS[model].fields:
                if field.per_branch or branch == 0:
                    rows = fields[field.name][: size.rows(field.rows, branch)]
                    rows.copy_(torch.randn(rows.shape, generator=generator))
        exchange.publish(slot, 0, slot_version(state_id, 0))

    def op_pull(
        self,
        model: str,
        shape: dict[str, Any],
        source: int,
        slot: int,
        state_id: int,
        step_index: int,
        chunk_index: int,
        what: list[str],
    ) -> None:
        exchange = self.exchanges[model]
        version = slot_version(state_id, step_index)
        place = slot, chunk_index
        exchange.bind(self._chunk(model, shape, [self.device_id], *place, source, (version, version)))
        if "constants" in what:
            exchange.pull_constants()
        if "state" in what:
            exchange.pull_state()

    def op_denoise(
        self,
        model: str,
        shape: dict[str, Any],
        members: list[int],
        holders: list[int],
        source: int,
        slot: int,
        state_id: int,
        step_index: int,
        chunk_index: int,
        chunk_steps: int,
        delay_s: float = 0.0,
    ) -> None:
        time.sleep(delay_s)
        exchange, steps = self.exchanges[model], range(step_index, step_index + chunk_steps)
        is_newcomer = self.device_id not in holders
        versions = slot_version(state_id, steps.start), slot_version(state_id, steps.stop)
        source = source if is_newcomer else self.device_id
        chunk = self._chunk(model, shape, members, slot, chunk_index, source, versions)
        exchange.bind(chunk)
        if is_newcomer:
            exchange.pull_constants()
        exchange.pull_state()
        exchange.enter()
        self._run(exchange, model, chunk, steps)
        exchange.finish()

    def _run(self, exchange: CpuExchange, model: str, chunk: Chunk, steps: range) -> None:
        spec, branches = SPECS[model], chunk.layout.branches_of(self.device_id)
        networks = [
            ToyNetwork(spec, chunk.shape, plan, self.device_id, branch)
            for plan, branch in zip(chunk.plans, branches, strict=True)
        ]
        groups = [exchange.group(plan.shape_of(self.device_id)) for plan in chunk.plans]
        padded_rows = groups[0].shape.padded[spec.stepped]
        state = torch.full((padded_rows, 2 * CHANNELS), torch.nan)
        exchange.load_state(state)
        for step in steps:
            velocities = []
            for branch, group, network in zip(branches, groups, networks, strict=True):
                group.load_rope(network.rope())
                fields = exchange.constants(chunk.slot, branch)
                velocities.append(network.velocity(step, fields, state[:, :CHANNELS], group.attend))
            if len(branches) < chunk.shape.num_branches:
                swap = exchange.swap(padded_rows, CHANNELS)
                velocities.insert(1 - branches[0], swap.push(velocities[0]))
                state = solver_step(state, velocities)
                swap.done()
            else:
                state = solver_step(state, velocities)
        exchange.share_state(state)

    def _chunk(
        self,
        model: str,
        shape: dict[str, Any],
        members: list[int],
        slot: int,
        chunk_index: int,
        source: int,
        versions: tuple[int, int],
    ) -> Chunk:
        spec, size = SPECS[model], msgspec.convert(shape, StepShape)
        layout = BranchLayout(members=tuple(members), num_branches=size.num_branches)
        part = layout.part_of(self.device_id)
        plans = tuple(
            plan_group(part, size.counts(spec.segments, branch), spec.num_heads, spec.heads_per_key)
            for branch in layout.branches_of(self.device_id)
        )
        return Chunk(size, layout, plans, slot, chunk_index, source, *versions)


def make_device(start: dict[str, Any]) -> Device:
    layout = msgspec.convert(start["layout"], SlabLayout)
    return Device(layout, start["device_id"], start["slab_fds"], start["control_fd"])


if __name__ == "__main__":
    serve(make_device)
