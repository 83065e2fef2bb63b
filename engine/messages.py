"""Every message between the engine and its workers: one `Command` union down, one `Event` union up.

All are frozen tagged msgspec Structs, encoded as msgpack; decoding validates, constructing does not. Tensors never
travel in a message: they lie in shared slabs, and a message names the slot. Commands are self-contained (a worker
keeps no request table), so any worker can take over a request from any other; each makes the event that it is answered
with.

`command_id` is unique per engine; a group command is the same message sent to every member. `state_id` is unique per
attempt at a request (one that goes on or starts again after a loss gets a new one): it tags what is written into a
slot, so that what an earlier owner or an earlier attempt left there is never taken for it. `chunk_index` counts the
chunks of steps that a state has behind it: it says which of a slot's buffers has it (parallel/layout.py).
"""

from typing import ClassVar, Literal

import msgspec

from tetrion.engine.params import Params
from tetrion.engine.stages import Stage


class EncodePrompt(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Text-encode the prompts and draw the starting noise into `slot` of the receiving worker's slab. Where
    `params.shape` has two branches, the second one is the negative prompt's. Where it has pictures, they lie in
    `input_slot`, one behind the other, and are encoded, too. A request that has lost all holders of its state goes on
    from `step_index`: its latents are those that were saved in host memory."""

    stage: ClassVar[Stage] = "encode"

    command_id: int
    request_id: str
    state_id: int
    slot: int
    params: Params
    prompt: str
    negative_prompt: str | None = None
    input_slot: int | None = None
    step_index: int = 0
    chunk_index: int = 0

    def encoded(self, device_id: int, started_s: float, ended_s: float, num_text_tokens: int) -> "Encoded":
        return Encoded(
            command_id=self.command_id,
            device_id=device_id,
            request_id=self.request_id,
            started_s=started_s,
            ended_s=ended_s,
            num_text_tokens=num_text_tokens,
        )


class Denoise(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Run steps `step_index … step_index + chunk_steps` of a request on the sequence-parallel group `members`.

    `members` is ordered: position = rank. Members not in `holders` first pull the request's state (prompt embeddings,
    latents) from device `source`, waiting until the source's slot has reached `step_index` of `source_state_id`. The
    first member saves what comes of it in host memory.
    """

    stage: ClassVar[Stage] = "denoise"

    command_id: int
    round_id: int
    request_id: str
    state_id: int
    source_state_id: int
    slot: int
    members: tuple[int, ...]
    holders: tuple[int, ...]
    source: int
    step_index: int
    chunk_index: int
    chunk_steps: int
    params: Params

    def denoised(self, device_id: int, started_s: float, ended_s: float, waited_s: float) -> "Denoised":
        return Denoised(
            command_id=self.command_id,
            device_id=device_id,
            request_id=self.request_id,
            step_index=self.step_index + self.chunk_steps,
            started_s=started_s,
            ended_s=ended_s,
            waited_s=waited_s,
        )


class Decode(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """VAE-decode a finished request's latents (pulled from `source` if that is another device) to `image_slot`."""

    stage: ClassVar[Stage] = "decode"

    command_id: int
    request_id: str
    state_id: int
    slot: int
    chunk_index: int
    source: int
    params: Params
    image_slot: int

    def decoded(self, device_id: int, started_s: float, ended_s: float) -> "Decoded":
        return Decoded(
            command_id=self.command_id,
            device_id=device_id,
            request_id=self.request_id,
            image_slot=self.image_slot,
            started_s=started_s,
            ended_s=ended_s,
        )


class CopyLatents(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Copy a request's latents (fp32, [tokens, channels]) as they stand on this worker to `image_slot`."""

    command_id: int
    request_id: str
    state_id: int
    slot: int
    chunk_index: int
    params: Params
    image_slot: int

    def copied(self, device_id: int, shape: tuple[int, ...]) -> "LatentsCopied":
        num_tokens, num_channels = shape
        return LatentsCopied(
            command_id=self.command_id,
            device_id=device_id,
            request_id=self.request_id,
            image_slot=self.image_slot,
            num_tokens=num_tokens,
            num_channels=num_channels,
        )


class LoadWeights(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Load the model. The worker with `publish` fills the shared weights segment; the others map what it wrote."""

    command_id: int
    publish: bool


class ResetBarriers(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Zero this device's pairwise counters, then its abort word. Sent to all while all are idle, or to a new one."""

    command_id: int


class Ping(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Does nothing; answered with `Pong`."""

    command_id: int


class Shutdown(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Finish what is queued before this message, then exit with status 0."""

    command_id: int


class PeerSlab(msgspec.Struct, frozen=True, kw_only=True):
    """A GPU worker's slab, for its peers. `handle`: CUDA IPC handle (64 bytes; empty if the slab is in host memory)."""

    device_id: int
    handle: bytes
    device_uuid: str


class MapPeers(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """GPU workers, while idle: map these slabs, in place of what was mapped for their devices before.

    `host_memory`: all slabs are in host memory from now on; their files have been given their size.
    """

    command_id: int
    slabs: tuple[PeerSlab, ...]
    host_memory: bool


class UnmapPeers(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """GPU workers, while idle: close the mappings of these devices' slabs. Comes before a dead worker is replaced."""

    command_id: int
    device_ids: tuple[int, ...]


Command = (
    EncodePrompt
    | Denoise
    | Decode
    | CopyLatents
    | LoadWeights
    | MapPeers
    | UnmapPeers
    | ResetBarriers
    | Ping
    | Shutdown
)
StageCommand = EncodePrompt | Denoise | Decode
"""Commands that carry out a stage of a request."""
GroupCommand = StageCommand | CopyLatents
"""Commands that occupy devices and belong to a request."""


FailureKind = Literal["aborted", "out_of_memory", "checkpoint", "error"]


class Started(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The worker process runs, has mapped its segments and imported its libraries. `slab`: of a GPU worker."""

    device_id: int
    pid: int
    slab: PeerSlab | None = None


class Loaded(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The model is resident and the worker takes requests. `weights_bytes` counts the shared weights."""

    command_id: int
    device_id: int
    weights_bytes: int


class PeersMapped(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Answers `MapPeers` and `UnmapPeers`. `mapped`: devices whose slabs this one reaches now, itself included.

    `reason`: why others of `MapPeers` are not among them; empty if all are.
    """

    command_id: int
    device_id: int
    mapped: tuple[int, ...]
    reason: str


class Encoded(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Times are CLOCK_MONOTONIC seconds, the same clock in every process."""

    stage: ClassVar[Stage] = "encode"

    command_id: int
    device_id: int
    request_id: str
    started_s: float
    ended_s: float
    num_text_tokens: int


class Denoised(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """This member has finished its chunk and holds the latents of `step_index` (steps done so far).

    `waited_s` is the time from `started_s` until the entry barrier was passed and the state was pulled.
    """

    stage: ClassVar[Stage] = "denoise"

    command_id: int
    device_id: int
    request_id: str
    step_index: int
    started_s: float
    ended_s: float
    waited_s: float


class Decoded(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """uint8 RGB [height, width, 3] lies in `image_slot`. `started_s` is when the latents had arrived."""

    stage: ClassVar[Stage] = "decode"

    command_id: int
    device_id: int
    request_id: str
    image_slot: int
    started_s: float
    ended_s: float


class LatentsCopied(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    command_id: int
    device_id: int
    request_id: str
    image_slot: int
    num_tokens: int
    num_channels: int


class BarriersReset(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    command_id: int
    device_id: int


class Pong(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    command_id: int
    device_id: int


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A command ended without its result. `aborted`: the engine set the abort word; `checkpoint`: its files are at
    fault, which they are for every worker, and `message` is for users; `error`: `message` says what."""

    command_id: int
    device_id: int
    request_id: str
    kind: FailureKind
    message: str


Event = Started | Loaded | PeersMapped | Encoded | Denoised | Decoded | LatentsCopied | BarriersReset | Pong | Failed


def failed(command: Command, device_id: int, kind: FailureKind, message: str) -> Failed:
    """The answer to a command that has no result."""
    return Failed(
        command_id=command.command_id,
        device_id=device_id,
        request_id=command.request_id if isinstance(command, GroupCommand) else "",
        kind=kind,
        message=message,
    )
