"""A pool of CPU workers as threads of this process: slabs are plain memory, everything else is what workers run."""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import NamedTuple

import torch
from torch import Tensor

from tetrion.engine.model_spec import ModelSpec
from tetrion.engine.models.family import Model
from tetrion.engine.models.loading import attach, component_tensors
from tetrion.engine.models.ops import ReferenceOps
from tetrion.engine.models.registry import family_module, load_shared
from tetrion.engine.parallel.cpu.barrier import Aborted, PairwiseBarrier
from tetrion.engine.parallel.cpu.exchange import CpuExchange
from tetrion.engine.parallel.cpu.slab import SharedSlabs
from tetrion.engine.parallel.layout import NUM_BUFFERS, ControlLayout, slab_layout
from tetrion.engine.parallel.words import AbortWords, slot_version
from tetrion.engine.params import Params
from tetrion.engine.worker.denoiser import Denoiser, State
from tetrion.engine.worker.work_queue import ImmediateQueue

SLOT = 0
Schedule = Sequence[tuple[tuple[int, ...], int]]
"""Chunks: members by rank, and how many steps."""


class Rank(NamedTuple):
    exchange: CpuExchange
    denoiser: Denoiser


class Ranks:
    """`num_devices` workers of one model, whose weights they share."""

    def __init__(self, spec: ModelSpec, num_devices: int) -> None:
        self.spec, self.num_devices = spec, num_devices
        steps = [torch.zeros(1, dtype=torch.int32) for _ in range(num_devices)]
        ops = [ReferenceOps(step) for step in steps]
        fd = os.memfd_create("test-weights")
        (self.model,) = load_shared([spec], fd, True, "safetensors", ops[0])
        weights = component_tensors(component_tensors(attach(fd), spec.name), "transformer")
        os.close(fd)
        layout = slab_layout([spec], num_devices=num_devices, num_slots=1, itemsize=4)
        slabs = [memoryview(bytearray(layout.num_bytes)) for _ in range(num_devices)]
        control = memoryview(bytearray(ControlLayout(num_devices=num_devices).num_bytes))
        self._abort = AbortWords(control, num_devices)
        self._next_state = 0
        self._ranks = []
        for device in range(num_devices):
            model: Model = dataclasses.replace(
                self.model, network=family_module(spec).network(spec, weights, ops[device])
            )
            exchange = CpuExchange(
                SharedSlabs(layout, device, slabs), PairwiseBarrier(layout, device, slabs, control), spec
            )
            denoiser = Denoiser(model, ops[device], exchange, ImmediateQueue(), steps[device], torch.float32)
            self._ranks.append(Rank(exchange, denoiser))
        self._threads = ThreadPoolExecutor(num_devices, initializer=torch.set_num_threads, initargs=(1,))

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> list[dict[str, Tensor]]:
        """The slot's fields of each branch."""
        return [self.model.text.embed(self.model.text.tokens(prompt).ids) for prompt in prompts]

    def denoise(
        self,
        texts: Sequence[Mapping[str, Tensor]],
        state: Tensor,
        params: Params,
        schedule: Schedule,
        first_step: int = 0,
    ) -> Tensor:
        """The state [image rows, width] after all chunks of the schedule, as its last members all have it."""
        request = self._begin(texts, state, schedule[0][0][0], first_step)
        holders, step = schedule[0][0][:1], first_step
        for index, (members, num_steps) in enumerate(schedule):
            steps, source = range(step, step + num_steps), holders[-1]
            self._all(members, lambda me: self._chunk(request, me, members, index, holders, source, params, steps))  # noqa: B023
            holders, step = members, step + num_steps
        states = [self._state(member, len(schedule))[: params.shape.image].clone() for member in holders]
        assert all(torch.equal(states[0], other) for other in states), "members have other bits"
        return states[0]

    def velocity(self, text: Mapping[str, Tensor], state: Tensor, params: Params, step: int) -> Tensor:
        """Of one step of the first branch on one device: [image rows, channels]."""
        self.denoise([text], state, params, [((0,), 1)], first_step=step)
        return self._ranks[0].denoiser._rows[params.shape.image].velocity(0)

    def close(self) -> None:
        self._threads.shutdown()

    def _begin(self, texts: Sequence[Mapping[str, Tensor]], state: Tensor, device: int, first_step: int) -> State:
        """As a worker's `encode`: a request begins in a slot of one device."""
        self._next_state += 1
        exchange = self._ranks[device].exchange
        for branch, fields in enumerate(texts):
            _fill(exchange.constants(SLOT, branch), fields)
        self._state(device, 0)[: len(state)].copy_(state)
        exchange.publish(SLOT, 0, slot_version(self._next_state, first_step))
        return State(self._next_state, SLOT)

    def _chunk(
        self,
        state: State,
        me: int,
        members: tuple[int, ...],
        chunk_index: int,
        holders: tuple[int, ...],
        source: int,
        params: Params,
        steps: range,
    ) -> None:
        """As a worker's `denoise`."""
        exchange, denoiser = self._ranks[me]
        source = me if me in holders else source
        versions = slot_version(state.state_id, steps.start), slot_version(state.state_id, steps.stop)
        chunk = denoiser.chunk(params.shape, members, SLOT, chunk_index, source, versions)
        denoiser.make_room(chunk)
        exchange.bind(chunk)
        if source != me:
            exchange.pull_constants()
        denoiser.prepare(chunk, state, params, steps.start)
        exchange.pull_state()
        exchange.enter()
        denoiser.run(chunk, state, params, steps)
        exchange.finish()

    def _all(self, members: tuple[int, ...], work: Callable[[int], None]) -> None:
        """`work` on all members at once. Raises what the first to fail raised."""

        def attempt(device: int) -> None:
            try:
                with torch.no_grad():
                    work(device)
            except BaseException:
                for other in range(self.num_devices):
                    self._abort.set(other)
                raise

        running = [self._threads.submit(attempt, member) for member in members]
        errors = [done.exception() for done in wait(running).done]
        if any(errors):
            for rank in self._ranks:
                rank.exchange.reset()
            raise next(iter(sorted(filter(None, errors), key=lambda error: isinstance(error, Aborted))))

    def _state(self, device: int, chunk_index: int) -> Tensor:
        return self._ranks[device].exchange.state(SLOT, chunk_index % NUM_BUFFERS)


def _fill(fields: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        fields[name][: len(value)].copy_(value)
