"""Pictures on either kind of device: encoded from the input slab, and no degree changes a bit of what comes of them."""

from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
import torch

from tests.engine.worker.conftest import CONFIGS, BackendKind, Memory, answers_of, make_model, request_params
from tests.engine.worker.test_runner import (
    HEIGHT,
    KINDS,
    LOAD,
    NUM_STEPS,
    WIDTH,
    Chunk,
    assert_all_well,
    has_gpu_exchange,
    latents,
    needs_gpu_exchange,
    request_commands,
    run_commands,
)
from tetrion.engine.model_spec import ModelSpec
from tetrion.engine.params import Params

pytestmark = pytest.mark.usefixtures("one_thread")
KONTEXT, FILL, BEGIN = "FluxKontextPipeline", "FluxFillPipeline", "FluxPipeline"
INPUT_SLOT, REFERENCE = 1, (8, 24)


class Editing(NamedTuple):
    """A request that brings pictures."""

    spec: ModelSpec
    params: Params

    @property
    def pictures(self) -> list[npt.NDArray[np.uint8]]:
        generator = np.random.default_rng(1)
        shapes = self.params.shape.inputs
        return [
            generator.integers(0, 256, shape, np.uint8) // (1 if shape[2] == 3 else 128) * (255 if shape[2] == 1 else 1)
            for shape in shapes
        ]

    def memory(self, num_devices: int) -> Memory:
        memory = Memory(self.spec, num_devices)
        memory.inputs.write_all(INPUT_SLOT, self.pictures)
        return memory


@pytest.fixture(scope="module")
def requests(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Editing]:
    made = {}
    for pipeline in (KONTEXT, FILL, BEGIN):
        configs = CONFIGS | {"model_index.json": {"_class_name": pipeline}}
        if pipeline == FILL:
            transformer = CONFIGS["transformer/config.json"] | {"in_channels": 16 + 16 + 16, "out_channels": 16}
            configs |= {"transformer/config.json": transformer}
        spec = make_model(Path(tmp_path_factory.mktemp("model")) / "tiny", configs)
        params = request_params(spec, NUM_STEPS)
        if pipeline == KONTEXT:
            assert REFERENCE in spec.reference_sizes
            shape = spec.shape(WIDTH, HEIGHT, references=(REFERENCE,))
        else:
            shape = msgspec.structs.replace(params.shape, pictures=1, has_mask=pipeline == FILL)
        skipped = 0 if pipeline == KONTEXT else 1
        made[pipeline] = Editing(spec, msgspec.structs.replace(params, shape=shape, skipped_steps=skipped))
    return made


@pytest.fixture(scope="module")
def alone(requests: dict[str, Editing]) -> dict[tuple[BackendKind, str], npt.NDArray[np.float32]]:
    torch.set_num_threads(1)
    found = {}
    for kind in KINDS if has_gpu_exchange() else KINDS[:1]:
        for pipeline, editing in requests.items():
            memory = editing.memory(1)
            chunks: list[Chunk] = [((0,), NUM_STEPS)]
            commands = [command for _, command in request_commands(editing.params, chunks, input_slot=INPUT_SLOT)]
            assert_all_well(answers_of(kind, memory.spec(0), [LOAD, *commands]))
            found[kind, pipeline] = latents(memory)
    return found


@needs_gpu_exchange
@pytest.mark.parametrize("pipeline", [KONTEXT, FILL, BEGIN])
def test_both_kinds_of_device_make_the_same_of_a_picture(alone, pipeline: str) -> None:
    np.testing.assert_allclose(alone["gpu", pipeline], alone["cpu", pipeline], rtol=0, atol=1e-4)


@pytest.mark.parametrize("pipeline", [KONTEXT, FILL, BEGIN])
def test_another_picture_makes_another_result(requests: dict[str, Editing], alone, pipeline: str) -> None:
    editing = requests[pipeline]
    memory = editing.memory(1)
    memory.inputs.write_all(INPUT_SLOT, [255 - picture for picture in editing.pictures])
    commands = request_commands(editing.params, [((0,), NUM_STEPS)], input_slot=INPUT_SLOT)
    assert_all_well(answers_of("cpu", memory.spec(0), [LOAD, *[command for _, command in commands]]))
    assert not np.array_equal(latents(memory), alone["cpu", pipeline])


@pytest.mark.parametrize("pipeline", [KONTEXT, FILL])
@pytest.mark.parametrize("kind", ["cpu", pytest.param("gpu", marks=needs_gpu_exchange)])
def test_members_and_resizes_change_no_bit(
    requests: dict[str, Editing], alone, kind: BackendKind, pipeline: str
) -> None:
    """Members that join pull what the picture means from one that has it."""
    editing = requests[pipeline]
    memory = editing.memory(3)
    commands = request_commands(editing.params, [((2, 0), 1), ((0, 1, 2), 1)], first=1, input_slot=INPUT_SLOT)
    for events in run_commands(kind, memory, commands):
        assert_all_well(events)
    np.testing.assert_array_equal(latents(memory), alone[kind, pipeline])
