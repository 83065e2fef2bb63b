"""What each command does on a GPU: like runner.py, but everything is enqueued and answered when it is done.

Owns the model, this worker's slab and its queue of work. Nothing here waits for the device but loading and resetting;
the marks between a command's parts tell later when each was passed.
"""

import torch
from torch import Tensor

from tetrion.engine.messages import (
    BarriersReset,
    CopyLatents,
    Decode,
    Denoise,
    EncodePrompt,
    Event,
    Loaded,
    LoadWeights,
    MapPeers,
    PeerSlab,
    PeersMapped,
    ResetBarriers,
    UnmapPeers,
)
from tetrion.engine.models.device_ops import DeviceOps
from tetrion.engine.models.fused_decoder import fuse
from tetrion.engine.models.memory_budget import memory_budget
from tetrion.engine.models.registry import load_device_pipeline, model_components
from tetrion.engine.parallel.device_exchange import DeviceExchange, raise_for_status
from tetrion.engine.parallel.device_memory import DeviceMemory
from tetrion.engine.parallel.group import GroupPlan, plan_group
from tetrion.engine.parallel.words import slot_version
from tetrion.engine.sampling.flow_match import initial_noise
from tetrion.engine.transport.image_slab import ImageSlab
from tetrion.engine.worker import answers
from tetrion.engine.worker.completions import Completions
from tetrion.engine.worker.device_model import DeviceModel
from tetrion.engine.worker.spec import WorkerSpec
from tetrion.engine.worker.step_graphs import StepGraph, table_parts
from tetrion.engine.worker.work_queue import Mark, WorkQueue


class DeviceRunner:
    def __init__(self, spec: WorkerSpec, queue: WorkQueue, completions: Completions) -> None:
        """Take the slab, map what the engine shares. The model comes with `load`."""
        model, layout = spec.model, spec.layout
        self._spec, self._model, self._queue, self._completions = spec, model, queue, completions
        self.device_id = spec.device.device_id
        self._memory = DeviceMemory(layout, self.device_id, queue.device, spec.slab_fds, spec.control_fd)
        self._slabs = self._memory.slabs
        self._exchange = DeviceExchange(
            self._slabs, self._memory.abort, self._memory.clear_abort, model.num_heads, model.head_dim
        )
        self._images = ImageSlab.attach(
            spec.image_slab_fd, num_slots=spec.num_image_slots, slot_bytes=spec.image_slot_bytes
        )
        self._step = torch.zeros(1, dtype=torch.int32, device=queue.device)
        self._loaded: DeviceModel | None = None

    @property
    def slab(self) -> PeerSlab | None:
        """What peers map; None where there is no GPU."""
        return self._memory.description if self._queue.device.type == "cuda" else None

    @property
    def model(self) -> DeviceModel:
        assert self._loaded is not None, "the engine loads the model before anything else"
        return self._loaded

    # Answered at once ---------------------------------------------------------------------------------------------

    def load(self, command: LoadWeights) -> Event:
        """Raises ValueError with the numbers if the model does not fit."""
        device, dtype = self._queue.device, self._slabs.dtype
        components = model_components(self._model, self._spec.load_format)
        budget = memory_budget(self._model, components, self._spec.layout)
        if device.type == "cuda":
            free_bytes, _ = torch.cuda.mem_get_info(device)
            budget = budget.fitted(free_bytes + budget.slab_bytes, self._spec.device.name)  # the slab is already taken
        pipeline = load_device_pipeline(
            self._model, self._spec.load_format, components, device, dtype, DeviceOps(self._step)
        )
        pipeline.autoencoder.whole_pixels = budget.whole_pixels
        if device.type == "cuda":
            fuse(pipeline.autoencoder.decoder)
        self._loaded = DeviceModel(pipeline, self._queue, self._slabs, self._exchange, self._step)
        self._exchange.warm_up(self._model.legal_degrees(self._spec.layout.num_devices))
        return Loaded(command_id=command.command_id, device_id=self.device_id, weights_bytes=pipeline.weights_bytes)

    def map_peers(self, command: MapPeers) -> Event:
        self._queue.drain()  # mappings change only while nothing runs that might use them
        mapped, reason = self._memory.map_peers(command.slabs, host_memory=command.host_memory)
        return PeersMapped(command_id=command.command_id, device_id=self.device_id, mapped=mapped, reason=reason)

    def unmap_peers(self, command: UnmapPeers) -> Event:
        self._queue.drain()
        self._memory.unmap_peers(command.device_ids)
        mapped = self._slabs.mapped
        return PeersMapped(command_id=command.command_id, device_id=self.device_id, mapped=mapped, reason="")

    def reset_barriers(self, command: ResetBarriers) -> Event:
        self._exchange.reset()
        return BarriersReset(command_id=command.command_id, device_id=self.device_id)

    # Answered when the device is done -----------------------------------------------------------------------------

    def encode(self, command: EncodePrompt) -> None:
        started = self._queue.mark()
        embedding = self.model.embedding(command.prompt)
        noise = initial_noise(command.params.seed, command.params.shape.width, command.params.shape.height, self._model)
        state = self._slabs.slot(self.device_id, command.slot)
        state.text.copy_(embedding.embeds)
        state.pooled.copy_(embedding.pooled)
        state.latents[: len(noise)].copy_(self._queue.to_device(noise))
        self._exchange.publish(command.slot, slot_version(command.state_id, 0))
        status, ended = self._end()

        def finish() -> Event:
            _passed(ended, status)
            return answers.encoded(command, self.device_id, started.time_s(), ended.time_s(), embedding.num_tokens)

        self._completions.add(command, finish)

    def denoise(self, command: Denoise) -> None:
        model, last = self._model, command.step_index + command.chunk_steps
        plan = plan_group(command.members, model.max_text_tokens, command.params.shape.image, model.num_heads)
        graph = self.model.graph(plan)
        source = self.device_id if self.device_id in command.holders else command.source
        started = self._queue.mark()
        graph.group.bind(
            plan,
            command.slot,
            source=source,
            start_version=slot_version(command.state_id, command.step_index),
            end_version=slot_version(command.state_id, last),
        )
        if source != self.device_id:
            graph.group.pull_pooled()
        self.model.prepare(command, plan.num_image)
        graph.group.pull_state()
        graph.group.enter()
        entered = self._queue.mark()
        self._run_steps(command, graph, plan)
        graph.group.finish()
        status, ended = self._end()

        def finish() -> Event:
            _passed(ended, status)
            waited_s = entered.time_s() - started.time_s()
            return answers.denoised(command, self.device_id, started.time_s(), ended.time_s(), waited_s)

        self._completions.add(command, finish)

    def decode(self, command: Decode) -> None:
        version = slot_version(command.state_id, command.params.num_steps)
        plan, group = self._exchange.alone(self._model.max_text_tokens, command.params.shape.image)
        group.bind(plan, command.slot, source=command.source, start_version=version, end_version=version)
        group.pull_state()
        started = self._queue.mark()
        latents = self._latents(command)
        picture = self._queue.to_host(self.model.pipeline.decode(latents, *command.params.shape.size))
        status, ended = self._end()

        def finish() -> Event:
            _passed(ended, status)
            self._images.write(command.image_slot, picture.numpy())
            return answers.decoded(command, self.device_id, started.time_s(), ended.time_s())

        self._completions.add(command, finish)

    def copy_latents(self, command: CopyLatents) -> None:
        latents = self._queue.to_host(self._latents(command))
        copied = self._queue.mark()

        def finish() -> Event:
            copied.wait()
            self._images.write(command.image_slot, latents.numpy())
            return answers.latents_copied(command, self.device_id, tuple(latents.shape))

        self._completions.add(command, finish)

    def _run_steps(self, command: Denoise, graph: StepGraph, plan: GroupPlan) -> None:
        """Enqueue all steps of a chunk."""
        unit = self._model.sizes.multiple
        graph.load_rope((command.params.shape.height // unit, command.params.shape.width // unit))
        graph.load_text(self.model.project_text(command.slot, plan.shard_of(self.device_id).text))
        for steps in table_parts(command.step_index, command.step_index + command.chunk_steps):
            self.model.load_tables(command, plan.num_image, steps)
            for _ in steps:
                graph.replay()

    def _end(self) -> tuple[Tensor, Mark]:
        """The exchange's status as it is behind a command's work, and the mark behind both."""
        return self._queue.to_host(self._exchange.status), self._queue.mark()

    def _latents(self, command: Decode | CopyLatents) -> Tensor:
        """The request's latents in this device's slot: fp32 [tokens, in_channels]."""
        return self._slabs.slot(self.device_id, command.slot).latents[: command.params.shape.image]


def _passed(mark: Mark, status: Tensor) -> None:
    """Wait for the work. Raises Aborted, or what else the exchange says of it."""
    mark.wait()
    raise_for_status(status.tolist())
