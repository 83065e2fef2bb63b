"""A request that was hit twice runs alone: on a device that holds nothing else, at degree 1, one such at a time."""

import pytest

from tests.engine.loop.test_loop import COSTS, Simulation
from tetrion.engine.executors.simulated import SimulatedExecutor
from tetrion.engine.loop.loop import EngineLoop
from tetrion.engine.messages import Command, Denoise, ResetBarriers, StageCommand
from tetrion.engine.request import MAX_ATTEMPTS


class Poisoned(SimulatedExecutor):
    """Devices die of the steps of requests whose name begins with `poison`, the first `num_deaths` times."""

    loop: EngineLoop

    def __init__(self, num_devices: int, num_deaths: int) -> None:
        super().__init__(COSTS, num_devices, respawn_s=0.5)
        self._left = num_deaths
        self.alone: list[str] = []
        self.not_alone: list[str] = []

    def submit(self, command: Command, members: tuple[int, ...]) -> bool:
        taken = super().submit(command, members)
        if taken and not isinstance(command, ResetBarriers):
            assert isinstance(command, StageCommand)
            self._look(command, members)
            if isinstance(command, Denoise) and command.request_id.startswith("poison") and self._left > 0:
                self._left -= 1
                self.at(self.now_s() + 0.01, lambda: self.lose(members[0]))
        return taken

    def _look(self, command: StageCommand, members: tuple[int, ...]) -> None:
        for member in members:
            held = list(self._unanswered[member].values())
            for other in held:
                request = self.loop.table.get(other.request_id)
                if request is not None and request.attempts == MAX_ATTEMPTS - 1:
                    is_alone = len(held) == 1 and len(members) == 1
                    (self.alone if is_alone else self.not_alone).append(command.request_id)


@pytest.mark.parametrize("num_devices", [1, 2, 3])
@pytest.mark.parametrize("num_deaths", [2, 3])
def test_who_was_hit_twice_runs_alone_and_the_others_go_on(num_devices: int, num_deaths: int) -> None:
    executor = Poisoned(num_devices, num_deaths)
    simulation = Simulation(num_devices, executor=executor)
    executor.loop = simulation.loop
    simulation.request("poison", at_s=1.0, num_steps=12, width=512, height=512)
    for number in range(20):
        simulation.request(f"{number}", at_s=0.2 * number, num_steps=12)
    simulation.run()
    assert executor.alone and not executor.not_alone
    assert set(executor.alone) == {"poison"}
    assert len(simulation.results) == 20 + (num_deaths < MAX_ATTEMPTS)
    assert set(simulation.failures) == ({"poison"} if num_deaths == MAX_ATTEMPTS else set())


def test_two_of_them_take_turns_and_pinned_degrees_do_not_count() -> None:
    executor = Poisoned(2, 0)
    simulation = Simulation(2, executor=executor)
    executor.loop = simulation.loop
    for name in ("poison-a", "poison-b"):
        simulation.request(name, num_steps=12, force_degrees=(2,))

    def blame() -> None:
        for request in simulation.loop.table.all():
            request.attempts = (MAX_ATTEMPTS - 1) * request.request_id.startswith("poison")

    executor.at(0.0, blame)
    for number in range(5):
        simulation.request(f"{number}", num_steps=12)
    simulation.run()
    assert not executor.not_alone and len(simulation.results) == 7
    assert simulation.results["poison-a"].degrees == simulation.results["poison-b"].degrees == (1,) * 12
