"""A GPU worker's commands, with kernels interpreted: like the CPU worker's, at any degree and for any members."""

import itertools
import multiprocessing
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from tests.engine.worker.conftest import Memory, answers_of
from tetrion.engine.messages import (
    Command,
    CopyLatents,
    Decode,
    Decoded,
    Denoise,
    Denoised,
    Encoded,
    EncodePrompt,
    Event,
    Failed,
    LatentsCopied,
    Loaded,
    LoadWeights,
    ResetBarriers,
)
from tetrion.engine.model_spec import ModelSpec
from tetrion.engine.parallel.words import AbortWords
from tetrion.engine.params import Params
from tetrion.engine.shape import StepShape
from tetrion.engine.worker.entry import execute
from tetrion.engine.worker.runner import Runner

WIDTH, HEIGHT, NUM_STEPS, SLOT = 20, 8, 2, 1
SHAPE = StepShape(width=WIDTH, height=HEIGHT, image=10, text=(4,))
PARAMS = Params(model="tiny", shape=SHAPE, num_steps=NUM_STEPS, guidance=2.5, seed=3)
LOAD = LoadWeights(command_id=1, publish=True)
Chunk = tuple[tuple[int, ...], int]
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="for Triton's interpreter"),
]


def request_commands(chunks: Sequence[Chunk], first: int = 0) -> list[tuple[tuple[int, ...], Command]]:
    """A whole request as (who gets it, command)."""
    ids = itertools.count(10)
    common = {"request_id": "r", "state_id": 5, "slot": SLOT, "params": PARAMS}
    encode = EncodePrompt(command_id=next(ids), prompt="a red circle", **common)
    commands: list[tuple[tuple[int, ...], Command]] = [((first,), encode)]
    holders, step_index = (first,), 0
    for members, chunk_steps in chunks:
        denoise = Denoise(
            command_id=next(ids),
            round_id=0,
            members=members,
            holders=holders,
            source=holders[-1],
            step_index=step_index,
            chunk_steps=chunk_steps,
            **common,
        )
        commands.append((members, denoise))
        holders, step_index = members, step_index + chunk_steps
    commands.append((holders[:1], CopyLatents(command_id=next(ids), image_slot=0, **common)))
    decode = Decode(command_id=next(ids), source=holders[0], image_slot=1, **common)
    return [*commands, (holders[:1], decode)]


def run_alone(memory: Memory, chunks: Sequence[Chunk]) -> list[Event]:
    commands = [command for _, command in request_commands(chunks)]
    return answers_of(memory.spec(0), [LOAD, *commands])


def run_together(memory: Memory, chunks: Sequence[Chunk], first: int = 0) -> list[list[Event]]:
    """Every device's answers; each is a forked process."""
    context, commands = multiprocessing.get_context("fork"), request_commands(chunks, first)
    pipes = []
    for device_id in range(memory.num_devices):
        own = [LOAD, *(command for members, command in commands if device_id in members)]
        ours, theirs = context.Pipe()
        spec = memory.spec(device_id)
        process = context.Process(target=lambda spec=spec, own=own, to=theirs: to.send(answers_of(spec, own)))
        process.start()
        pipes.append((process, ours))
    answers = []
    for process, pipe in pipes:
        assert pipe.poll(60), "a worker does not answer"
        answers.append(pipe.recv())
        process.join(10)
    return answers


def latents(memory: Memory) -> npt.NDArray[np.float32]:
    tokens = memory.model.sizes.num_rows(WIDTH, HEIGHT)
    return memory.images.read(0, (tokens, memory.model.in_channels), np.float32)


def picture(memory: Memory) -> npt.NDArray[np.uint8]:
    return memory.images.read(1, (HEIGHT, WIDTH, 3))


def assert_all_well(events: Sequence[Event]) -> None:
    assert not [event for event in events if isinstance(event, Failed)]


@pytest.fixture(scope="module")
def reference(tiny_model: ModelSpec) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.uint8]]:
    """Latents and picture of the CPU worker."""
    memory = Memory(tiny_model, 1)
    with torch.no_grad():
        runner = Runner(memory.spec(0))
        for command in [LOAD, *(command for _, command in request_commands([((0,), NUM_STEPS)]))]:
            assert not isinstance(execute(runner, command, 0), Failed)
    return latents(memory), picture(memory)


@pytest.fixture(scope="module")
def alone(tiny_model: ModelSpec) -> npt.NDArray[np.float32]:
    """Latents at degree 1, in one chunk."""
    memory = Memory(tiny_model, 1)
    assert_all_well(run_alone(memory, [((0,), NUM_STEPS)]))
    return latents(memory)


def test_a_request_is_answered_like_a_cpu_workers(tiny_model: ModelSpec, reference, alone) -> None:
    memory = Memory(tiny_model, 1)
    events = run_alone(memory, [((0,), 1)] * NUM_STEPS)
    assert [type(event) for event in events] == [Loaded, Encoded, Denoised, Denoised, LatentsCopied, Decoded]
    loaded, encoded, first, second, copied, _ = events
    assert isinstance(loaded, Loaded) and loaded.weights_bytes > 100_000
    assert isinstance(encoded, Encoded) and encoded.num_text_tokens == 4
    assert isinstance(first, Denoised) and isinstance(second, Denoised) and isinstance(copied, LatentsCopied)
    assert (first.step_index, second.step_index) == (1, NUM_STEPS)
    assert (copied.num_tokens, copied.num_channels) == (10, 16)
    assert first.started_s + first.waited_s <= first.ended_s <= second.started_s <= second.ended_s
    expected_latents, expected_picture = reference
    assert expected_latents.std() > 0.5
    np.testing.assert_allclose(latents(memory), expected_latents, rtol=0, atol=1e-4)
    np.testing.assert_array_equal(latents(memory), alone, "chunks show in the latents")
    assert np.abs(picture(memory).astype(int) - expected_picture).max() <= 1


@pytest.mark.parametrize(
    ("chunks", "first"),
    [
        ([((1, 2, 0), NUM_STEPS)], 0),
        ([((2, 0), 1), ((0, 1), 1)], 1),
    ],
)
def test_members_and_resizes_change_no_bit(tiny_model: ModelSpec, alone, chunks, first) -> None:
    """Heads (3) do not divide by 2, tokens (4 and 10) not by 3: uneven shares, and padding."""
    memory = Memory(tiny_model, 3)
    for events in run_together(memory, chunks, first):
        assert_all_well(events)
    np.testing.assert_array_equal(latents(memory), alone)


def test_in_bf16(tiny_model: ModelSpec, alone) -> None:
    """As on a GPU; latents stay in fp32 whatever the rest is in."""
    memory = Memory(tiny_model, 1, itemsize=2)
    assert_all_well(run_alone(memory, [((0,), NUM_STEPS)]))
    error = np.linalg.norm(latents(memory) - alone) / np.linalg.norm(alone)
    assert 0 < error < 0.005


def test_an_abort_fails_the_chunk_and_a_reset_heals(tiny_model: ModelSpec, alone) -> None:
    """The other member never comes: the engine's abort word ends the wait."""
    memory = Memory(tiny_model, 2)
    (_, encode), (_, lonely), *_ = request_commands([((0, 1), NUM_STEPS)])

    def commands() -> Iterator[Command]:
        yield from (LOAD, encode)
        AbortWords(memory.control.view, 2).set(0)
        yield from (lonely, ResetBarriers(command_id=9))
        yield from (command for _, command in request_commands([((0,), NUM_STEPS)]))

    events = answers_of(memory.spec(0), commands())
    failed = [event for event in events if isinstance(event, Failed)]
    assert [(event.kind, event.command_id) for event in failed] == [("aborted", lonely.command_id)]
    np.testing.assert_array_equal(latents(memory), alone)
