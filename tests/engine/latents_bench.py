"""Runs requests over explicit groups of real workers, without planner or loop, and fetches their latents."""

import asyncio
import itertools

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from tetrion.engine.config import EngineConfig, parse_devices
from tetrion.engine.executors.base import WorkerLost
from tetrion.engine.executors.processes import ProcessExecutor
from tetrion.engine.families.locate import resolve_model
from tetrion.engine.families.registry import read_model_spec
from tetrion.engine.messages import CopyLatents, Denoise, EncodePrompt, Failed, GroupCommand, LatentsCopied
from tetrion.engine.request import ImageRequest
from tetrion.engine.resolve import resolve_request

Schedule = list[tuple[tuple[int, ...], int]]
"""Chunks: (members, steps)."""


class LatentsBench:
    """`num_steps`: of every request."""

    def __init__(self, config: EngineConfig, num_steps: int) -> None:
        self.spec = read_model_spec(resolve_model(config.models[0]), config.load_format)
        self.num_steps = num_steps
        self._runner = asyncio.Runner()
        self._ids = itertools.count(1000)
        self._executor = ProcessExecutor(parse_devices(config.devices), [self.spec], config)
        self._runner.run(self._executor.start())

    @property
    def num_devices(self) -> int:
        return len(self._executor.device_ids)

    def close(self) -> None:
        self._runner.run(self._executor.close())
        self._runner.close()

    def alone(self, size: tuple[int, int]) -> npt.NDArray[np.float32]:
        """Latents of the request at degree 1, in one chunk."""
        return self.latents(size, 0, 0, [((0,), self.num_steps)])

    def latents(self, size: tuple[int, int], slot: int, first: int, schedule: Schedule) -> npt.NDArray[np.float32]:
        """Encode on `first`, denoise by `schedule` (all chunks queued at once), and fetch what rank 0 holds."""
        return self._runner.run(self._latents(size, slot, first, schedule))

    async def _latents(
        self, size: tuple[int, int], slot: int, first: int, schedule: Schedule
    ) -> npt.NDArray[np.float32]:
        asked = ImageRequest(prompt="a ring", seed=3, width=size[0], height=size[1], num_steps=self.num_steps)
        params = resolve_request(asked, self.spec, self.num_devices).params
        state_id = next(self._ids)
        common = {"request_id": "r", "state_id": state_id, "slot": slot, "params": params}
        due = [self._submit(EncodePrompt(command_id=next(self._ids), prompt=asked.prompt, **common), (first,))]
        holders, step_index = (first,), 0
        for chunk_index, (members, chunk_steps) in enumerate(schedule):
            chunk = Denoise(
                command_id=next(self._ids),
                round_id=0,
                source_state_id=state_id,
                members=members,
                holders=holders,
                source=holders[-1],
                step_index=step_index,
                chunk_index=chunk_index,
                chunk_steps=chunk_steps,
                **common,
            )
            due.append(self._submit(chunk, members))
            holders, step_index = members, step_index + chunk_steps
        image_slot = self._executor.acquire_image_slot()
        assert image_slot is not None
        copy = CopyLatents(command_id=next(self._ids), chunk_index=len(schedule), image_slot=image_slot, **common)
        due.append(self._submit(copy, holders[:1]))
        copied = await self._answers(sum(due))
        latents = self._executor.read_latents(image_slot, copied.num_tokens, copied.num_channels)
        self._executor.release_image_slot(image_slot)
        return latents

    def _submit(self, command: GroupCommand, members: tuple[int, ...]) -> int:
        assert self._executor.submit(command, members)
        return len(members)

    async def _answers(self, due: int) -> LatentsCopied:
        copied = None
        while due:
            for event in self._executor.poll():
                assert not isinstance(event, (Failed, WorkerLost)), event
                due -= 1
                copied = event if isinstance(event, LatentsCopied) else copied
            if due:
                await asyncio.wait_for(self._executor.wait(None), 60)
        assert copied is not None
        return copied


@st.composite
def schedules(draw: st.DrawFn, bench: LatentsBench) -> Schedule:
    """Any chunks of any groups that add up to all steps."""
    num_devices = bench.num_devices
    degrees = bench.spec.legal_degrees(num_devices)
    chunks: Schedule = []
    left = bench.num_steps
    while left:
        members = tuple(draw(st.permutations(range(num_devices)))[: draw(st.sampled_from(degrees))])
        steps = draw(st.integers(1, left))
        chunks.append((members, steps))
        left -= steps
    return chunks
