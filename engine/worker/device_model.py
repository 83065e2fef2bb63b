"""A loaded model on a GPU: its recorded steps, and what is kept of recent prompts and requests.

Owns what is derived from a request's state in its slot and may be dropped at any time; knows no events. Everything is
enqueued.
"""

import functools

import numpy as np
import torch
from torch import Tensor

from tetrion.engine.messages import Denoise
from tetrion.engine.models.registry import Pipeline
from tetrion.engine.parallel.device_exchange import DeviceExchange, group_shape
from tetrion.engine.parallel.device_slab import DeviceSlabs
from tetrion.engine.parallel.group import GroupPlan
from tetrion.engine.sampling.flow_match import sigmas, timesteps
from tetrion.engine.worker.recorded_encoders import RecordedEncoders
from tetrion.engine.worker.step_graphs import TABLE_STEPS, StepGraph, StepGraphs, StepTables
from tetrion.engine.worker.work_queue import WorkQueue

CACHED_PROMPTS = 32
CACHED_TABLES = 8
"""Modulation tables of TABLE_STEPS steps: 68 MB each for FLUX.1."""
CACHED_SCHEDULES = 256


class DeviceModel:
    def __init__(
        self, pipeline: Pipeline, queue: WorkQueue, slabs: DeviceSlabs, exchange: DeviceExchange, step: Tensor
    ) -> None:
        """`step`: the counter that the pipeline's operators read."""
        config = pipeline.flux.config
        self.pipeline = pipeline
        self._queue, self._slabs = queue, slabs
        self.tables = StepTables(step, config.num_vectors, config.hidden_size, slabs.dtype)
        self._graphs = StepGraphs(queue, pipeline.flux, exchange, self.tables)
        self.embedding = functools.lru_cache(CACHED_PROMPTS)(RecordedEncoders(pipeline.text_encoders, queue).encode)
        self._modulations = functools.lru_cache(CACHED_TABLES)(self._compute_modulations)
        self._deltas = functools.lru_cache(CACHED_SCHEDULES)(self._compute_deltas)

    def graph(self, plan: GroupPlan) -> StepGraph:
        """The recorded step of this device in `plan`'s group."""
        return self._graphs.get(group_shape(plan, self._slabs.device_id))

    def project_text(self, slot: int, text: range) -> Tensor:
        """These text tokens of the state in `slot`: [n, C]."""
        return self.pipeline.flux.project_text(
            self._slabs.slot(self._slabs.device_id, slot).text[text.start : text.stop]
        )

    def prepare(self, command: Denoise, num_image: int) -> None:
        """Enqueue what a request needs once, if it is not there: the first steps' modulations, from the pooled
        embedding in its slot."""
        self._modulation_of(command, num_image, command.step_index // TABLE_STEPS)

    def load_tables(self, command: Denoise, num_image: int, steps: range) -> None:
        """Enqueue: the next replays are `steps` of the command's request, all of one part of TABLE_STEPS steps."""
        part = steps.start // TABLE_STEPS
        modulation = self._modulation_of(command, num_image, part)
        rows = slice(steps.start - part * TABLE_STEPS, steps.stop - part * TABLE_STEPS)
        deltas = self._deltas(command.params.num_steps, num_image)[steps.start : steps.stop]
        self.tables.load(deltas, modulation[rows])

    def _modulation_of(self, command: Denoise, num_image: int, part: int) -> Tensor:
        params = command.params
        return self._modulations(command.state_id, command.slot, params.num_steps, num_image, params.guidance, part)

    def _compute_modulations(
        self, state_id: int, slot: int, num_steps: int, num_image: int, guidance: float, part: int
    ) -> Tensor:
        """Modulation vectors of a part's steps: [k, V, C]. `state_id` is there for the cache."""
        scheduler = self.pipeline.spec.scheduler
        times = timesteps(scheduler, sigmas(scheduler, num_steps, num_image))
        times = times[part * TABLE_STEPS : (part + 1) * TABLE_STEPS]
        times_on_device = self._queue.to_device(torch.from_numpy(times))
        pooled = self._slabs.slot(self._slabs.device_id, slot).pooled
        return self.pipeline.flux.modulations(times_on_device, guidance, pooled)

    def _compute_deltas(self, num_steps: int, num_image: int) -> Tensor:
        """Change of the noise level in each step, fp32 [num_steps]."""
        return self._queue.to_device(
            torch.from_numpy(np.diff(sigmas(self.pipeline.spec.scheduler, num_steps, num_image)))
        )
