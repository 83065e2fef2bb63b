"""A worker's commands on either kind of device: any degree, members and chunks give the same bits."""

import itertools
import multiprocessing
from collections.abc import Iterator, Sequence

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
import torch

from tests.engine.worker.conftest import BackendKind, Memory, answers_of, has_gpu_exchange, request_params
from tetrion.engine.messages import (
    BarriersReset,
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
    Ping,
    Pong,
    ResetBarriers,
)
from tetrion.engine.model_spec import ModelSpec
from tetrion.engine.parallel.words import AbortWords
from tetrion.engine.params import Params

WIDTH, HEIGHT, NUM_STEPS, SLOT = 20, 8, 2, 1
LOAD = LoadWeights(command_id=1, publish=True)
Chunk = tuple[tuple[int, ...], int]
Latents = npt.NDArray[np.float32]
KINDS: tuple[BackendKind, ...] = ("cpu", "gpu")
if has_gpu_exchange():
    import tests.engine.parallel.quick_interpreter  # noqa: F401

needs_gpu_exchange = pytest.mark.skipif(not has_gpu_exchange(), reason="GpuBackend's SharedResources is missing")
on_both = pytest.mark.parametrize("kind", ["cpu", pytest.param("gpu", marks=needs_gpu_exchange)])
pytestmark = pytest.mark.usefixtures("one_thread")


def request_commands(
    params: Params, chunks: Sequence[Chunk], first: int = 0, state_id: int = 5
) -> list[tuple[tuple[int, ...], Command]]:
    """A whole request as (who gets it, command)."""
    ids = itertools.count(10)
    common = {"request_id": "r", "state_id": state_id, "slot": SLOT, "params": params}
    encode = EncodePrompt(command_id=next(ids), prompt="a red circle", negative_prompt="a square", **common)
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


def run_alone(kind: BackendKind, memory: Memory, params: Params, chunks: Sequence[Chunk]) -> list[Event]:
    commands = [command for _, command in request_commands(params, chunks)]
    return answers_of(kind, memory.spec(0), [LOAD, *commands])


def run_together(
    kind: BackendKind, memory: Memory, params: Params, chunks: Sequence[Chunk], first: int = 0
) -> list[list[Event]]:
    """Every device's answers; each is a forked process."""
    context, commands = multiprocessing.get_context("fork"), request_commands(params, chunks, first)
    pipes = []
    for device_id in range(memory.num_devices):
        own = [LOAD, *(command for members, command in commands if device_id in members)]
        ours, theirs = context.Pipe()
        spec = memory.spec(device_id)
        process = context.Process(target=lambda spec=spec, own=own, to=theirs: to.send(answers_of(kind, spec, own)))
        process.start()
        pipes.append((process, ours))
    answers = []
    for process, pipe in pipes:
        assert pipe.poll(100), "a worker does not answer"
        answers.append(pipe.recv())
        process.join(10)
    return answers


def latents(memory: Memory) -> Latents:
    tokens = memory.model.sizes.num_rows(WIDTH, HEIGHT)
    return memory.images.read(0, (tokens, memory.model.latents.width), np.float32)


def picture(memory: Memory) -> npt.NDArray[np.uint8]:
    return memory.images.read(1, (HEIGHT, WIDTH, 3))


def assert_all_well(events: Sequence[Event]) -> None:
    assert not [event for event in events if isinstance(event, Failed)]


@pytest.fixture(scope="module")
def alone(tiny_model: ModelSpec) -> dict[tuple[BackendKind, int], tuple[Latents, npt.NDArray[np.uint8]]]:
    """Latents and picture at degree 1, in one chunk, by kind of device and number of branches."""
    torch.set_num_threads(1)
    results = {}
    for kind in KINDS if has_gpu_exchange() else KINDS[:1]:
        for num_branches in (1, 2):
            memory, params = Memory(tiny_model, 1), request_params(tiny_model, NUM_STEPS, num_branches=num_branches)
            assert_all_well(run_alone(kind, memory, params, [((0,), NUM_STEPS)]))
            results[kind, num_branches] = latents(memory), picture(memory)
    return results


@on_both
def test_every_command_is_answered_and_chunks_do_not_show(tiny_model: ModelSpec, alone, kind: BackendKind) -> None:
    memory, params = Memory(tiny_model, 1), request_params(tiny_model, NUM_STEPS)
    events = run_alone(kind, memory, params, [((0,), 1)] * NUM_STEPS)
    assert [type(event) for event in events] == [Loaded, Encoded, Denoised, Denoised, LatentsCopied, Decoded]
    loaded, encoded, first, second, copied, _ = events
    assert isinstance(loaded, Loaded) and loaded.weights_bytes > 100_000
    assert isinstance(encoded, Encoded) and encoded.num_text_tokens == 4
    assert isinstance(first, Denoised) and isinstance(second, Denoised) and isinstance(copied, LatentsCopied)
    assert (first.step_index, second.step_index) == (1, NUM_STEPS)
    assert (copied.num_tokens, copied.num_channels) == (10, 16)
    assert first.started_s + first.waited_s <= first.ended_s <= second.started_s <= second.ended_s
    expected_latents, expected_picture = alone[kind, 1]
    assert expected_latents.std() > 0.5
    np.testing.assert_array_equal(latents(memory), expected_latents)
    np.testing.assert_array_equal(picture(memory), expected_picture)


@needs_gpu_exchange
@pytest.mark.parametrize("num_branches", [1, 2])
def test_both_kinds_of_device_draw_the_same_picture(alone, num_branches: int) -> None:
    (cpu_latents, cpu_picture), (gpu_latents, gpu_picture) = (alone[kind, num_branches] for kind in KINDS)
    np.testing.assert_allclose(gpu_latents, cpu_latents, rtol=0, atol=1e-4)
    assert np.abs(gpu_picture.astype(int) - cpu_picture).max() <= 1


def test_the_negative_prompt_shows(alone) -> None:
    assert np.abs(alone["cpu", 2][0] - alone["cpu", 1][0]).max() > 1e-3


SCHEDULES: list[tuple[list[Chunk], int]] = [
    ([((1, 2, 0), NUM_STEPS)], 0),
    ([((2, 0), 1), ((0, 1), 1)], 1),
    ([((2, 1), 1), ((1,), 1)], 1),
    ([((2, 1), 1), ((0, 1, 2), 1)], 0),
]
CASES = [
    pytest.param(kind, num_branches, *schedule, marks=[needs_gpu_exchange] if kind == "gpu" else [])
    for number, schedule in enumerate(SCHEDULES)
    for num_branches in (1, 2)
    for kind in KINDS
    if kind == "cpu" or num_branches == 2 - number % 2
]
"""Interpreted kernels take long: a GPU worker's code goes through each schedule once, with one branch or two."""


@pytest.mark.parametrize(("kind", "num_branches", "chunks", "first"), CASES)
def test_members_and_resizes_change_no_bit(
    tiny_model: ModelSpec, alone, kind: BackendKind, num_branches: int, chunks: list[Chunk], first: int
) -> None:
    """Heads (3) do not divide by 2, rows (4 and 10) not by 3: uneven shares, and padding. Two branches are evaluated
    apart by groups of two, else in turn."""
    memory, params = Memory(tiny_model, 3), request_params(tiny_model, NUM_STEPS, num_branches=num_branches)
    for events in run_together(kind, memory, params, chunks, first):
        assert_all_well(events)
    expected_latents, expected_picture = alone[kind, num_branches]
    np.testing.assert_array_equal(latents(memory), expected_latents)
    np.testing.assert_array_equal(picture(memory), expected_picture)


@on_both
def test_four_members_evaluate_two_branches_in_parts_of_two(tiny_model: ModelSpec, alone, kind: BackendKind) -> None:
    memory, params = Memory(tiny_model, 4), request_params(tiny_model, NUM_STEPS, num_branches=2)
    for events in run_together(kind, memory, params, [((3, 1, 0, 2), NUM_STEPS)]):
        assert_all_well(events)
    np.testing.assert_array_equal(latents(memory), alone[kind, 2][0])


@needs_gpu_exchange
def test_latents_stay_in_fp32_whatever_the_rest_is_in(tiny_model: ModelSpec, alone) -> None:
    """As on a GPU: everything else in bf16."""
    memory = Memory(tiny_model, 1, itemsize=2)
    assert_all_well(run_alone("gpu", memory, request_params(tiny_model, NUM_STEPS), [((0,), NUM_STEPS)]))
    expected = alone["gpu", 1][0]
    error = np.linalg.norm(latents(memory) - expected) / np.linalg.norm(expected)
    assert 0 < error < 0.005


@on_both
@pytest.mark.parametrize("num_branches", [1, 2])
def test_an_abort_fails_the_chunk_and_a_reset_heals(
    tiny_model: ModelSpec, alone, kind: BackendKind, num_branches: int
) -> None:
    """The other member never comes: the engine's abort word ends the wait."""
    memory, params = Memory(tiny_model, 2), request_params(tiny_model, NUM_STEPS, num_branches=num_branches)
    (_, encode), (_, lonely), *_ = request_commands(params, [((0, 1), NUM_STEPS)])

    def commands() -> Iterator[Command]:
        yield from (LOAD, encode)
        AbortWords(memory.control.view, 2).set(0)
        yield from (lonely, ResetBarriers(command_id=9))
        again = request_commands(params, [((0,), NUM_STEPS)], state_id=6)
        yield from (command for _, command in again)

    events = answers_of(kind, memory.spec(0), commands())
    failed = [event for event in events if isinstance(event, Failed)]
    assert [(event.kind, event.command_id) for event in failed] == [("aborted", lonely.command_id)]
    assert any(isinstance(event, BarriersReset) for event in events)
    np.testing.assert_array_equal(latents(memory), alone[kind, num_branches][0])


@on_both
def test_a_picture_of_what_is_no_number_fails_and_the_next_one_is_drawn(
    tiny_model: ModelSpec, alone, capfd: pytest.CaptureFixture[str], kind: BackendKind
) -> None:
    memory, params = Memory(tiny_model, 1), request_params(tiny_model, NUM_STEPS)
    overflown = msgspec.structs.replace(params, guidance=float("nan"))
    chunks = [((0,), NUM_STEPS)]
    bad = [command for _, command in request_commands(overflown, chunks)]
    good = [command for _, command in request_commands(params, chunks, state_id=6)]
    events = answers_of(kind, memory.spec(0), [LOAD, *bad, *good])
    (failed,) = (event for event in events if isinstance(event, Failed))
    assert (failed.command_id, failed.kind) == (bad[-1].command_id, "error")
    assert failed.message.startswith("its picture has values that are no numbers") and "bf16" in failed.message
    np.testing.assert_array_equal(picture(memory), alone[kind, 1][1])
    assert "Traceback" not in capfd.readouterr().err


@on_both
def test_a_command_that_fails_is_answered_and_the_worker_goes_on(tiny_model: ModelSpec, kind: BackendKind) -> None:
    memory, params = Memory(tiny_model, 1), request_params(tiny_model, NUM_STEPS)
    (_, encode), (_, denoise), *_ = request_commands(params, [((0,), 1)])
    assert isinstance(denoise, Denoise)
    too_wide = request_commands(request_params(tiny_model, NUM_STEPS, size=(4096, 4096)), [((0,), 1)])[0][1]
    events = answers_of(kind, memory.spec(0), [LOAD, too_wide, encode, denoise, denoise, Ping(command_id=99)])
    assert [type(event) for event in events] == [Loaded, Failed, Encoded, Denoised, Failed, Pong]
    assert [event.kind for event in events if isinstance(event, Failed)] == ["error", "error"]
