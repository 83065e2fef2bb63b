"""Measuring requests on an executor that nobody else uses: commands as the loop would give them, and their times.

Owns requests that belong to no table, and waiting for every member's answer. Knows no planner and keeps no result.
"""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import msgspec
import numpy as np
import numpy.typing as npt

from tetrion.engine.errors import GenerationError
from tetrion.engine.executors.base import PictureReady, WorkerLost, WorkerReady
from tetrion.engine.executors.processes import ProcessExecutor
from tetrion.engine.loop.dispatch import decode_command, denoise_command, encode_command
from tetrion.engine.loop.requests import Request
from tetrion.engine.messages import CopyLatents, Decoded, Denoised, Encoded, Event, Failed, GroupCommand, LatentsCopied
from tetrion.engine.model_spec import ModelSpec
from tetrion.engine.planning.snapshot import Assignment
from tetrion.engine.request import ImageRequest
from tetrion.engine.resolve import resolve_request
from tetrion.engine.roles import able
from tetrion.engine.shape import StepShape
from tetrion.engine.stages import Stage

PROMPT = "a red circle left of a large blue star"
SEED = 1
Size = tuple[int, int]
"""(width, height) in pixels."""
Members = tuple[int, ...]
ChunkPlan = tuple[Members, int]
"""Members, and how many steps they run."""


class ChunkTimes(msgspec.Struct, frozen=True, kw_only=True):
    """One chunk as its members saw it, CLOCK_MONOTONIC seconds. `entered_s`: the last member had the request's state
    and all members were there. `net_s`: the longest that a member took from there."""

    num_steps: int
    started_s: float
    entered_s: float
    ended_s: float
    net_s: float

    @property
    def step_s(self) -> float:
        return self.net_s / self.num_steps


class Probe:
    """Requests of one executor, one after the other, or side by side on other devices (`rehearse`); all use state slot
    0. One probe an executor: ids must be new."""

    def __init__(self, executor: ProcessExecutor, spec: ModelSpec) -> None:
        self.executor = executor
        self.spec = spec
        self._ids = itertools.count(1000)
        self._input_slots: dict[StepShape, int] = {}

    def request(
        self, size: Size, num_steps: int, prompt: str = PROMPT, device_id: int | None = None, with_picture: bool = False
    ) -> Request:
        """A fresh request that starts on this device, or the first one that encodes. `with_picture`: it brings one of
        its own size, or of the least that the model takes, as it does for a model that draws nothing without, and a mask if it takes one."""
        width, height = size
        least = 0 if self.spec.reference_area is None else self.spec.reference_area.min_side
        picture = np.zeros((max(height, least), max(width, least), 3), np.uint8)
        has_mask = "mask" in self.spec.inputs
        asked = ImageRequest(
            prompt=prompt,
            width=width,
            height=height,
            num_steps=num_steps,
            seed=SEED,
            pictures=(picture,) if with_picture or has_mask else (),
            mask=np.zeros((height, width), np.uint8) if has_mask else None,
            request_id="measurement",
        )
        resolved = resolve_request(asked, self.spec, len(self.able("denoise")))
        request = Request(resolved, self.executor.now_s())
        request.slot, request.planned_holders = 0, (self._able_at_best("encode", device_id),)
        return request

    def able(self, stage: Stage) -> Members:
        """Devices that serve a stage."""
        return able(self.executor.stages, stage)

    def _able_at_best(self, stage: Stage, device_id: int | None) -> int:
        """This device if it serves the stage, else the first one that does."""
        devices = self.able(stage)
        return device_id if device_id in devices else devices[0]

    def new_prompt(self) -> str:
        """A prompt that no worker has seen before: what it has seen, a GPU worker keeps."""
        return f"{PROMPT} {next(self._ids)}"

    async def encode(self, request: Request) -> Encoded:
        (encoded,) = await self._run([self._encode(request)])
        assert isinstance(encoded, Encoded)
        return encoded

    async def denoise(self, request: Request, chunks: Sequence[ChunkPlan]) -> list[ChunkTimes]:
        """Run these chunks of an encoded request, all queued at once."""
        events = await self._run([self._next_chunk(request, *chunk) for chunk in chunks])
        return chunk_times(events, [num_steps for _, num_steps in chunks])

    async def runs(self, size: Size, num_steps: int, chunk: ChunkPlan, count: int) -> list[ChunkTimes]:
        """Begin `count` requests of `num_steps` steps and run one chunk of each: all queued at once, so that devices
        are never idle. The requests take turns in one slot: a chunk ends only once all members have what they need."""
        commands: list[tuple[GroupCommand, Members]] = []
        for _ in range(count):
            request = self.request(size, num_steps)
            commands += [self._encode(request), self._next_chunk(request, *chunk)]
        return chunk_times(await self._run(commands), [chunk[1]] * count)

    async def rehearse(
        self, size: Size, groups: Sequence[Members], *, decoding: bool, with_picture: bool = False
    ) -> None:
        """On each group a request of its own: encoded on the first member, one step on all, decoded on the first if
        `decoding`; elsewhere what that one does not serve. All are queued at once, so that groups without a common
        member work side by side."""
        commands: list[tuple[GroupCommand, Members]] = []
        with ExitStack() as image_slots:
            for members in groups:
                request = self.request(size, 1, device_id=members[0], with_picture=with_picture)
                commands += [self._encode(request), self._next_chunk(request, members, 1)]
                if decoding:
                    image_slot = image_slots.enter_context(self._image_slot())
                    commands.append(self._decode(request, image_slot))
            await self._run(commands)

    async def latents(self, request: Request) -> npt.NDArray[np.float32]:
        """fp32 [tokens, channels], as the first of the request's members holds them."""
        with self._image_slot() as image_slot:
            copy = CopyLatents(
                command_id=next(self._ids),
                request_id=request.request_id,
                state_id=request.planned_state_id,
                slot=request.slot,
                chunk_index=request.planned_chunk_index,
                params=request.params,
                image_slot=image_slot,
            )
            (copied,) = await self._run([(copy, request.planned_holders[:1])])
            assert isinstance(copied, LatentsCopied)
            return self.executor.read_latents(image_slot, copied.num_tokens, copied.num_channels)

    async def decode(self, request: Request) -> Decoded:
        """Decode a finished request where its first member is, if that decodes."""
        with self._image_slot() as image_slot:
            (decoded,) = await self._run([self._decode(request, image_slot)])
        assert isinstance(decoded, Decoded)
        return decoded

    def _encode(self, request: Request) -> tuple[GroupCommand, Members]:
        command = encode_command(request, next(self._ids), self._input_slot(request) if request.inputs else None)
        request.planned_state_id = command.state_id
        return command, request.planned_holders

    def _decode(self, request: Request, image_slot: int) -> tuple[GroupCommand, Members]:
        device_id = self._able_at_best("decode", request.planned_holders[0])
        return decode_command(request, next(self._ids), device_id, image_slot), (device_id,)

    def _next_chunk(self, request: Request, members: Members, num_steps: int) -> tuple[GroupCommand, Members]:
        chunk = Assignment(request_id=request.request_id, stage="denoise", members=members, chunk_steps=num_steps)
        command = denoise_command(request, next(self._ids), 0, chunk)
        request.planned_holders = members
        request.planned_step_index += num_steps
        request.planned_chunk_index += 1
        return command, members

    def _input_slot(self, request: Request) -> int:
        """With what the request brings, which is the same for all of its shape, until the commands are run."""
        shape = request.params.shape
        if shape not in self._input_slots:
            input_slot = self.executor.put_pictures(request.inputs)
            assert input_slot is not None, "an idle engine has free input slots"
            self._input_slots[shape] = input_slot
        return self._input_slots[shape]

    @contextmanager
    def _image_slot(self) -> Iterator[int]:
        image_slot = self.executor.acquire_image_slot()
        assert image_slot is not None, "an idle engine has free image slots"
        try:
            yield image_slot
        finally:
            self.executor.release_image_slot(image_slot)

    async def _run(self, commands: Sequence[tuple[GroupCommand, Members]]) -> list[Event]:
        """Give commands and wait for every member's answer. Raises GenerationError if one fails."""
        answers: list[Event] = []
        due = 0
        for command, members in commands:
            while not self.executor.submit(command, members):  # its ring is full
                await self._collect(answers, at_least=len(answers) + 1)
            due += len(members)
        await self._collect(answers, at_least=due)
        while self._input_slots:
            self.executor.release_input_slot(self._input_slots.popitem()[1])
        return answers

    async def _collect(self, answers: list[Event], at_least: int) -> None:
        while len(answers) < at_least:
            for event in self.executor.poll():
                if isinstance(event, WorkerLost):
                    raise GenerationError(f"worker {event.device_id} ended while measuring: {event.reason}")
                if isinstance(event, Failed):
                    raise GenerationError(f"worker {event.device_id} failed while measuring: {event.message}")
                assert not isinstance(event, WorkerReady | PictureReady), "nobody replaces a worker while measuring"
                answers.append(event)
            if len(answers) < at_least:
                await self.executor.wait(None)


def chunk_times(events: Sequence[Event], chunk_steps: Sequence[int]) -> list[ChunkTimes]:
    """The members' answers, by chunk in the order of the commands; `chunk_steps` in the same order."""
    by_command: dict[int, list[Denoised]] = {}
    for event in events:
        if isinstance(event, Denoised):
            by_command.setdefault(event.command_id, []).append(event)
    return [
        ChunkTimes(
            num_steps=num_steps,
            started_s=min(event.started_s for event in members),
            entered_s=max(event.started_s + event.waited_s for event in members),
            ended_s=max(event.ended_s for event in members),
            net_s=max(event.ended_s - event.started_s - event.waited_s for event in members),
        )
        for (_, members), num_steps in zip(sorted(by_command.items()), chunk_steps, strict=True)
    ]
