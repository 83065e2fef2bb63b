"""What each command does on one device: everything is enqueued on the device's queue and answered when it is done.

Owns the models with their denoisers, this worker's ends of the exchange and of the image slab. Nothing here waits for a
GPU but loading and resetting; marks between a command's parts tell later when each was passed. What a CPU and a GPU do
differently is the backend's. Commands are self-contained: what is kept between them (vectors, embeddings) may be
dropped at any time.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

from torch import Tensor

from tetrion.engine.messages import (
    BarriersReset,
    CopyLatents,
    Decode,
    Denoise,
    EncodePrompt,
    Event,
    GroupCommand,
    Loaded,
    LoadWeights,
    MapPeers,
    PeerSlab,
    PeersMapped,
    ResetBarriers,
    UnmapPeers,
)
from tetrion.engine.model_spec import ModelSpec
from tetrion.engine.models.family import Model
from tetrion.engine.parallel.exchange import Exchange
from tetrion.engine.parallel.words import slot_version
from tetrion.engine.transport.image_slab import ImageSlab
from tetrion.engine.worker.denoiser import Denoiser, State
from tetrion.engine.worker.failures import NotFinite
from tetrion.engine.worker.recorded_encoders import RecordedEncoders
from tetrion.engine.worker.spec import WorkerSpec
from tetrion.engine.worker.work_queue import Mark, WorkQueue

Finish = Callable[[], Event]


class Completions(Protocol):
    def add(self, command: GroupCommand, finish: Finish) -> None:
        """`finish` waits for the command's work and makes the answer, which is then sent, in order."""


class Backend(Protocol):
    """What one kind of device does in its own way."""

    @property
    def queue(self) -> WorkQueue: ...

    @property
    def slab(self) -> PeerSlab | None:
        """What peers map; None where they have it already."""

    def load(self, publish: bool) -> list[Model]:
        """Raises ModelTooLarge with the numbers if the models do not fit."""

    def exchange(self, spec: ModelSpec) -> Exchange: ...

    def denoiser(self, model: Model, exchange: Exchange) -> Denoiser: ...

    def map_peers(self, command: MapPeers) -> tuple[tuple[int, ...], str]: ...

    def unmap_peers(self, command: UnmapPeers) -> tuple[int, ...]: ...

    def reset(self) -> None:
        """Forget all barriers and the abort."""


class Resident(NamedTuple):
    """A model with all that works on it."""

    model: Model
    exchange: Exchange
    denoiser: Denoiser
    encoders: RecordedEncoders

    @property
    def latents(self) -> str:
        """The field that steps change."""
        return self.model.spec.latents.name


class Runner:
    def __init__(self, spec: WorkerSpec, backend: Backend, completions: Completions) -> None:
        """The models come with `load`."""
        self._spec, self._backend, self._queue, self._completions = spec, backend, backend.queue, completions
        self.device_id = spec.device.device_id
        self._images = ImageSlab.attach(
            spec.image_slab_fd, num_slots=spec.num_image_slots, slot_bytes=spec.image_slot_bytes
        )
        self._residents: dict[str, Resident] = {}

    # Answered at once ---------------------------------------------------------------------------------------------

    def load(self, command: LoadWeights) -> Event:
        for model in self._backend.load(command.publish):
            exchange = self._backend.exchange(model.spec)
            denoiser = self._backend.denoiser(model, exchange)
            encoders = RecordedEncoders(model.text, self._queue)
            self._residents[model.spec.name] = Resident(model, exchange, denoiser, encoders)
            exchange.warm_up()
        weights_bytes = sum(resident.model.weights_bytes for resident in self._residents.values())
        return Loaded(command_id=command.command_id, device_id=self.device_id, weights_bytes=weights_bytes)

    def map_peers(self, command: MapPeers) -> Event:
        self._queue.drain()  # mappings change only while nothing runs that might use them
        mapped, reason = self._backend.map_peers(command)
        return PeersMapped(command_id=command.command_id, device_id=self.device_id, mapped=mapped, reason=reason)

    def unmap_peers(self, command: UnmapPeers) -> Event:
        self._queue.drain()
        mapped = self._backend.unmap_peers(command)
        return PeersMapped(command_id=command.command_id, device_id=self.device_id, mapped=mapped, reason="")

    def reset_barriers(self, command: ResetBarriers) -> Event:
        self._backend.reset()
        return BarriersReset(command_id=command.command_id, device_id=self.device_id)

    # Answered when the device is done -----------------------------------------------------------------------------

    def encode(self, command: EncodePrompt) -> None:
        it, params = self._residents[command.params.model], command.params
        prompts = (command.prompt, command.negative_prompt or "")[: params.shape.num_branches]
        started = self._queue.mark()
        embeddings = [it.encoders.embedding(prompt) for prompt in prompts]
        for branch, embedding in enumerate(embeddings):
            _fill(it.exchange.fields(command.slot, branch), embedding.fields)
        noise = self._queue.to_device(it.model.codec.noise(params.seed, params.shape))
        _fill(it.exchange.fields(command.slot, 0), {it.latents: noise})
        it.exchange.publish(command.slot, slot_version(command.state_id, 0))
        check, ended = it.exchange.outcome(), self._queue.mark()

        def finish() -> Event:
            _passed(ended, check)
            num_tokens = embeddings[0].num_tokens
            return command.encoded(self.device_id, started.time_s(), ended.time_s(), num_tokens)

        self._completions.add(command, finish)

    def denoise(self, command: Denoise) -> None:
        it, params, state = self._residents[command.params.model], command.params, _state(command)
        steps = range(command.step_index, command.step_index + command.chunk_steps)
        source = self.device_id if self.device_id in command.holders else command.source
        versions = (slot_version(command.state_id, steps.start), slot_version(command.state_id, steps.stop))
        chunk = it.denoiser.chunk(params.shape, command.members, state, source, versions)
        it.denoiser.record(chunk)
        started = self._queue.mark()
        it.exchange.bind(chunk)
        if source != self.device_id:
            it.exchange.pull_constants()
        it.denoiser.prepare(chunk, state, params, steps.start)
        it.exchange.pull_state()
        it.exchange.enter()
        entered = self._queue.mark()
        it.denoiser.run(chunk, state, params, steps)
        it.exchange.finish()
        check, ended = it.exchange.outcome(), self._queue.mark()

        def finish() -> Event:
            _passed(ended, check)
            waited_s = entered.time_s() - started.time_s()
            return command.denoised(self.device_id, started.time_s(), ended.time_s(), waited_s)

        self._completions.add(command, finish)

    def decode(self, command: Decode) -> None:
        it, params = self._residents[command.params.model], command.params
        version = slot_version(command.state_id, params.num_steps)
        alone = (self.device_id,)
        it.exchange.bind(it.denoiser.chunk(params.shape, alone, _state(command), command.source, (version, version)))
        it.exchange.pull_state()
        started = self._queue.mark()
        latents = self._latents(it, command)
        pixels, is_finite = map(self._queue.to_host, it.model.codec.decode(latents, params.shape))
        check, ended = it.exchange.outcome(), self._queue.mark()

        def finish() -> Event:
            _passed(ended, check)
            if not is_finite:
                raise NotFinite
            self._images.write(command.image_slot, pixels.numpy())
            return command.decoded(self.device_id, started.time_s(), ended.time_s())

        self._completions.add(command, finish)

    def copy_latents(self, command: CopyLatents) -> None:
        latents = self._queue.to_host(self._latents(self._residents[command.params.model], command))
        copied = self._queue.mark()

        def finish() -> Event:
            copied.wait()
            self._images.write(command.image_slot, latents.numpy())
            return command.copied(self.device_id, tuple(latents.shape))

        self._completions.add(command, finish)

    def _latents(self, it: Resident, command: Decode | CopyLatents) -> Tensor:
        """The state in this device's slot: fp32 [image rows, width]."""
        return it.exchange.fields(command.slot, 0)[it.latents][: command.params.shape.image]


def _fill(fields: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        fields[name][: len(value)].copy_(value)


def _state(command: Denoise | Decode) -> State:
    return State(command.state_id, command.slot)


def _passed(ended: Mark, check: Callable[[], None]) -> None:
    """Wait for a command's end. Raises what went wrong."""
    ended.wait()
    check()
