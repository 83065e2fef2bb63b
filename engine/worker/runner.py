"""What each command does on one device: everything is enqueued on the device's queue and answered when it is done.

Owns the models with their denoisers, this worker's ends of the exchange and of the slabs of results and of inputs.
Nothing here waits for a GPU but loading and resetting; marks between a command's parts tell later when each was passed.
What a CPU and a GPU do differently is the backend's. Commands are self-contained: what is kept between them (vectors,
embeddings) may be dropped at any time.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, Protocol

import torch
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
from tetrion.engine.parallel.layout import NUM_BUFFERS
from tetrion.engine.parallel.saved_states import SavedStates
from tetrion.engine.parallel.words import slot_version
from tetrion.engine.transport.image_slab import ImageSlab
from tetrion.engine.transport.segment import SharedSegment
from tetrion.engine.worker.decoder_rehearsal import DecoderRehearsal
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

    def pin(self, segment: SharedSegment) -> None:
        """Let the device copy to and from a segment by itself."""

    def reset(self) -> None:
        """Forget all barriers and the abort."""


class Resident(NamedTuple):
    """A model with all that works on it; None where the device does not serve the stage."""

    model: Model
    exchange: Exchange
    denoiser: Denoiser
    encoders: RecordedEncoders | None
    decoder: DecoderRehearsal | None


class Runner:
    def __init__(self, spec: WorkerSpec, backend: Backend, completions: Completions) -> None:
        """The models come with `load`."""
        self._spec, self._backend, self._queue, self._completions = spec, backend, backend.queue, completions
        self.device_id = spec.device.device_id
        self._images = ImageSlab.attach(
            spec.image_slab_fd, num_slots=spec.num_image_slots, slot_bytes=spec.image_slot_bytes
        )
        self._inputs = ImageSlab.attach(
            spec.input_slab_fd, num_slots=spec.num_input_slots, slot_bytes=spec.input_slot_bytes
        )
        self._saved = SavedStates.attach(spec.saved_states_fd, spec.layout)
        backend.pin(self._saved.segment)
        self._residents: dict[str, Resident] = {}

    # Before it is needed -------------------------------------------------------------------------------------------

    @property
    def has_to_rehearse(self) -> bool:
        return any(decoder.has_to_rehearse for decoder in self._decoders)

    def rehearse(self) -> None:
        """A size that a decoder has not had yet. To be called when the device has work and no command waits."""
        next(decoder for decoder in self._decoders if decoder.has_to_rehearse).rehearse()

    @property
    def _decoders(self) -> Iterator[DecoderRehearsal]:
        return (resident.decoder for resident in self._residents.values() if resident.decoder is not None)

    # Answered at once ---------------------------------------------------------------------------------------------

    def load(self, command: LoadWeights) -> Event:
        stages = self._spec.device.stages
        for model in self._backend.load(command.publish):
            exchange = self._backend.exchange(model.spec)
            denoiser = self._backend.denoiser(model, exchange)
            encoders = RecordedEncoders(model.text, self._queue) if "encode" in stages else None
            decoder = DecoderRehearsal(model.codec, model.spec, self._queue) if "decode" in stages else None
            self._residents[model.spec.name] = Resident(model, exchange, denoiser, encoders, decoder)
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
        assert it.encoders is not None, "the planner respects roles"
        started = self._queue.mark()
        embeddings = [it.encoders.embedding(prompt) for prompt in prompts]
        pictures = [self._queue.to_device(picture) for picture in self._pictures(command)]
        beginning = it.model.begin(params, pictures, self._queue.to_device)
        for branch, embedding in enumerate(embeddings):
            _fill(it.exchange.constants(command.slot, branch), {**embedding.fields, **beginning.fields})
        start = self._saved_state(it, command, command.chunk_index) if command.step_index else beginning.state
        on_device = start if start.device == self._queue.device else self._queue.to_device(start)
        self._state(it, command, command.chunk_index).copy_(on_device)
        version = slot_version(command.state_id, command.step_index)
        it.exchange.publish(command.slot, command.chunk_index % NUM_BUFFERS, version)
        check, ended = it.exchange.outcome(), self._queue.mark()

        def finish() -> Event:
            _passed(ended, check)
            num_tokens = embeddings[0].num_tokens
            return command.encoded(self.device_id, started.time_s(), ended.time_s(), num_tokens)

        self._completions.add(command, finish)

    def denoise(self, command: Denoise) -> None:
        it, params = self._residents[command.params.model], command.params
        state = State(command.state_id, command.slot)
        steps = range(command.step_index, command.step_index + command.chunk_steps)
        source = self.device_id if self.device_id in command.holders else command.source
        versions = (slot_version(command.source_state_id, steps.start), slot_version(command.state_id, steps.stop))
        chunk = it.denoiser.chunk(params.shape, command.members, command.slot, command.chunk_index, source, versions)
        it.denoiser.make_room(chunk)
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
        if self.device_id == command.members[0]:
            self._save(it, command, command.chunk_index + 1)
        check, ended = it.exchange.outcome(), self._queue.mark()

        def finish() -> Event:
            _passed(ended, check)
            waited_s = entered.time_s() - started.time_s()
            return command.denoised(self.device_id, started.time_s(), ended.time_s(), waited_s)

        self._completions.add(command, finish)
        if it.decoder is not None:
            it.decoder.expect(params.shape)

    def decode(self, command: Decode) -> None:
        it, params = self._residents[command.params.model], command.params
        assert it.decoder is not None, "the planner respects roles"
        version, alone = slot_version(command.state_id, params.num_steps), (self.device_id,)
        place = command.slot, command.chunk_index
        it.exchange.bind(it.denoiser.chunk(params.shape, alone, *place, command.source, (version, version)))
        it.exchange.pull_state()
        started = self._queue.mark()
        latents = self._state(it, command, command.chunk_index)
        pixels, is_finite = map(self._queue.to_host, it.decoder.decode(latents, params.shape))
        check, ended = it.exchange.outcome(), self._queue.mark()

        def finish() -> Event:
            _passed(ended, check)
            if not is_finite:
                raise NotFinite
            self._images.write(command.image_slot, pixels.numpy())
            return command.decoded(self.device_id, started.time_s(), ended.time_s())

        self._completions.add(command, finish)

    def copy_latents(self, command: CopyLatents) -> None:
        it = self._residents[command.params.model]
        latents = self._queue.to_host(self._state(it, command, command.chunk_index))
        copied = self._queue.mark()

        def finish() -> Event:
            copied.wait()
            self._images.write(command.image_slot, latents.numpy())
            return command.copied(self.device_id, tuple(latents.shape))

        self._completions.add(command, finish)

    # A request's state -------------------------------------------------------------------------------------------

    def _pictures(self, command: EncodePrompt) -> list[Tensor]:
        """What the request brings, on the host: copies, since the slot is another's once the command is answered."""
        if command.input_slot is None:
            return []
        arrays = self._inputs.view_all(command.input_slot, command.params.shape.inputs)
        return [torch.from_numpy(array.copy()) for array in arrays]

    def _state(self, it: Resident, command: GroupCommand, chunk_index: int) -> Tensor:
        """What steps change, in this device's slot: fp32 [image rows, width]."""
        return it.exchange.state(command.slot, chunk_index % NUM_BUFFERS)[: command.params.shape.image]

    def _save(self, it: Resident, command: Denoise, chunk_index: int) -> None:
        """Enqueue a copy to host memory."""
        state = self._state(it, command, chunk_index)
        self._saved_state(it, command, chunk_index).copy_(state, non_blocking=True)

    def _saved_state(self, it: Resident, command: GroupCommand, chunk_index: int) -> Tensor:
        """The same in host memory."""
        shape = command.params.shape.image, it.model.spec.latents.width
        return torch.from_numpy(self._saved.view(command.slot, chunk_index, shape))


def _fill(fields: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        fields[name][: len(value)].copy_(value)


def _passed(ended: Mark, check: Callable[[], None]) -> None:
    """Wait for a command's end. Raises what went wrong."""
    ended.wait()
    check()
