"""Pictures on their way to the worker that encodes them: slots come back whatever happens, and bytes are bounded."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.loop.test_loop import COSTS, SPEC, Simulation
from tests.engine.test_resolve_pictures import BEGINNER
from tetrion.engine.errors import EngineOverloaded, GenerationError
from tetrion.engine.executors.simulated import SimulatedExecutor
from tetrion.engine.loop import loop as loop_module
from tetrion.engine.messages import Command, EncodePrompt
from tetrion.engine.request import ImageRequest
from tetrion.engine.resolve import resolve_request

assert BEGINNER.name == SPEC.name, "whose costs are known"


class Slots(SimulatedExecutor):
    """With a few input slots, which are given back once, as real ones are."""

    def __init__(self, num_devices: int = 4, num_slots: int = 3, **options: Any) -> None:
        self.commands: list[Command] = []
        super().__init__(COSTS, num_devices, self._spied, **options)
        self.num_slots = num_slots
        self.free = set(range(num_slots))
        self.put: list[tuple[int, ...]] = []

    def _spied(self, command: Command, seconds: float) -> float:
        self.commands.append(command)
        return seconds

    def put_pictures(self, pictures: Sequence[Any]) -> int | None:
        if not self.free:
            return None
        self.put.append(tuple(int(picture.flat[0]) for picture in pictures))
        return self.free.pop()

    def release_input_slot(self, input_slot: int) -> None:
        assert input_slot not in self.free
        self.free.add(input_slot)

    @property
    def encodes(self) -> list[EncodePrompt]:
        return [command for command in self.commands if isinstance(command, EncodePrompt)]


class Editing(Simulation):
    """Every request brings a picture of one value, or none."""

    def __init__(self, executor: Slots, **options: Any) -> None:
        super().__init__(executor=executor, **options)
        self.slots = executor

    def request(self, request_id: str, at_s: float = 0.0, value: int | None = 1, **fields: object) -> None:
        given = {} if value is None else {"pictures": [np.full((128, 128, 3), value, np.uint8)], "strength": 0.5}
        fields = {"prompt": "x", "seed": 1, "request_id": request_id, "num_steps": 8} | given | fields
        resolved = resolve_request(ImageRequest(**fields), BEGINNER, 4)  # type: ignore[arg-type]
        self._due += 1
        self.executor.at(at_s, lambda: self.loop.submit(resolved) and None)

    def check_nothing_is_left(self) -> None:
        assert self.slots.free == set(range(self.slots.num_slots))
        assert len(self.loop.table) == 0 and self.loop.table.input_bytes == 0


def test_a_picture_is_put_for_its_encode_and_the_slot_is_free_behind_it() -> None:
    simulation = Editing(Slots())
    simulation.request("a", value=7)
    simulation.request("none", value=None)
    simulation.run()
    assert simulation.slots.put == [(7,)]
    slots = {command.request_id: command.input_slot for command in simulation.slots.encodes}
    assert slots["none"] is None and slots["a"] is not None
    assert len(simulation.results["a"].degrees) == 4 and len(simulation.results["none"].degrees) == 8
    simulation.check_nothing_is_left()


def test_requests_wait_for_a_slot_and_none_is_lost() -> None:
    simulation = Editing(Slots(num_slots=1))
    names = [f"r{i}" for i in range(12)]
    for i, name in enumerate(names):
        simulation.request(name, value=i)
    simulation.run()
    assert set(simulation.results) == set(names)
    assert sorted(simulation.slots.put) == [(i,) for i in range(12)]
    simulation.check_nothing_is_left()


def test_a_slot_that_never_comes_fails_the_request_alone() -> None:
    simulation = Editing(Slots(num_slots=0))
    simulation.request("picture")
    simulation.request("none", value=None)
    simulation.run()
    assert set(simulation.results) == {"none"}
    assert isinstance(simulation.failures["picture"], GenerationError)
    assert "no room for the pictures that it brings" in str(simulation.failures["picture"])


@settings(deadline=None)
@given(
    losses=st.lists(st.tuples(st.integers(0, 3), st.floats(0.0, 0.5)), max_size=4),
    cancelled_s=st.floats(0.0, 0.3),
    num_slots=st.integers(1, 4),
)
def test_slots_come_back_whoever_dies_and_whoever_gives_up(
    losses: list[tuple[int, float]], cancelled_s: float, num_slots: int
) -> None:
    executor = Slots(num_slots=num_slots, respawn_s=0.5)
    simulation = Editing(executor)
    for i in range(6):
        simulation.request(f"r{i}", at_s=0.03 * i, value=i)
    for device, at_s in losses:
        executor.at(at_s, lambda device=device: executor.kill(device, "test"))  # type: ignore[misc]
    executor.at(cancelled_s, lambda: simulation.loop.cancel("r0"))
    simulation.run()
    assert set(simulation.results) | set(simulation.failures) == {f"r{i}" for i in range(6)}
    simulation.check_nothing_is_left()


def test_what_is_lost_with_its_only_holder_is_encoded_again_with_its_picture() -> None:
    executor = Slots(num_devices=1, respawn_s=0.2)
    simulation = Editing(executor)
    simulation.request("a", value=9)
    executor.at(0.02, lambda: executor.kill(0, "test"))
    simulation.run()
    assert "a" in simulation.results and simulation.slots.put == [(9,), (9,)]
    assert [command.input_slot is not None for command in executor.encodes] == [True, True]
    simulation.check_nothing_is_left()


def test_pictures_of_living_requests_have_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop_module, "MAX_INPUT_BYTES", 2 * 3 * 128 * 128)
    simulation = Editing(Slots())
    refused: list[Exception] = []

    def submit_third() -> None:
        try:
            asked = ImageRequest(prompt="x", pictures=(np.zeros((128, 128, 3), np.uint8),), request_id="c")
            simulation.loop.submit(resolve_request(asked, BEGINNER, 4))
        except EngineOverloaded as error:
            refused.append(error)

    simulation.request("a")
    simulation.request("b")
    simulation.request("later", at_s=5.0)
    simulation.executor.at(0.001, submit_third)
    simulation.run()
    assert len(refused) == 1 and "pictures of living requests hold 98304 of 98304 bytes" in str(refused[0])
    assert {"a", "b", "later"} <= set(simulation.results)
