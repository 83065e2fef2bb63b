"""Any resize schedule gives degree 1's latents, bit for bit: grow, shrink, permute, move to disjoint members."""

import asyncio
import itertools
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tetrion.engine.config import EngineConfig, parse_devices
from tetrion.engine.executor import WorkerLost
from tetrion.engine.messages import CopyLatents, Denoise, EncodePrompt, Failed, GroupCommand, LatentsCopied
from tetrion.engine.model_spec import read_model_spec
from tetrion.engine.models.locate import resolve_model
from tetrion.engine.process_executor import ProcessExecutor

NUM_DEVICES = 4
NUM_STEPS = 5
SPEC = read_model_spec(resolve_model("shapes"))
Schedule = list[tuple[tuple[int, ...], int]]
"""Chunks: (members, steps)."""


class Bench:
    """Runs one request over explicit groups, without planner or loop."""

    def __init__(self) -> None:
        self._runner = asyncio.Runner()
        self._ids = itertools.count(1000)
        config = EngineConfig(devices=f"cpu:{NUM_DEVICES}", num_threads=1, max_inflight=4)
        self._executor = ProcessExecutor(parse_devices(config.devices), SPEC, config)
        self._runner.run(self._executor.start())

    def close(self) -> None:
        self._runner.run(self._executor.close())
        self._runner.close()

    def latents(self, size: tuple[int, int], slot: int, first: int, schedule: Schedule) -> npt.NDArray[np.float32]:
        """Encode on `first`, denoise by `schedule` (all chunks queued at once), and fetch what rank 0 holds."""
        return self._runner.run(self._latents(size, slot, first, schedule))

    async def _latents(
        self, size: tuple[int, int], slot: int, first: int, schedule: Schedule
    ) -> npt.NDArray[np.float32]:
        width, height = size
        state_id = next(self._ids)
        common = {"request_id": "r", "state_id": state_id, "slot": slot, "width": width, "height": height}
        due = [self._submit(EncodePrompt(command_id=next(self._ids), prompt="a ring", seed=3, **common), (first,))]
        holders, step_index = (first,), 0
        for members, chunk_steps in schedule:
            chunk = Denoise(
                command_id=next(self._ids),
                round_id=0,
                members=members,
                holders=holders,
                source=holders[-1],
                step_index=step_index,
                chunk_steps=chunk_steps,
                num_steps=NUM_STEPS,
                guidance=0.0,
                **common,
            )
            due.append(self._submit(chunk, members))
            holders, step_index = members, step_index + chunk_steps
        image_slot = self._executor.acquire_image_slot()
        assert image_slot is not None
        copy = CopyLatents(command_id=next(self._ids), image_slot=image_slot, **common)
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


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    running = Bench()
    yield running
    running.close()


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    degrees = SPEC.legal_degrees(NUM_DEVICES)
    chunks: Schedule = []
    left = NUM_STEPS
    while left:
        members = tuple(draw(st.permutations(range(NUM_DEVICES)))[: draw(st.sampled_from(degrees))])
        steps = draw(st.integers(1, left))
        chunks.append((members, steps))
        left -= steps
    return chunks


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_every_schedule_gives_the_latents_of_degree_1(bench: Bench, data: st.DataObject) -> None:
    size = data.draw(st.sampled_from([(128, 128), (144, 128), (128, 208), (256, 256)]))
    slot, first = data.draw(st.integers(0, 3)), data.draw(st.integers(0, NUM_DEVICES - 1))
    expected = bench.latents(size, 0, 0, [((0,), NUM_STEPS)])
    assert np.isfinite(expected).all() and expected.std() > 0
    latents = bench.latents(size, slot, first, data.draw(schedules()))
    np.testing.assert_array_equal(latents, expected)


def test_moving_to_disjoint_members_and_back(bench: Bench) -> None:
    expected = bench.latents((256, 256), 0, 0, [((0,), NUM_STEPS)])
    moves: Schedule = [((0, 1), 1), ((2, 3), 1), ((1, 0), 1), ((3,), 1), ((0, 1, 2), 1)]
    np.testing.assert_array_equal(bench.latents((256, 256), 1, 3, moves), expected)


def test_a_resized_request_equals_diffusers(bench: Bench) -> None:
    """FluxPipeline on the same weights, seed and steps: within 1e-4 of its latents."""
    import torch
    from diffusers import FluxPipeline

    pipeline = FluxPipeline.from_pretrained(SPEC.path, torch_dtype=torch.float32, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    (reference,) = pipeline(
        "a ring",
        width=208,
        height=128,
        num_inference_steps=NUM_STEPS,
        max_sequence_length=SPEC.max_text_tokens,
        generator=torch.Generator("cpu").manual_seed(3),
        output_type="latent",
    ).images
    latents = bench.latents((208, 128), 2, 1, [((1,), 1), ((3, 0, 2), 1), ((2, 1), 1), ((0, 1, 2, 3), 2)])
    np.testing.assert_allclose(latents, reference.numpy(), rtol=0, atol=1e-4)
