"""The states whose decisions are timed."""

import random

import pytest

from benchmarks.research.decision_time import late_snapshots, make_snapshot, measure
from tests.engine.planning.simulation import check_plan, costs_of, flux_profile
from tetrion.engine.planning.degrees import DegreeTables
from tetrion.engine.planning.policies.registry import get_planner


def test_late_states_have_so_many_requests_most_of_them_late() -> None:
    states = late_snapshots(20, 4, flux_profile(), 5)
    assert len(states) == 5
    for state in states:
        deadlines = [request.deadline_s for request in state.all_requests]
        stated = [deadline_s for deadline_s in deadlines if deadline_s is not None]
        assert 18 <= len(deadlines) <= 20 and len(stated) < len(deadlines)
        assert sum(deadline_s < state.now_s for deadline_s in stated) >= len(stated) / 2
        for policy in ("horizon", "edf"):
            get_planner(policy)(state)


def test_mixed_states_can_be_planned() -> None:
    state = make_snapshot(random.Random(1), 20, 8, DegreeTables(costs_of(flux_profile()), 8))
    assert len(state.all_requests) == 20
    if not state.backlog:
        check_plan(state, get_planner("horizon")(state))


def test_a_row_for_each_policy_point_and_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.research.decision_time.POINTS", ((20, 4),))
    rows = measure(flux_profile(), ["horizon", "edf"], 3)
    assert [(row["policy"], row["state"]) for row in rows] == [
        (policy, state) for state in ("mixed", "late") for policy in ("horizon", "edf")
    ]
    assert all(0 < row["p50_ms"] <= row["p99_ms"] <= row["max_ms"] for row in rows)
