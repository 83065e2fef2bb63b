"""What each of the published policies does in small situations whose answer can be worked out by hand."""

import msgspec
import pytest

from tests.engine.planning.simulation import costs_of, make_profile
from tetrion.engine.config import PlannerConfig
from tetrion.engine.planning.cost.profile import Profile
from tetrion.engine.planning.degrees import DegreeTable, DegreeTables
from tetrion.engine.planning.forward_fill import Work
from tetrion.engine.planning.policies.registry import get_planner
from tetrion.engine.planning.policies.tetriserve import decide, least_gpu_time_mix, round_s
from tetrion.engine.planning.snapshot import Assignment, DeviceView, RequestView, RoundPlan, Snapshot

PROFILE = make_profile(
    {
        "512x512": {"step_ms": {1: 50.0, 2: 30.0, 4: 20.0}, "encode_ms": 25, "decode_ms": 40},
        "1024x1024": {"step_ms": {1: 200.0, 2: 120.0, 4: 80.0}, "encode_ms": 25, "decode_ms": 90},
    }
)
ROUND_S = 0.4
"""Five steps of 1024x1024 on four devices."""


def request(
    request_id: str, *, px: int = 1024, slo_s: float | None = 100.0, arrival_s: float = 0.0, **fields: object
) -> RequestView:
    given: dict[str, object] = {
        "request_id": request_id,
        "stage": "denoise",
        "model": "",
        "cost_key": f"{px}x{px}",
        "step_index": 0,
        "num_steps": 10,
        "arrival_s": arrival_s,
        "deadline_s": None if slo_s is None else arrival_s + slo_s,
        "ready_s": 0.0,
    }
    return RequestView(**(given | fields))  # type: ignore[arg-type]


def snapshot(
    requests: list[RequestView], now_s: float = 40 * ROUND_S, free_s: tuple[float, ...] = (0.0,) * 4
) -> Snapshot:
    return Snapshot(
        now_s=now_s,
        requests=tuple(msgspec.structs.replace(r, ready_s=max(r.ready_s, now_s)) for r in requests),
        devices=tuple(DeviceView(device_id=i, free_s=max(now_s, time_s)) for i, time_s in enumerate(free_s)),
        tables=DegreeTables(costs_of(PROFILE), len(free_s)),
        config=PlannerConfig(),
    )


def degrees(plan: RoundPlan) -> dict[str, int]:
    return {assignment.request_id: len(assignment.members) for assignment in plan.assignments}


def of(plan: RoundPlan, request_id: str) -> Assignment:
    return next(assignment for assignment in plan.assignments if assignment.request_id == request_id)


# rssp ----------------------------------------------------------------------------------------------------------------


def test_rssp_gives_each_resolution_its_fastest_degree_in_order_of_arrival() -> None:
    late, early = request("a", arrival_s=2.0, slo_s=1.0), request("b", arrival_s=1.0)
    assert degrees(get_planner("rssp")(snapshot([late, early]))) == {"b": 4}


def test_rssp_lets_nobody_pass_the_head_of_the_line() -> None:
    head, behind = request("a"), request("b", px=512, stage="encode", arrival_s=1.0)
    busy = snapshot([head, request("c", arrival_s=1.0)], free_s=(0.0, 0.0, 0.0, 99.0))
    assert get_planner("rssp")(busy).assignments == ()
    encode = get_planner("rssp")(snapshot([head, behind], free_s=(0.0, 0.0, 0.0, 99.0)))
    assert degrees(encode) == {"b": 1}


# edf-best-fit --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("budget_s", "degree"), [(2.02, 1), (1.98, 2), (1.18, 4), (0.5, 1)])
def test_best_fit_takes_the_narrowest_degree_that_meets_the_deadline(budget_s: float, degree: int) -> None:
    """Ten steps take 2.0, 1.2, 0.8 s; nothing ends in 0.5 s, so that one runs at the narrowest."""
    now_s = 16.0
    due = request("a", slo_s=now_s + budget_s + 0.090 + 0.010)
    assert degrees(get_planner("edf-best-fit")(snapshot([due], now_s))) == {"a": degree}


def test_best_fit_serves_the_earliest_deadline_first_and_the_next_with_what_is_left() -> None:
    now_s = 16.0
    tight = [request(name, slo_s=now_s + 0.1 + budget_s) for name, budget_s in (("a", 1.19), ("b", 1.3), ("c", 1.21))]
    plan = get_planner("edf-best-fit")(snapshot(tight, now_s, free_s=(0.0, 0.0, 0.0, 99.0)))
    assert degrees(plan) == {"a": 2, "c": 1}


# edf -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("budget_s", "others", "degree"), [(2.02, 3, 1), (1.98, 2, 2), (1.18, 0, 4)])
def test_edf_gives_the_narrowest_degree_in_time_where_others_take_the_rest(
    budget_s: float, others: int, degree: int
) -> None:
    """Ten steps take 2.0, 1.2, 0.8 s. The others, due later and far from late, take a device each."""
    due = request("a", slo_s=16.0 + budget_s + 0.090 + 0.010)
    behind = [request(f"b{i}", slo_s=200.0) for i in range(others)]
    got = degrees(get_planner("edf")(snapshot([*behind, due], 16.0)))
    assert got == {"a": degree} | {b.request_id: 1 for b in behind}


def test_edf_gives_what_is_left_to_whoever_gains_most() -> None:
    """From one device to two, 1024x1024 becomes 1.67 times as fast; to four 2.5 times. Four devices are worth most as
    two and two."""
    pair = [request("a"), request("b", slo_s=200.0)]
    assert degrees(get_planner("edf")(snapshot(pair))) == {"a": 2, "b": 2}
    assert degrees(get_planner("edf")(snapshot(pair[:1]))) == {"a": 4}
    assert degrees(get_planner("edf-best-fit")(snapshot(pair))) == {"a": 1, "b": 1}


def test_edf_serves_late_ones_in_their_turn_and_widens_them_too() -> None:
    late, on_time = request("a", slo_s=10.0), request("b", slo_s=200.0)
    assert degrees(get_planner("edf")(snapshot([on_time, late], 16.0))) == {"a": 2, "b": 2}
    alone = get_planner("edf")(snapshot([late], 16.0))
    assert degrees(alone) == {"a": 4} and of(alone, "a").chunk_steps == 1
    one_free = snapshot([on_time, late], 16.0, free_s=(0.0, 99.0, 99.0, 99.0))
    assert degrees(get_planner("edf")(one_free)) == {"a": 1}


def test_edf_keeps_placements() -> None:
    pair = [request("a", members=(3, 1)), request("b", slo_s=200.0, members=(0, 2))]
    plan = get_planner("edf")(snapshot(pair))
    assert of(plan, "a").members == (3, 1) and of(plan, "b").members == (0, 2)


# tetriserve ----------------------------------------------------------------------------------------------------------


def work(request_id: str, budget_s: float, px: int = 1024, num_steps: int = 10) -> Work:
    table = DegreeTable(PROFILE.cost(f"{px}x{px}"), (1, 2, 4), 4)
    return Work(request(request_id, px=px, num_steps=num_steps), table, 0.0, budget_s, True)


@pytest.mark.parametrize(
    ("budget_s", "mix"),
    [(2.5, (1,)), (2.0, (1,)), (1.9, (1, 2)), (1.2, (1, 2)), (1.1, (2, 4)), (0.8, (2, 4)), (0.7, (4,))],
)
def test_the_mix_of_least_gpu_time_is_of_two_adjacent_degrees(budget_s: float, mix: tuple[int, ...]) -> None:
    assert least_gpu_time_mix(work("a", budget_s)) == mix


def test_the_knapsack_saves_as_many_requests_as_it_can() -> None:
    """At 0.4 s each is late unless it runs now. The most urgent needs all four devices for that; the other two need
    two each."""
    wide, first, second = work("a", 0.85), work("b", 1.15), work("c", 1.15)
    works = [wide, first, second]
    decide(works, 4, 0.4)
    assert [w.target for w in works] == [0, 2, 2]


def test_nothing_is_spent_on_saving_what_can_wait_but_no_device_idles() -> None:
    relaxed = [work("a", 50.0), work("b", 50.0)]
    decide(relaxed, 4, 0.4)
    assert sum(w.target for w in relaxed) == 4


def test_requests_that_are_late_get_one_device_after_those_that_are_not() -> None:
    late, on_time = work("a", 0.1), work("b", 1.9)
    decide([late, on_time], 4, 0.4)
    assert late.target == 1 and on_time.target >= 1
    late, only_just = work("a", 0.1), work("b", 0.81)
    decide([late, only_just], 4, 0.4)
    assert late.target == 0 and only_just.target == 4


def test_a_round_is_so_many_steps_of_the_slowest_class_at_the_widest_degree() -> None:
    assert round_s(snapshot([]), 5) == pytest.approx(ROUND_S)
    assert round_s(snapshot([]), 2) == pytest.approx(0.16)
    two_left = snapshot([], free_s=(0.0, 0.0))
    assert round_s(two_left, 5) == pytest.approx(0.6)


def test_denoising_starts_at_round_boundaries_only() -> None:
    planner, one = get_planner("tetriserve"), [request("a", slo_s=None)]
    at_boundary = planner(snapshot(one, 40 * ROUND_S))
    assert degrees(at_boundary) == {"a": 4} and of(at_boundary, "a").chunk_steps == 5
    between = planner(snapshot(one, 40 * ROUND_S + 0.2))
    assert between.assignments == ()
    assert between.wake_s == pytest.approx(41 * ROUND_S - 0.005)
    ahead = planner(snapshot(one, between.wake_s or 0.0))
    assert degrees(ahead) == {"a": 4} and of(ahead, "a").chunk_steps == 5


def test_encodes_and_decodes_do_not_wait_for_the_round() -> None:
    waiting = [request("a", stage="encode"), request("b", stage="decode", step_index=10, members=(2,))]
    plan = get_planner("tetriserve")(snapshot(waiting, 40 * ROUND_S + 0.2))
    assert degrees(plan) == {"a": 1, "b": 1} and of(plan, "b").members == (2,)


def test_a_request_keeps_its_devices_from_round_to_round() -> None:
    pair = [request("a", slo_s=None, members=(3, 1)), request("b", slo_s=None, members=(0, 2))]
    for policy in ("tetriserve", "tetriserve-continuous"):
        plan = get_planner(policy)(snapshot(pair))
        assert of(plan, "a").members[:2] == (3, 1) and of(plan, "b").members == (0, 2)


def test_the_continuous_form_starts_at_any_time_in_chunks_of_the_usual_length() -> None:
    plan = get_planner("tetriserve-continuous")(snapshot([request("a", px=512, slo_s=None)], 40 * ROUND_S + 0.2))
    assert degrees(plan) == {"a": 4} and of(plan, "a").chunk_steps == 7 and plan.wake_s is None


def test_the_clock_of_the_rounds_ignores_small_corrections_of_the_profile() -> None:
    step_ms = {1: 200.0, 2: 120.0, 4: 79.9}
    faster = make_profile({"1024x1024": {"step_ms": step_ms, "encode_ms": 25, "decode_ms": 90}})
    assert isinstance(faster, Profile)
    assert round_s(msgspec.structs.replace(snapshot([]), tables=DegreeTables(costs_of(faster), 4)), 5) == pytest.approx(
        ROUND_S
    )


@pytest.mark.parametrize("name", ["tetriserve-g0", "tetriserve-g", "tetriserve-2", "tetriserve-continuous-2", "rssp-1"])
def test_names_out_of_family_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"policy: expected one of horizon, fixed-K.*rssp.*tetriserve-gN"):
        get_planner(name)
