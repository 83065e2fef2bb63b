"""What each command does on one device. Owns the model, the slab views and this worker's end of the barriers.

Commands are self-contained: what is kept between them (modulation tables, projected text) is derived from the request's
state in its slot and may be dropped at any time.
"""

import functools
import time

import torch
from torch import Tensor

from tetrion.engine.messages import (
    BarriersReset,
    CopyLatents,
    Decode,
    Decoded,
    Denoise,
    Denoised,
    Encoded,
    EncodePrompt,
    LatentsCopied,
    Loaded,
    LoadWeights,
    MapPeers,
    PeersMapped,
    ResetBarriers,
    UnmapPeers,
)
from tetrion.engine.models.registry import Pipeline, load_pipeline
from tetrion.engine.parallel.barrier import PairwiseBarrier
from tetrion.engine.parallel.exchange import Exchange, make_exchange
from tetrion.engine.parallel.layout import ControlLayout
from tetrion.engine.parallel.shared_slab import SharedSlabs
from tetrion.engine.parallel.words import slot_version
from tetrion.engine.sampling.flow_match import euler_step, initial_noise, sigmas, timesteps
from tetrion.engine.shape import StepShape
from tetrion.engine.transport.image_slab import ImageSlab
from tetrion.engine.transport.segment import SharedSegment
from tetrion.engine.worker import answers
from tetrion.engine.worker.spec import WorkerSpec

CACHED_REQUESTS = 8


class Runner:
    def __init__(self, spec: WorkerSpec) -> None:
        """Map everything that the engine shares. The model comes with `load`."""
        self._spec = spec
        self._model = spec.model
        self.device_id = spec.device.device_id
        layout, num_devices = spec.layout, spec.layout.num_devices
        slabs = [SharedSegment.attach(fd, layout.num_bytes).view for fd in spec.slab_fds]
        control = SharedSegment.attach(spec.control_fd, ControlLayout(num_devices=num_devices).num_bytes).view
        self._slabs = SharedSlabs(layout, self.device_id, slabs)
        self._barrier = PairwiseBarrier(layout, self.device_id, slabs, control)
        self._images = ImageSlab.attach(
            spec.image_slab_fd, num_slots=spec.num_image_slots, slot_bytes=spec.image_slot_bytes
        )
        self._pipeline: Pipeline | None = None
        self._modulations = functools.lru_cache(CACHED_REQUESTS)(self._compute_modulations)
        self._text = functools.lru_cache(CACHED_REQUESTS)(self._project_text)

    @property
    def pipeline(self) -> Pipeline:
        assert self._pipeline is not None, "the engine loads the model before anything else"
        return self._pipeline

    def load(self, command: LoadWeights) -> Loaded:
        self._pipeline = load_pipeline(self._model, self._spec.weights_fd, command.publish, self._spec.load_format)
        return Loaded(
            command_id=command.command_id,
            device_id=self.device_id,
            weights_bytes=self._pipeline.weights_bytes,
        )

    def reset_barriers(self, command: ResetBarriers) -> BarriersReset:
        self._barrier.reset()
        return BarriersReset(command_id=command.command_id, device_id=self.device_id)

    def map_peers(self, command: MapPeers) -> PeersMapped:
        raise AssertionError("CPU workers have all slabs mapped from the start")

    def unmap_peers(self, command: UnmapPeers) -> PeersMapped:
        raise AssertionError("CPU workers keep all slabs mapped")

    def encode(self, command: EncodePrompt) -> Encoded:
        started_s = time.monotonic()
        embedding = self.pipeline.encode(command.prompt)
        noise = initial_noise(command.params.seed, command.params.shape.width, command.params.shape.height, self._model)
        state = self._slabs.slot(self.device_id, command.slot)
        state.text.copy_(embedding.embeds)
        state.pooled.copy_(embedding.pooled)
        state.latents[: len(noise)].copy_(noise)
        state.version = slot_version(command.state_id, 0)
        return answers.encoded(command, self.device_id, started_s, time.monotonic(), embedding.num_tokens)

    def denoise(self, command: Denoise) -> Denoised:
        started_s = time.monotonic()
        exchange = self._exchange(command.members, command.params.shape)
        source = self.device_id if self.device_id in command.holders else command.source
        exchange.pull_state(source, command.slot, slot_version(command.state_id, command.step_index))
        exchange.enter(command.slot)
        waited_s = time.monotonic() - started_s
        self._run_steps(command, exchange)
        return answers.denoised(command, self.device_id, started_s, time.monotonic(), waited_s)

    def decode(self, command: Decode) -> Decoded:
        exchange = self._exchange((self.device_id,), command.params.shape)
        exchange.pull_state(command.source, command.slot, slot_version(command.state_id, command.params.num_steps))
        started_s = time.monotonic()
        shape = command.params.shape
        picture = self.pipeline.decode(self._latents(command.slot, shape), shape.width, shape.height)
        self._images.write(command.image_slot, picture.numpy())
        return answers.decoded(command, self.device_id, started_s, time.monotonic())

    def copy_latents(self, command: CopyLatents) -> LatentsCopied:
        latents = self._latents(command.slot, command.params.shape)
        self._images.write(command.image_slot, latents.float().numpy())
        return answers.latents_copied(command, self.device_id, tuple(latents.shape))

    def _run_steps(self, command: Denoise, exchange: Exchange) -> None:
        """All steps of a chunk on this member's tokens."""
        flux, shard = self.pipeline.flux, exchange.shard
        state_id, slot, params = command.state_id, command.slot, command.params
        levels = self._levels(command)
        modulations = self._modulations(state_id, slot, params.num_steps, params.shape.image, params.guidance)
        text = self._text(state_id, slot, shard.text)
        rope = self._rope(command, exchange)
        latents = self._latents(slot, params.shape)[shard.image.start : shard.image.stop].clone()
        last = command.step_index + command.chunk_steps - 1
        for step_index in range(command.step_index, last + 1):
            velocity = flux.step(latents, text, modulations[step_index], rope, exchange.attend)
            latents = euler_step(latents, velocity, levels[step_index], levels[step_index + 1])
            version = slot_version(state_id, step_index + 1) if step_index == last else None
            exchange.share_latents(latents, slot, version)

    def _exchange(self, members: tuple[int, ...], shape: StepShape) -> Exchange:
        model = self._model
        return make_exchange(
            self._slabs, self._barrier, members, model.max_text_tokens, shape.image, model.num_heads, model.head_dim
        )

    def _latents(self, slot: int, shape: StepShape) -> Tensor:
        """The request's latents in this device's slot: [tokens, in_channels]."""
        return self._slabs.slot(self.device_id, slot).latents[: shape.image]

    def _levels(self, command: Denoise) -> list[float]:
        """Noise level before each step and after the last."""
        return sigmas(self._model.scheduler, command.params.num_steps, command.params.shape.image).tolist()

    def _rope(self, command: Denoise, exchange: Exchange) -> tuple[Tensor, Tensor]:
        """Rotary tables of this member's tokens, text first."""
        unit, num_text, shape = self._model.sizes.multiple, self._model.max_text_tokens, command.params.shape
        text, image = exchange.shard.text, exchange.shard.image
        tables = self.pipeline.flux.rope(shape.height // unit, shape.width // unit, num_text)
        cos, sin = (
            torch.cat([table[text.start : text.stop], table[num_text + image.start : num_text + image.stop]])
            for table in tables
        )
        return cos, sin

    def _compute_modulations(self, state_id: int, slot: int, num_steps: int, num_image: int, guidance: float) -> Tensor:
        """Modulation vectors of all steps: [num_steps, V, C]. `state_id` is there for the cache."""
        model = self._model
        levels = sigmas(model.scheduler, num_steps, num_image)
        times = torch.from_numpy(timesteps(model.scheduler, levels))
        return self.pipeline.flux.modulations(times, guidance, self._slabs.slot(self.device_id, slot).pooled)

    def _project_text(self, state_id: int, slot: int, text: range) -> Tensor:
        """This member's text tokens: [n, C]. `state_id` is there for the cache."""
        return self.pipeline.flux.project_text(self._slabs.slot(self.device_id, slot).text[text.start : text.stop])
