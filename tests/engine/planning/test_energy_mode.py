"""Energy modes and budgets of `horizon`: properties on random snapshots, and single situations.

The joules here are written by hand (600 W on every GPU in use, more on small pictures), not measured.
"""

import math
from collections.abc import Sequence
from typing import get_args

import msgspec
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.engine.planning.policies.test_horizon import NOW_S, by_id, plan, request
from tests.engine.specs import make_spec
from tetrion.engine.config import EnergyMode, PlannerConfig
from tetrion.engine.errors import BudgetUnmeetable, DeadlineUnmeetable, RequestError
from tetrion.engine.families.served import serving
from tetrion.engine.planning.cost.profile import Profile
from tetrion.engine.planning.cost.tables import CostTables
from tetrion.engine.planning.degrees import DegreeTable, DegreeTables
from tetrion.engine.planning.energy_admission import cheapest_for, check_default, check_early, check_wish
from tetrion.engine.planning.energy_mode import PATIENT_SLACK_S, cheapest_plan
from tetrion.engine.planning.forward_fill import RESERVE
from tetrion.engine.planning.horizon_options import HorizonOptions
from tetrion.engine.planning.policies.registry import get_planner, with_options
from tetrion.engine.planning.slo import MARGIN_S
from tetrion.engine.planning.snapshot import DeviceView, RequestView, RoundPlan, Snapshot
from tetrion.engine.request import EnergyOptions, ImageRequest
from tetrion.engine.resolve import resolve_request
from tetrion.engine.shape import cost_key_of_size

from .simulation import SIZES, check_plan, costs_of, flux_profile
from .test_plans import snapshots
from .test_plans import test_horizon_leaves_no_device_idle_except_on_purpose as no_device_is_idle_but_on_purpose

MODES: tuple[EnergyMode, ...] = get_args(EnergyMode)
PLANNER = get_planner("horizon")


def with_joules(profile: Profile, watts: float = 600.0) -> Profile:
    classes = {
        size: msgspec.structs.replace(
            cost, step_j={d: watts * d * ms / 1e3 for d, ms in cost.step_ms.items()}, encode_j=5.0, decode_j=20.0
        )
        for size, cost in profile.classes.items()
    }
    return msgspec.structs.replace(profile, classes=classes)


PROFILE = with_joules(flux_profile())


def table(key: str, num_devices: int = 8) -> DegreeTable:
    return DegreeTables(costs_of(PROFILE), num_devices)["", key]


def draw_alone(view: RequestView, num_devices: int, **config: object) -> tuple[float, float, tuple[int, ...]]:
    """(joules of the steps, end of denoising, degrees) of a request with all devices to itself, chunk by chunk."""
    now_s, degrees, joules = NOW_S, [], 0.0
    while view.step_index < view.num_steps:
        snapshot = Snapshot(
            now_s=now_s,
            requests=(view,),
            devices=tuple(DeviceView(device_id=i, free_s=now_s) for i in range(num_devices)),
            tables=DegreeTables(costs_of(PROFILE), num_devices),
            config=PlannerConfig(options=HorizonOptions(**config)),  # type: ignore[arg-type]
        )
        (chunk,) = PLANNER(snapshot).assignments
        degree, cost = len(chunk.members), PROFILE.cost(view.cost_key)
        spent_j = chunk.chunk_steps * cost.step_by_degree_j[degree]
        joules, now_s = joules + spent_j, now_s + chunk.chunk_steps * cost.step_s(degree)
        degrees += [degree] * chunk.chunk_steps
        view = msgspec.structs.replace(
            view,
            step_index=view.step_index + chunk.chunk_steps,
            members=chunk.members,
            ready_s=now_s,
            budget_j=None if view.budget_j is None else view.budget_j - spent_j,
        )
    return joules, now_s, tuple(degrees)


alone = st.fixed_dictionaries(
    {
        "size": st.sampled_from(SIZES),
        "num_devices": st.sampled_from((1, 2, 4, 8)),
        "num_steps": st.integers(1, 40),
        "room": st.floats(1.02, 30),
    }
)


def alone_view(size: tuple[int, int], num_devices: int, num_steps: int, room: float, **fields: object) -> RequestView:
    """A request whose deadline leaves `room` times the seconds that the fastest degree takes."""
    cost = table(cost_key_of_size(size), num_devices)
    due_s = NOW_S + room * num_steps * cost.fastest_step_s + cost.after_s + 2 * MARGIN_S
    return request("a", cost_key=cost_key_of_size(size), num_steps=num_steps, deadline_s=due_s, **fields)


@settings(max_examples=25, deadline=None)
@given(snapshot=snapshots(), data=st.data())
def test_any_mode_keeps_the_contract_repeats_and_lets_nobody_in_a_hurry_wait(
    snapshot: Snapshot, data: st.DataObject
) -> None:
    requests = tuple(
        msgspec.structs.replace(
            view,
            energy_mode=data.draw(st.sampled_from(MODES)),
            budget_j=data.draw(st.sampled_from((None, None, -5.0, 300.0, 5000.0))),
        )
        for view in snapshot.requests
    )
    snapshot = msgspec.structs.replace(
        snapshot, requests=requests, tables=DegreeTables(costs_of(PROFILE), len(snapshot.devices))
    )
    plan = PLANNER(snapshot)
    check_plan(snapshot, plan)
    assert PLANNER(snapshot) == plan
    no_device_is_idle_but_on_purpose.hypothesis.inner_test(snapshot)  # type: ignore[attr-defined]


@settings(max_examples=25, deadline=None)
@given(snapshot=snapshots())
def test_without_joules_every_mode_plans_as_the_fastest(snapshot: Snapshot) -> None:
    requests = tuple(msgspec.structs.replace(view, energy_mode="balanced") for view in snapshot.requests)
    assert PLANNER(msgspec.structs.replace(snapshot, requests=requests)) == PLANNER(snapshot)


@settings(max_examples=60, deadline=None)
@given(case=alone)
def test_alone_least_energy_takes_no_more_than_balanced_nor_that_than_fastest_and_all_are_in_time(
    case: dict[str, object],
) -> None:
    taken = {}
    for mode in MODES:
        view = alone_view(**case, energy_mode=mode)  # type: ignore[arg-type]
        taken[mode], end_s, _ = draw_alone(view, case["num_devices"])  # type: ignore[arg-type]
        assert view.deadline_s is not None
        assert end_s + PROFILE.cost(view.cost_key).aux_s["decode"] <= view.deadline_s
    assert taken["least-energy"] <= taken["balanced"] + 1e-6 <= taken["fastest"] + 2e-6


@settings(max_examples=40, deadline=None)
@given(case=alone, mode=st.sampled_from(MODES), share=st.one_of(st.just(1.0), st.floats(1.0, 2.0)))
def test_a_budget_that_the_cheapest_plan_meets_is_kept_in_every_mode(
    case: dict[str, object], mode: EnergyMode, share: float
) -> None:
    view = alone_view(**case, energy_mode=mode)  # type: ignore[arg-type]
    costs = table(view.cost_key, case["num_devices"])  # type: ignore[arg-type]
    assert view.deadline_s is not None
    available_s = view.deadline_s - NOW_S - costs.after_s - MARGIN_S
    cheapest = cheapest_plan(costs, view.num_steps, available_s)
    assert cheapest is not None
    budget_j = share * cheapest.joules
    joules, end_s, _ = draw_alone(
        msgspec.structs.replace(view, budget_j=budget_j + 20.0),  # the decode takes its part
        case["num_devices"],  # type: ignore[arg-type]
    )
    assert joules <= budget_j + 1e-3
    assert end_s - NOW_S <= available_s + 1e-6


@settings(max_examples=100, deadline=None)
@given(size=st.sampled_from(SIZES), num_steps=st.integers(1, 12), seconds=st.floats(0.01, 20))
def test_the_cheapest_plan_is_no_dearer_than_any_mixture_of_two_degrees(
    size: tuple[int, int], num_steps: int, seconds: float
) -> None:
    costs, best = table(cost_key_of_size(size)), math.inf
    for a in costs.degrees:
        for b in costs.degrees:
            for n in range(num_steps + 1):
                if n * costs.step_s[a] + (num_steps - n) * costs.step_s[b] <= seconds:
                    best = min(best, n * costs.step_j[a] + (num_steps - n) * costs.step_j[b])
    found = cheapest_plan(costs, num_steps, seconds)
    assert (math.inf if found is None else found.joules) == pytest.approx(best)


def degrees_of(plan: RoundPlan) -> dict[str, int]:
    return {name: len(assignment.members) for name, assignment in by_id(plan).items()}


def planned(views: Sequence[RequestView], num_devices: int = 8, **config: object) -> dict[str, int]:
    return degrees_of(plan(list(views), [0.0] * num_devices, PROFILE, **config))  # type: ignore[arg-type]


def test_left_over_devices_widen_as_the_mode_says() -> None:
    far = {"deadline_s": NOW_S + 100}
    assert planned([request("a", **far)]) == {"a": 8}
    assert planned([request("a", energy_mode="least-energy", **far)]) == {"a": 1}
    # a step at degree 2 takes 127 J, at 1 it takes 99 J: 29 % more, 59 ms less
    assert planned([request("a", energy_mode="least-energy", **far)], extra_j=0.3) == {"a": 2}
    assert planned([request("a", energy_mode="balanced", **far)], j_per_s=400.0) == {"a": 1}
    assert planned([request("a", energy_mode="balanced", **far)], j_per_s=490.0) == {"a": 4}
    assert planned([request("a", energy_mode="balanced", **far)], j_per_s=1e6) == {"a": 8}


def test_a_near_deadline_gets_the_degree_it_needs_with_time_in_reserve() -> None:
    at_4_s = 28 * 0.0598
    for room, degree in ((1.01 / (1 - RESERVE), 4), (1.01, 6)):  # the second leaves degree 4 no reserve
        due_s = NOW_S + room * at_4_s + 0.12 + MARGIN_S
        assert planned([request("a", energy_mode="least-energy", deadline_s=due_s)]) == {"a": degree}
    due_s = NOW_S + 28 * 0.03796 + 0.12 + 2 * MARGIN_S  # the widest just makes it, without reserve
    assert planned([request("a", energy_mode="least-energy", deadline_s=due_s)]) == {"a": 8}


def test_a_wider_degree_that_takes_less_is_preferred() -> None:
    cost = PROFILE.classes["1024x1024"]
    cheap = msgspec.structs.replace(cost, step_j={**cost.step_j, 2: 50.0})
    profile = msgspec.structs.replace(PROFILE, classes={"1024x1024": cheap})
    view = request("a", energy_mode="least-energy")
    assert degrees_of(plan([view], [0.0] * 8, profile)) == {"a": 2}
    assert degrees_of(plan([view], [0.0], profile)) == {"a": 1}


def test_late_requests_are_still_served() -> None:
    for size in SIZES:
        view = request("a", cost_key=cost_key_of_size(size), deadline_s=NOW_S + 0.01, energy_mode="least-energy")
        assert planned([view]).keys() == {"a"}
        assert planned([msgspec.structs.replace(view, budget_j=1.0)]).keys() == {"a"}


def test_with_hours_of_slack_one_goes_on_and_the_others_wait_but_nobody_in_a_hurry_does() -> None:
    hours = {"deadline_s": NOW_S + 4 * 3600, "energy_mode": "least-energy"}
    patient = [request(f"p{i}", **hours) for i in range(5)]
    first = plan(patient, [0.0] * 8, PROFILE)
    assert degrees_of(first) == {"p0": 1} and first.num_held == 7
    begun = [*patient[:3], request("p3", step_index=5, members=(3,), **hours), patient[4]]
    assert planned(begun) == {"p3": 1}, "what has begun goes on first"
    hurried = [request(f"h{i}", deadline_s=NOW_S + 60, energy_mode="least-energy") for i in range(8)]
    assert planned([*patient, *hurried]).keys() == {view.request_id for view in hurried}
    soft = [request("s", deadline_s=None, energy_mode="least-energy")]
    assert planned([*patient, *soft]) == {"p0": 1, "s": 1}
    fastest = [msgspec.structs.replace(view, energy_mode="fastest") for view in patient]
    assert planned(fastest).keys() == {view.request_id for view in fastest}


def test_more_patient_work_takes_more_devices_before_its_deadline_is_near() -> None:
    due_s = NOW_S + PATIENT_SLACK_S + 600  # one device does 600 s / (28 × 0.8245 s) = 25 of these by then
    patient = [
        request(f"p{i:03d}", cost_key="2048x2048", deadline_s=due_s, energy_mode="least-energy") for i in range(60)
    ]
    assert len(planned(patient)) == 3


def wish(**fields: object) -> ImageRequest:
    energy = EnergyOptions(**{name: fields.pop(name) for name in ("mode", "budget_j") if name in fields})  # type: ignore[arg-type]
    size = {"width": 1024, "height": 1024, "num_steps": 28}
    return ImageRequest(prompt="x", energy=energy, **{**size, **fields})  # type: ignore[arg-type]


def check(params: ImageRequest, profile: Profile = PROFILE, **config: object) -> None:
    spec = make_spec(name="", num_heads=24, max_size=2048)
    tables = DegreeTables(costs_of(profile), 4)
    check_wish(resolve_request(params, spec, 4), tables, PlannerConfig(**config))  # type: ignore[arg-type]


def test_a_budget_is_refused_with_the_cheapest_plan_that_meets_the_deadline() -> None:
    exact_j = 28 * 600 * 0.1647 + 25.0
    check(wish(budget_j=exact_j))
    with pytest.raises(
        BudgetUnmeetable,
        match=r"energy\.budget_j: 2000 J cannot be met: the cheapest plan takes 2792 J in 4\.76 s \(28 steps",
    ):
        check(wish(budget_j=2000.0))
    with pytest.raises(BudgetUnmeetable) as refused:
        check(wish(budget_j=exact_j, slo_ms=3000.0))
    cheapest = refused.value.cheapest
    assert len(cheapest.degrees) == 28 and set(cheapest.degrees) == {3, 1}
    assert cheapest.seconds <= 3.0 and cheapest.joules > exact_j and cheapest.uncounted == () and cheapest.in_time
    check(wish(budget_j=cheapest.joules, slo_ms=3000.0))
    hopeless = cheapest_for(table("1024x1024", 4), 28, 0.5)
    assert hopeless.joules == pytest.approx(exact_j), "a deadline that nobody meets is not the budget's business"
    with pytest.raises(BudgetUnmeetable, match=r"the cheapest plan takes 2792 J in .*, and none meets the deadline"):
        check(wish(budget_j=2000.0, slo_ms=500.0))


def test_stages_without_joules_are_named() -> None:
    cost = msgspec.structs.replace(PROFILE.classes["1024x1024"], encode_j=None, decode_j=None)
    profile = msgspec.structs.replace(PROFILE, classes={"1024x1024": cost})
    with pytest.raises(BudgetUnmeetable, match="without encode and decode, of which no joules are known"):
        check(wish(budget_j=1.0), profile)


def test_without_joules_modes_and_budgets_are_refused() -> None:
    bare = flux_profile()
    for params in (wish(mode="least-energy"), wish(mode="balanced"), wish(budget_j=1e6)):
        with pytest.raises(RequestError, match=r"no joules \(step_j\) for 1024x1024 at degree 1, 2, 3, 4"):
            check(params, bare)
        with pytest.raises(RequestError, match="only the policy horizon"):
            check(params, policy="fixed-1")
    check(wish(mode="fastest"), bare)
    check(wish(), bare)


def test_a_mode_as_the_default_needs_joules_too() -> None:
    for mode in MODES:
        check_default(costs_of(PROFILE), 4, PlannerConfig(options=HorizonOptions(energy=mode)))
    check_default(None, 4, PlannerConfig())
    for costs, reason in ((costs_of(flux_profile()), "no joules"), (None, "measured at the start has no joules")):
        with pytest.raises(ValueError, match=rf"planner\.options\.energy: 'balanced' is not possible: .*{reason}"):
            check_default(costs, 4, PlannerConfig(options=HorizonOptions(energy="balanced")))


@given(pixels=st.integers(16, 4096))
def test_joules_of_sizes_in_between_are_estimated_and_grow(pixels: int) -> None:
    assume((pixels, pixels) not in SIZES)
    joules, larger = (PROFILE.cost(f"{side}x{side}").step_by_degree_j for side in (pixels, pixels + 16))
    assert joules.keys() == {1, 2, 3, 4, 6, 8}
    assert all(0 < joules[degree] <= larger[degree] + 1e-9 for degree in joules)


@pytest.mark.parametrize(
    ("fields", "admission", "refusal"),
    [
        ({}, "all", None),
        ({"energy": {"mode": "fastest"}}, "all", None),
        ({"energy": {"mode": "balanced"}}, "all", "energy.mode: the profile has no joules"),
        ({"model": "new", "energy": {"mode": "balanced"}}, "all", "energy.mode: the cost table measured at the start"),
        ({"model": "new", "energy": {"budget_j": 5}}, "all", "energy.budget_j: the cost table measured at the start"),
        ({"slo_ms": 1}, "all", None),
        ({"slo_ms": 1}, "reject-hopeless", "slo_ms: 1 cannot be met now, the earliest that can is "),
        ({"slo_ms": 1e6}, "reject-hopeless", None),
        ({"model": "new", "slo_ms": 1}, "reject-hopeless", None),
    ],
)
def test_what_is_known_before_the_start_is_refused_before_it(
    fields: dict[str, object], admission: str, refusal: str | None
) -> None:
    models = serving(make_spec(name="known", num_heads=24), make_spec(name="new", num_heads=24))
    costs = CostTables(profiles={"known": flux_profile()})
    config = with_options(PlannerConfig(admission=admission))  # type: ignore[arg-type]
    size = {"width": 512, "height": 512}
    resolved = resolve_request(ImageRequest(prompt="a star", **(size | fields)), models, 8)  # type: ignore[arg-type]
    if refusal is None:
        check_early(resolved, costs, 8, config)
    else:
        with pytest.raises((RequestError, DeadlineUnmeetable)) as caught:
            check_early(resolved, costs, 8, config)
        assert str(caught.value).startswith(refusal)
