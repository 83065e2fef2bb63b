"""Energy modes: what `horizon` may do with time and devices that no deadline needs. Pure arithmetic.

    fastest        left-over devices widen whoever gains most, whatever it costs
    balanced       they do where a second earlier costs at most `j_per_s` joules
    least-energy   they do where a step takes at most a share `extra_j` more joules than at the degree that is needed

In the last two, of the levels that are in time the one with least joules is taken, which is usually the narrowest.

A budget (joules that a request may still take) holds in every mode: a chunk may run at a degree if after it the rest
can still be done for what is left, and in time as long as that is possible.

*Patient* requests (least-energy, hours of slack) are drawn one after the other on as few devices as their deadlines
allow, and wait meanwhile: the other devices stay idle for long, or free for who is in a hurry. Nobody else has to wait.
"""

import math
from collections.abc import Sequence

import msgspec

from tetrion.engine.config import PlannerConfig
from tetrion.engine.planning.degrees import DegreeTable
from tetrion.engine.planning.forward_fill import Work
from tetrion.engine.planning.horizon_options import HorizonOptions, horizon_options
from tetrion.engine.planning.slo import denoise_due_s, due_s
from tetrion.engine.planning.snapshot import RequestView
from tetrion.engine.request import ImageRequest
from tetrion.engine.stages import AUX_FROM

PATIENT_SLACK_S = 3600.0
"""With less slack than that a request is interactive: it never waits for others' sake."""
ROUNDING_J = 1e-6


class StepPlan(msgspec.Struct, frozen=True, kw_only=True):
    """The degree of each step, and what the steps take together."""

    degrees: tuple[int, ...]
    seconds: float
    joules: float


def cheapest_degree(table: DegreeTable, degrees: Sequence[int]) -> int:
    """The one whose step takes least joules; of equals the narrowest. Without joules the narrowest."""
    return min(degrees, key=lambda degree: (table.step_j[degree], degree)) if table.step_j else degrees[0]


def cheapest_plan(table: DegreeTable, num_steps: int, available_s: float) -> StepPlan | None:
    """The least joules for `num_steps` steps within `available_s`: at most two degrees, the wider one first. None if no
    degree is fast enough. The joules of the table must be known."""
    best: StepPlan | None = None
    for slow in table.degrees:
        for fast in table.degrees:
            slow_s, fast_s = table.step_s[slow], table.step_s[fast]
            missing_s = num_steps * slow_s - available_s
            num_fast = 0 if missing_s <= 0 else num_steps
            if missing_s > 0 and fast_s < slow_s:
                num_fast = min(num_steps, math.ceil(missing_s / (slow_s - fast_s) - 1e-9))
            num_slow = num_steps - num_fast
            plan = StepPlan(
                degrees=(fast,) * num_fast + (slow,) * num_slow,
                seconds=num_fast * fast_s + num_slow * slow_s,
                joules=num_fast * table.step_j[fast] + num_slow * table.step_j[slow],
            )
            is_in_time = plan.seconds <= available_s + 1e-9
            if is_in_time and (best is None or (plan.joules, plan.seconds) < (best.joules, best.seconds)):
                best = plan
    return best


def worth_using(
    view: RequestView, table: DegreeTable, target: int, degrees: Sequence[int], config: PlannerConfig, now_s: float
) -> Sequence[int]:
    """Those of `degrees` at which left-over devices may run a request that has `target` (0: none, then the cheapest of
    them is always among the answer)."""
    if not degrees or not table.step_j or (view.energy_mode == "fastest" and view.budget_j is None):
        return degrees
    base, options = target or cheapest_degree(table, degrees), horizon_options(config)
    worth = [degree for degree in degrees if _is_worth(view, table, base, degree, options)]
    if view.budget_j is None:
        return worth
    return [degree for degree in worth if degree == base or affordable_steps(view, table, degree, config, now_s)]


def apply_budget(work: Work, config: PlannerConfig) -> None:
    """Take away the degrees that a request cannot afford; it is late if it cannot be in time for what is left."""
    view, table = work.view, work.table
    if view.budget_j is None or not table.step_j:
        return
    affordable = [d for d in table.degrees if affordable_steps(view, table, d, config, work.start_s)]
    work.degrees = affordable or [cheapest_degree(table, table.degrees)]
    plan = cheapest_plan(table, work.remaining, work.due_s - work.start_s)
    if not work.is_soft and (plan is None or plan.joules > _left_j(view, table) + ROUNDING_J):
        work.is_late = True


def affordable_steps(view: RequestView, table: DegreeTable, degree: int, config: PlannerConfig, start_s: float) -> int:
    """Steps of a chunk at `degree` from `start_s` on after which the rest can still be done for what is left of the
    budget, and in time as long as that is possible; 0: not even one."""
    most = view.chunk_steps(table.step_s[degree], config.chunk_s)
    if view.budget_j is None or not table.step_j:
        return most
    remaining, left_j = view.num_steps - view.step_index, _left_j(view, table) + ROUNDING_J
    available_s = denoise_due_s(due_s(view, config), table.after_s) - start_s
    best = cheapest_plan(table, remaining, available_s)
    if best is None or best.joules > left_j:
        available_s = math.inf
    for steps in range(most, 0, -1):
        rest = cheapest_plan(table, remaining - steps, available_s - steps * table.step_s[degree])
        if rest is not None and steps * table.step_j[degree] + rest.joules <= left_j:
            return steps
    return 0


def set_patient_aside(works: Sequence[Work], now_s: float) -> list[Work]:
    """Of the patient requests among `works` those that wait now. At least one of them goes on."""
    patient = [work for work in works if is_patient(work)]
    if not patient:
        return []
    allowed, held = _devices_for(patient, now_s), []
    for work in sorted(patient, key=lambda work: (work.view.step_index == 0, work.due_s, work.view.request_id)):
        degree = cheapest_degree(work.table, work.table.degrees)
        if allowed > 0:
            allowed -= degree
        else:
            held.append(work)
    return held


def may_be_patient(asked: ImageRequest, config: PlannerConfig) -> bool:
    """Whether a request is patient when it comes, if nothing else is to be done."""
    mode = asked.energy.mode or horizon_options(config).energy
    return mode == "least-energy" and asked.slo_ms is not None and asked.slo_ms >= PATIENT_SLACK_S * 1e3


def is_patient(work: Work) -> bool:
    if work.view.energy_mode != "least-energy" or work.is_soft or work.is_late:
        return False
    return work.due_s - work.start_s - _alone_s(work) >= PATIENT_SLACK_S


def _alone_s(work: Work) -> float:
    return work.remaining * work.table.step_s[cheapest_degree(work.table, work.table.degrees)]


def _devices_for(patient: Sequence[Work], now_s: float) -> int:
    """How many devices do the work of these before they stop being patient, each at its cheapest degree."""
    device_s, most = 0.0, 1
    for work in sorted(patient, key=lambda work: (work.due_s, work.view.request_id)):
        device_s += _alone_s(work) * cheapest_degree(work.table, work.table.degrees)
        most = max(most, math.ceil(device_s / max(work.due_s - now_s - PATIENT_SLACK_S, _alone_s(work))))
    return most


def _is_worth(view: RequestView, table: DegreeTable, base: int, degree: int, options: HorizonOptions) -> bool:
    extra_j, saved_s = table.step_j[degree] - table.step_j[base], table.step_s[base] - table.step_s[degree]
    match view.energy_mode:
        case "fastest":
            return True
        case "balanced":
            return extra_j <= options.j_per_s * saved_s
        case "least-energy":
            return extra_j <= options.extra_j * table.step_j[base]


def _left_j(view: RequestView, table: DegreeTable) -> float:
    """What the budget leaves for denoising, as far as the joules of the other stages are known."""
    assert view.budget_j is not None
    return view.budget_j - sum(table.cost.aux_j.get(stage, 0.0) for stage in AUX_FROM[view.stage])
