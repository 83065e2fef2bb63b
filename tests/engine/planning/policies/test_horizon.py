"""What `horizon` decides in single situations."""

import math

from tests.engine.planning.simulation import SimRequest, Simulation, costs_of, flux_profile, make_profile
from tetrion.engine.config import PlannerConfig
from tetrion.engine.planning.degrees import DegreeTables
from tetrion.engine.planning.horizon_options import HorizonOptions
from tetrion.engine.planning.policies.horizon import TURN_EVERY
from tetrion.engine.planning.policies.registry import get_planner
from tetrion.engine.planning.slo import urgency
from tetrion.engine.planning.snapshot import NO_RANKS, Assignment, DeviceView, RequestView, RoundPlan, Snapshot

NOW_S = 100.0


def request(request_id: str, **fields: object) -> RequestView:
    """A 1024² request ready to denoise, with a deadline far away."""
    values: dict[str, object] = {
        "stage": "denoise",
        "model": "",
        "cost_key": "1024x1024",
        "step_index": 0,
        "num_steps": 28,
        "arrival_s": NOW_S,
        "deadline_s": NOW_S + 100,
        "ready_s": NOW_S,
    }
    return RequestView(request_id=request_id, **{**values, **fields})  # type: ignore[arg-type]


def plan(
    requests: list[RequestView], free_in_s: list[float], profile=None, now_s=NOW_S, ranks=NO_RANKS, **options: float
) -> RoundPlan:
    planner = PlannerConfig(options=HorizonOptions(**options))  # type: ignore[arg-type]
    snapshot = Snapshot(
        now_s=now_s,
        ranks=ranks,
        requests=tuple(sorted(requests, key=lambda r: urgency(r, planner))),
        devices=tuple(DeviceView(device_id=i, free_s=now_s + wait_s) for i, wait_s in enumerate(free_in_s)),
        tables=DegreeTables(costs_of(profile or flux_profile()), len(free_in_s)),
        config=planner,
    )
    return get_planner("horizon")(snapshot)


def by_id(round_plan: RoundPlan) -> dict[str, Assignment]:
    return {assignment.request_id: assignment for assignment in round_plan.assignments}


def test_alone_a_request_is_widened_and_under_contention_degrees_shrink() -> None:
    assert len(by_id(plan([request("a")], [0.0] * 8))["a"].members) == 8
    crowd = by_id(plan([request(f"r{i}") for i in range(8)], [0.0] * 8))
    assert {len(assignment.members) for assignment in crowd.values()} == {1}


def test_decode_goes_before_encode_before_denoise_and_stays_where_the_latents_are() -> None:
    waiting = [
        request("a"),
        request("b", stage="encode"),
        request("c", stage="decode", step_index=28, members=(1, 0)),
    ]
    first = plan(waiting, [0.0, 0.0])
    assert [(a.request_id, a.stage) for a in first.assignments] == [("c", "decode"), ("b", "encode")]
    assert by_id(first)["c"].members == (1,)
    assert by_id(plan(waiting, [0.0, 0.0, 0.0]))["a"].members == (2,)


def test_a_chunk_holds_as_many_whole_steps_as_fit() -> None:
    chunk = by_id(plan([request("a", step_index=3)], [0.0]))["a"]
    assert (chunk.step_index, chunk.chunk_steps) == (3, 1)
    chunk = by_id(plan([request("a", cost_key="256x256")], [0.0]))["a"]
    assert chunk.chunk_steps == 4
    chunk = by_id(plan([request("a", cost_key="256x256", step_index=26)], [0.0]))["a"]
    assert chunk.chunk_steps == 2


def test_the_earlier_deadline_goes_first_then_the_larger_priority_then_the_id() -> None:
    due_s = NOW_S + 40
    pair = [request("a", deadline_s=due_s + 1), request("b", deadline_s=due_s)]
    assert list(by_id(plan(pair, [0.0]))) == ["b"]
    pair = [request("a", deadline_s=due_s), request("b", deadline_s=due_s, priority=1)]
    assert list(by_id(plan(pair, [0.0]))) == ["b"]
    pair = [request("a", deadline_s=due_s), request("b", deadline_s=due_s)]
    assert list(by_id(plan(pair, [0.0]))) == ["a"]


def test_a_request_with_an_slo_goes_before_one_without() -> None:
    pair = [request("a", deadline_s=None, arrival_s=NOW_S - 59), request("b", deadline_s=NOW_S + 100)]
    assert list(by_id(plan(pair, [0.0]))) == ["b"]


def test_a_late_request_gets_what_is_left() -> None:
    late = request("a", arrival_s=NOW_S - 5, deadline_s=NOW_S - 1)
    tight = request("b", deadline_s=NOW_S + 0.12 + 28 * 0.0598 + 0.05)
    assert by_id(plan([late, tight], [0.0] * 4)).keys() == {"b"}
    assert by_id(plan([late, tight], [0.0] * 5)).keys() == {"a", "b"}


def test_late_requests_and_those_without_a_deadline_stand_in_one_line() -> None:
    """Oldest first: whether a deadline was stated makes no difference once it has passed."""
    for deadlines in ((None, NOW_S - 1), (NOW_S - 1, None), (None, None), (NOW_S - 1, NOW_S - 1)):
        pair = [request(name, arrival_s=NOW_S - age_s, deadline_s=due_s)
                for name, age_s, due_s in zip("ab", (9, 5), deadlines, strict=True)]  # fmt: skip
        assert list(by_id(plan(pair, [0.0]))) == ["a"]


def test_the_pool_runs_abreast_where_that_draws_more_and_its_oldest_goes_first() -> None:
    crowd = [request(f"r{i}", deadline_s=None, arrival_s=NOW_S - 10 + i) for i in range(6)]
    assert {name: len(a.members) for name, a in by_id(plan(crowd, [0.0] * 4)).items()} == dict.fromkeys(
        ("r0", "r1", "r2", "r3"), 1
    )
    giant = request("giant", cost_key="2048x2048", deadline_s=None, arrival_s=NOW_S - 60)
    assert len(by_id(plan([giant, *crowd], [0.0] * 4))["giant"].members) > 1


def test_late_worth_says_whether_late_work_or_widening_gets_what_is_left() -> None:
    late = request("late", arrival_s=NOW_S - 5, deadline_s=NOW_S - 1)
    tight = request("tight", deadline_s=NOW_S + 3.0)
    degrees = [
        {name: len(a.members) for name, a in by_id(plan([late, tight], [0.0] * 8, late_worth=worth)).items()}
        for worth in (0.0, 0.75, 100.0)
    ]
    assert degrees[0].get("late", 0) < degrees[2]["late"] and degrees[0]["tight"] > degrees[2]["tight"]
    assert degrees[0].get("late", 0) <= degrees[1]["late"] <= degrees[2]["late"]


def test_the_oldest_of_the_pool_has_a_turn_now_and_then() -> None:
    """Although another one needs the only device all the time."""
    every_s, alone_s = TURN_EVERY * PlannerConfig().chunk_s, 28 * flux_profile().step_s("1024x1024", 1)

    def num_turns(age_s: float) -> int:
        late = request("a", arrival_s=NOW_S - age_s, deadline_s=NOW_S - age_s + 5)
        times = [NOW_S + every_s * i / 200 for i in range(200)]
        return sum("a" in by_id(plan([late, tight(now_s)], [0.0], now_s=now_s)) for now_s in times)

    def tight(now_s: float) -> RequestView:
        return request("b", deadline_s=now_s + alone_s + 0.2)

    assert 1 <= num_turns(600) <= 200 / TURN_EVERY + 1
    assert num_turns(50) == 0


# Tenants ----------------------------------------------------------------------------------------------------------


def test_who_has_had_less_than_the_share_is_placed_first() -> None:
    """One device: only one of them can be in time, and the one with the earlier deadline is behind."""
    due_s = NOW_S + 28 * flux_profile().step_s("1024x1024", 1) + 0.2
    hog = request("hog", holder=("a", ""), deadline_s=due_s - 0.05)
    other = request("other", holder=("b", ""), deadline_s=due_s)
    assert list(by_id(plan([hog, other], [0.0]))) == ["hog"]
    assert list(by_id(plan([hog, other], [0.0], ranks={("a", ""): 1, ("b", ""): 0}))) == ["other"]
    assert list(by_id(plan([hog], [0.0], ranks={("a", ""): 1, ("b", ""): 0}))) == ["hog"], "shares bind nobody alone"


def test_late_requests_go_by_rank_and_age() -> None:
    late = [
        request(f"{tenant}{age_s}", holder=(tenant, ""), arrival_s=NOW_S - age_s, deadline_s=NOW_S - 1)
        for tenant in "ab"
        for age_s in (5, 9)
    ]
    ranks = {("a", ""): 1, ("b", ""): 0}
    assert set(by_id(plan(late, [0.0], ranks=ranks))) == {"b9"}
    assert set(by_id(plan(late, [0.0] * 2, ranks=ranks))) == {"b9", "b5"}


def test_weights_decide_who_is_given_up() -> None:
    def crowd(weight: float) -> list[RequestView]:
        return [
            request("large", cost_key="2048x2048", deadline_s=NOW_S + 4.8, weight=weight),
            *(request(f"s{i}", deadline_s=NOW_S + 2.3) for i in range(2)),
        ]

    assert by_id(plan(crowd(1.0), [0.0] * 8)).keys() == {"s0", "s1"}
    assert len(by_id(plan(crowd(100.0), [0.0] * 8))["large"].members) == 8


def test_only_so_many_of_the_most_urgent_are_weighed_against_each_other() -> None:
    step_s = flux_profile().step_s("1024x1024", 1)
    crowd = [request(f"r{i}", deadline_s=NOW_S + 0.13 + 28 * step_s + 0.01 * (i + 1)) for i in range(4)]
    assert len(by_id(plan(crowd, [0.0] * 4))) == 4
    few = by_id(plan(crowd, [0.0] * 4, max_candidates=1))
    assert "r0" in few and len(few["r0"].members) >= 1


def test_previous_members_stay_in_order() -> None:
    tight_s = NOW_S + 0.12 + 28 * 0.1057 + 0.05
    pair = [
        request("a", deadline_s=tight_s, members=(3, 1)),
        request("b", deadline_s=tight_s + 1e-3, members=(0, 2)),
    ]
    members = {key: assignment.members for key, assignment in by_id(plan(pair, [0.0] * 4)).items()}
    assert members == {"a": (3, 1), "b": (0, 2)}


def test_it_waits_for_a_device_that_is_free_soon_and_says_when_to_wake_it() -> None:
    tight = request("a", cost_key="2048x2048", deadline_s=NOW_S + 0.48 + 28 * 0.4699 + 0.06)
    soon = plan([tight], [0.0, 0.020])
    assert soon.assignments == ()
    assert soon.wake_s is not None and math.isclose(soon.wake_s, NOW_S + 0.020 - 0.005)
    within_lead = plan([tight], [0.0, 0.004])
    assert by_id(within_lead)["a"].members == (0, 1)
    assert by_id(plan([tight], [0.0, 0.400]))["a"].members == (0,)


def test_nothing_is_assigned_that_is_not_ready_or_not_free() -> None:
    assert plan([request("a", ready_s=NOW_S + 0.1, members=(0,))], [0.1]).assignments == ()
    assert plan([request("a")], [0.1]).assignments == ()
    assert plan([], [0.0]).assignments == ()
    assert plan([request("a")], []).assignments == ()


def test_a_degree_that_is_not_faster_is_never_used() -> None:
    slow = make_profile({"1024x1024": {"step_ms": {1: 100.0, 2: 101.0, 4: 140.0}, "encode_ms": 5, "decode_ms": 5}})
    assert len(by_id(plan([request("a")], [0.0] * 4, slow))["a"].members) == 1
    late = request("a", deadline_s=NOW_S - 1)
    assert len(by_id(plan([late], [0.0] * 4, slow))["a"].members) == 1


def test_degrees_the_profile_lacks_are_not_used() -> None:
    sparse = make_profile({"1024x1024": {"step_ms": {1: 100.0, 4: 30.0}, "encode_ms": 5, "decode_ms": 5}})
    assert len(by_id(plan([request("a")], [0.0] * 3, sparse))["a"].members) == 1
    assert len(by_id(plan([request("a")], [0.0] * 8, sparse))["a"].members) == 4


def test_more_devices_than_an_engine_has_are_no_matter() -> None:
    """A simulation may have them."""
    wide = make_profile({"1024x1024": {"step_ms": {1: 96.0, 96: 1.5}, "encode_ms": 5, "decode_ms": 5}}, heads=96)
    for deadline_s in (None, NOW_S - 1, NOW_S + 100):
        alone = request("a", arrival_s=NOW_S - 5, deadline_s=deadline_s)
        assert len(by_id(plan([alone], [0.0] * 96, wide))["a"].members) == 96


def test_a_stream_of_newcomers_starves_nobody_without_slo() -> None:
    old = SimRequest("old", 0.0, 2048, 2048, 4, None)
    stream = [SimRequest(f"r{i:04d}", 0.4 * i, 1024, 1024, 4, None) for i in range(200)]
    config = PlannerConfig(patience_s=2.0)
    Simulation(get_planner("horizon"), [old, *stream], 1, flux_profile(), config).run()
    assert old.finish_s < 60


def test_overload_with_slos_does_not_starve_those_without() -> None:
    old = SimRequest("old", 0.0, 1024, 1024, 4, None)
    stream = [SimRequest(f"r{i:04d}", 0.4 * i, 1024, 1024, 4, 5.0) for i in range(200)]
    config = PlannerConfig(patience_s=2.0)
    Simulation(get_planner("horizon"), [old, *stream], 1, flux_profile(), config).run()
    assert old.finish_s < 60


def test_a_request_that_needs_all_devices_waits_for_a_short_one_and_not_for_a_long_one() -> None:
    """On two devices a step of 2048² takes 0.5 s longer on one: the short one is let through on both, not beside it."""
    cost = flux_profile().cost("2048x2048")
    due_s = NOW_S + 10 * cost.step_s(2) + cost.aux_s["decode"] + 1.0
    large = request("large", cost_key="2048x2048", step_index=18, deadline_s=due_s)
    short = request("short", cost_key="256x256", step_index=24, deadline_s=NOW_S + 1)
    long = request("long", step_index=22, deadline_s=NOW_S + 2)
    patient = request("large", cost_key="2048x2048", step_index=18)
    for requests, expected in (
        ([large, short], {"short": 2}),
        ([large, long], {"long": 1, "large": 1}),
        ([patient, short], {"short": 1, "large": 1}),
    ):
        degrees = {name: len(a.members) for name, a in by_id(plan(requests, [0.0, 0.0])).items()}
        assert degrees == expected
