"""What is refused for its energy: modes without joules to plan with, and budgets that nothing feasible fits into.

Feasible is what meets the deadline with all devices idle; whether others leave it the time is `admission`'s question.
Pure arithmetic.
"""

import math

from tetrion.engine.config import PlannerConfig
from tetrion.engine.errors import BudgetUnmeetable, CheapestPlan, DeadlineUnmeetable, RequestError
from tetrion.engine.planning.cost.tables import CostTables
from tetrion.engine.planning.degrees import DegreeTable, DegreeTables
from tetrion.engine.planning.energy_mode import ROUNDING_J, cheapest_plan
from tetrion.engine.planning.horizon_options import horizon_options
from tetrion.engine.planning.slo import denoise_due_s
from tetrion.engine.request import EnergyOptions, ResolvedRequest
from tetrion.engine.stages import AUX_STAGES, BEFORE_STEPS

POLICY = "horizon"
NO_JOULES = "the cost table measured at the start has no joules (step_j); name one that has with profile"


def check_wish(resolved: ResolvedRequest, tables: DegreeTables, config: PlannerConfig, deliver_s: float = 0.0) -> None:
    """Raises RequestError for a mode or budget that cannot be planned for, BudgetUnmeetable for one too small.
    `deliver_s` of the time until the deadline are for the delivery."""
    asked, params = resolved.asked, resolved.params
    wish = asked.energy
    if wish == EnergyOptions() or asked.force_degrees:
        return
    name = params.model, params.shape.cost_key
    needs_joules = wish.budget_j is not None or wish.mode not in (None, "fastest")
    if needs_joules and (reason := why_not(tables[name], name[1], config)):
        raise RequestError("energy.mode" if wish.budget_j is None else "energy.budget_j", reason)
    if wish.budget_j is not None:
        slo_s = None if asked.slo_ms is None else asked.slo_ms / 1e3 - deliver_s
        cheapest = cheapest_for(tables[name], params.num_steps, slo_s)
        if cheapest.joules > wish.budget_j + ROUNDING_J:
            raise BudgetUnmeetable(wish.budget_j, cheapest)


def check_early(resolved: ResolvedRequest, costs: CostTables, num_devices: int, config: PlannerConfig) -> None:
    """What is known before the start: `costs` are the tables that are there by then. Of a model that has none one will
    be measured, without joules. Raises as `check_wish`, and DeadlineUnmeetable for a deadline that no plan meets, where
    admission refuses such."""
    model = resolved.params.model
    if model not in costs.profiles:
        wish = resolved.asked.energy
        if wish.budget_j is not None or wish.mode not in (None, "fastest"):
            field = "energy.mode" if wish.budget_j is None else "energy.budget_j"
            is_ours = config.policy == POLICY
            raise RequestError(field, NO_JOULES if is_ours else _only_horizon(config))
        return
    tables = DegreeTables(costs, num_devices)
    check_wish(resolved, tables, config)
    slo_ms = resolved.asked.slo_ms
    if slo_ms is not None and config.admission == "reject-hopeless":
        table = tables[model, resolved.params.shape.cost_key]
        denoise_s = resolved.params.num_steps * table.fastest_step_s
        least_ms = math.ceil(1e3 * (table.before_s[BEFORE_STEPS[0]] + denoise_s + table.after_s))
        if slo_ms < least_ms:
            raise DeadlineUnmeetable(slo_ms, least_ms)


def check_default(costs: CostTables | None, num_devices: int, config: PlannerConfig) -> None:
    """Raises ValueError if an engine cannot have the energy mode of `config`. `costs` None: some table will be measured
    at the start, and has no joules."""
    mode = horizon_options(config).energy
    if mode == "fastest":
        return
    reason = NO_JOULES
    if costs is not None:
        tables = DegreeTables(costs, num_devices)
        names = [(model, key) for model, profile in costs.profiles.items() for key in profile.classes]
        reason = next(filter(None, (why_not(tables[name], name[1], config) for name in names)), "")
    if reason:
        raise ValueError(f"planner.options.energy: {mode!r} is not possible: {reason}")


def cheapest_for(table: DegreeTable, num_steps: int, slo_s: float | None) -> CheapestPlan:
    """The least joules that the request can be drawn with, within `slo_s` if that is possible at all. The joules of the
    table's steps must be known."""
    before_s, aux_j = table.before_s[BEFORE_STEPS[0]], table.cost.aux_j
    available_s = math.inf if slo_s is None else denoise_due_s(slo_s, table.after_s) - before_s
    in_time = cheapest_plan(table, num_steps, available_s)
    plan = in_time or cheapest_plan(table, num_steps, math.inf)
    assert plan is not None, "any degree is fast enough where time is endless"
    return CheapestPlan(
        degrees=plan.degrees,
        seconds=before_s + plan.seconds + table.after_s,
        joules=plan.joules + sum(aux_j.values()),
        uncounted=tuple(stage for stage in AUX_STAGES if stage not in aux_j),
        in_time=None if slo_s is None else in_time is not None,
    )


def why_not(table: DegreeTable, key: str, config: PlannerConfig) -> str:
    """Why nothing of this cost key can be planned by its joules; empty if it can."""
    if config.policy != POLICY:
        return _only_horizon(config)
    unknown = [degree for degree in table.degrees if degree not in table.cost.step_by_degree_j]
    if not unknown:
        return ""
    return f"the profile has no joules (step_j) for {key} at degree {', '.join(map(str, unknown))}"


def _only_horizon(config: PlannerConfig) -> str:
    return f"only the policy {POLICY} plans by energy, this engine runs {config.policy}"
