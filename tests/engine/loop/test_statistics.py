"""The loop's own figures: by hand, in any order of arrival, and on the real loop in virtual time."""

import random

import pytest

from tests.engine.loop.test_loop import Simulation
from tetrion.engine.loop.statistics import LoopFigures, LoopStatistics


def statistics(num_devices: int = 2) -> LoopStatistics:
    return LoopStatistics(num_devices, 0.0, cpu_clock=iter(range(1000)).__next__)  # type: ignore[arg-type]


def test_idle_devices_count_only_while_a_request_is_ready() -> None:
    figures = statistics()
    figures.admitted(1.0)
    figures.sent(7, (0,), 1.5)
    figures.answered(7, started_s=2.0, ended_s=5.0)
    figures.ended(5.0)
    told = figures.figures(10.0)
    assert told.device_s == 20.0
    assert told.lost_s == pytest.approx(2 * (2.0 - 1.0)), "both devices, from admission to the start"
    assert told.held_s == 0.0 and told.num_commands == 1


def test_what_a_policy_holds_back_on_purpose_is_kept_apart() -> None:
    figures = statistics()
    figures.admitted(0.0)
    figures.planned(num_devices=2, num_held=1, now_s=0.0)
    figures.planned(num_devices=2, num_held=0, now_s=3.0)
    told = figures.figures(4.0)
    assert (told.lost_s, told.held_s) == (8.0, 3.0)
    assert told.lost_share == pytest.approx(5.0 / 8.0)


def test_a_lost_device_does_not_count_as_idle() -> None:
    figures = statistics()
    figures.admitted(0.0)
    figures.sent(1, (0, 1), 0.0)
    figures.failed(1, 2.0)
    figures.planned(num_devices=1, num_held=0, now_s=2.0)
    figures.answered(1, started_s=0.0, ended_s=2.0)
    told = figures.figures(5.0)
    assert told.device_s == 2 * 2.0 + 3.0
    assert told.lost_s == 3.0


def test_nothing_is_summed_up_before_it_is_complete() -> None:
    figures = statistics(1)
    figures.admitted(0.0)
    figures.sent(1, (0,), 1.0)
    assert figures.figures(50.0).lost_s == 1.0, "whether the device is busy since then is not known yet"
    figures.answered(1, started_s=1.0, ended_s=50.0)
    assert figures.figures(50.0).lost_s == 1.0


def test_the_order_in_which_answers_arrive_does_not_matter() -> None:
    def figures_in(order: random.Random) -> LoopFigures:
        figures = statistics(3)
        answers = []
        for number in range(300):
            figures.admitted(float(number))
            figures.sent(number, (number % 3,), number + 0.25)
            answers.append((number, number + 0.25, number + 0.75))
        order.shuffle(answers)
        for answer in answers:
            figures.answered(*answer)
            figures.ended(answer[2])
            figures.planned(3, 0, 300.0)
        return figures.figures(300.0)

    told = [figures_in(random.Random(seed)) for seed in range(3)]
    assert told[0].lost_s == pytest.approx(300 * 0.25 * 3)
    assert [f.lost_s for f in told[1:]] == pytest.approx([told[0].lost_s] * 2)


def test_cpu_time_is_that_of_the_ticks() -> None:
    figures = statistics()
    for _ in range(3):
        figures.end_tick(figures.begin_tick())
    told = figures.figures(1.0)
    assert (told.num_ticks, told.cpu_s) == (3, 3.0)
    assert told.cpu_s_per_command == 0.0


def test_the_loop_tells_what_happens() -> None:
    simulation = Simulation(num_devices=3)
    for number in range(8):
        simulation.request(f"r{number}", at_s=0.3 * number, width=512, height=512, slo_ms=5000)
    simulation.executor.at(1.0, lambda: simulation.executor.lose(2))
    simulation.run()
    now_s = simulation.executor.now_s()
    told = simulation.loop.statistics.figures(now_s)
    assert told.num_commands == len(simulation.commands)
    assert told.device_s == pytest.approx(3 * 1.0 + 2 * (now_s - 1.0), abs=0.5)
    assert 0 <= told.held_s <= told.lost_s + 1e-9 < told.device_s / 4
    assert told.cpu_s > 0


def test_one_request_alone_loses_nothing_but_what_it_cannot_use() -> None:
    simulation = Simulation(num_devices=1)
    simulation.request("a", width=512, height=512, num_steps=20)
    simulation.run()
    assert simulation.loop.statistics.figures(simulation.executor.now_s()).lost_s == pytest.approx(0.0, abs=1e-6)
