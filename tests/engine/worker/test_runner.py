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
Commands = list[tuple[tuple[int, ...], Command]]
"""Who gets it, and the command."""
Latents = npt.NDArray[np.float32]
KINDS: tuple[BackendKind, ...] = ("cpu", "gpu")
if has_gpu_exchange():
    import tests.engine.parallel.quick_interpreter  # noqa: F401

needs_gpu_exchange = pytest.mark.skipif(not has_gpu_exchange(), reason="GpuBackend's SharedResources is missing")
on_both = pytest.mark.parametrize("kind", ["cpu", pytest.param("gpu", marks=needs_gpu_exchange)])
pytestmark = pytest.mark.usefixtures("one_thread")


def request_commands(
    params: Params,
    chunks: Sequence[Chunk],
    first: int = 0,
    state_id: int = 5,
    step_index: int = 0,
    chunk_index: int = 0,
    input_slot: int | None = None,
) -> Commands:
    """A whole request, or what is left of it when it goes on from saved latents."""
    ids = itertools.count(10)
    common = {"request_id": "r", "state_id": state_id, "slot": SLOT, "params": params}
    prompts = {"prompt": "a red circle", "negative_prompt": "a square"}
    encode = EncodePrompt(
        command_id=next(ids),
        step_index=step_index,
        chunk_index=chunk_index,
        input_slot=input_slot,
        **prompts,
        **common,
    )
    commands: Commands = [((first,), encode)]
    holders = (first,)
    for members, chunk_steps in chunks:
        denoise = Denoise(
            command_id=next(ids),
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
        commands.append((members, denoise))
        holders, step_index, chunk_index = members, step_index + chunk_steps, chunk_index + 1
    common |= {"chunk_index": chunk_index}
    commands.append((holders[:1], CopyLatents(command_id=next(ids), image_slot=0, **common)))
    decode = Decode(command_id=next(ids), source=holders[0], image_slot=1, **common)
    return [*commands, (holders[:1], decode)]


def run_alone(kind: BackendKind, memory: Memory, params: Params, chunks: Sequence[Chunk]) -> list[Event]:
    commands = [command for _, command in request_commands(params, chunks)]
    return answers_of(kind, memory.spec(0), [LOAD, *commands])


def run_together(
    kind: BackendKind, memory: Memory, params: Params, chunks: Sequence[Chunk], first: int = 0
) -> list[list[Event]]:
    return run_commands(kind, memory, request_commands(params, chunks, first))


def run_commands(kind: BackendKind, memory: Memory, commands: Commands) -> list[list[Event]]:
    """Every device's answers; each is a forked process."""
    context = multiprocessing.get_context("fork")
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


SAVING: list[tuple[list[Chunk], int]] = [
    ([((0,), 1), ((0,), 1)], 1),
    ([((1, 0), 1), ((0, 1), 1)], 2),
]
SAVING_CASES = [
    pytest.param(kind, *case, marks=[needs_gpu_exchange] if kind == "gpu" else [], id=f"{kind}, degree {case[1]}")
    for kind in KINDS
    for case in SAVING
]


@pytest.mark.parametrize(("kind", "chunks", "num_devices"), SAVING_CASES)
def test_each_chunks_first_member_saves_its_end_and_a_request_goes_on_from_that(
    tiny_model: ModelSpec, kind: BackendKind, chunks: list[Chunk], num_devices: int
) -> None:
    """Each end, bit for bit, and the same picture from any of them, on other workers; fewer rows than a slot has."""
    params = request_params(tiny_model, sum(num_steps for _, num_steps in chunks), num_branches=2)
    memory = Memory(tiny_model, num_devices)
    run_well(kind, memory, request_commands(params, chunks))
    expected_latents, expected_picture = latents(memory), picture(memory)
    np.testing.assert_array_equal(saved(memory, len(chunks)), expected_latents)
    saved_states = {number: saved(memory, number) for number in range(1, len(chunks) + 1)}
    for number in range(1, len(chunks)):
        later, steps = Memory(tiny_model, num_devices), sum(num_steps for _, num_steps in chunks[:number])
        later.saved.view(SLOT, number, saved_states[number].shape)[:] = saved_states[number]
        rest = request_commands(params, chunks[number:], num_devices - 1, 9, steps, number)
        run_well(kind, later, rest)
        np.testing.assert_array_equal(latents(later), expected_latents)
        np.testing.assert_array_equal(picture(later), expected_picture)
        for following in range(number + 1, len(chunks) + 1):
            np.testing.assert_array_equal(saved(later, following), saved_states[following])


def run_well(kind: BackendKind, memory: Memory, commands: Commands) -> None:
    """A lone device is this process."""
    if memory.num_devices == 1:
        assert_all_well(answers_of(kind, memory.spec(0), [LOAD, *(command for _, command in commands)]))
        return
    for events in run_commands(kind, memory, commands):
        assert_all_well(events)


def saved(memory: Memory, chunk_index: int) -> Latents:
    """A copy of what was saved of a request that has so many chunks behind it. Slots and rows that are not the
    request's must be as they were."""
    tokens, width = memory.model.sizes.num_rows(WIDTH, HEIGHT), memory.model.latents.width
    most = memory.layout.state_bytes // 4 // width
    assert tokens < most
    whole = memory.saved.view(SLOT, chunk_index, (most, width))
    assert not whole[tokens:].any() and not memory.saved.view(0, chunk_index, (most, width)).any()
    return whole[:tokens].copy()


@on_both
def test_a_chunk_that_fails_leaves_what_was_saved_before_it(tiny_model: ModelSpec, kind: BackendKind) -> None:
    """Two chunks are in flight whose other member never comes; both are aborted."""
    memory, params, before = Memory(tiny_model, 2), request_params(tiny_model, 3), []
    (_, encode), (_, done), *lost, _, _ = request_commands(params, [((0,), 1), ((0, 1), 1), ((0, 1), 1)])

    def commands() -> Iterator[Command]:
        yield from (LOAD, encode, done)
        yield ResetBarriers(command_id=8)  # answered once all before it is done
        before.append(saved(memory, 1))
        AbortWords(memory.control.view, 2).set(0)
        yield from (command for _, command in lost)

    events = answers_of(kind, memory.spec(0), commands())
    assert [event.kind for event in events if isinstance(event, Failed)] == ["aborted", "aborted"]
    np.testing.assert_array_equal(saved(memory, 1), before[0])
    assert before[0].any()


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
    too_late = msgspec.structs.replace(denoise, chunk_index=1)  # that buffer has the state after the step
    events = answers_of(kind, memory.spec(0), [LOAD, too_wide, encode, denoise, too_late, Ping(command_id=99)])
    assert [type(event) for event in events] == [Loaded, Failed, Encoded, Denoised, Failed, Pong]
    assert [event.kind for event in events if isinstance(event, Failed)] == ["error", "error"]
