"""The `edf-best-fit` policy: earliest deadline first, each at the narrowest degree that meets its deadline.

A request that no degree can bring home in time keeps its place in the order and runs at the narrowest; one that needs
more devices than are idle takes what there is. Devices that are left stay idle. It never looks ahead.
"""

from tetrion.engine.planning.degrees import DegreeTable
from tetrion.engine.planning.policies.stages import ready_to_denoise, start_aux
from tetrion.engine.planning.round_builder import RoundBuilder
from tetrion.engine.planning.slo import denoise_due_s, due_s, urgency
from tetrion.engine.planning.snapshot import RequestView, RoundPlan, Snapshot


def plan(snapshot: Snapshot) -> RoundPlan:
    """The next round. Pure: same snapshot, same plan."""
    if not snapshot.devices:
        return RoundPlan()
    builder, tables = RoundBuilder(snapshot), snapshot.tables
    requests = sorted(snapshot.all_requests, key=lambda request: urgency(request, snapshot.config))
    start_aux(builder, requests)
    for request in ready_to_denoise(builder, requests):
        table = tables[request.model, request.cost_key]
        degree = table.largest[min(best_fit(snapshot, request, table), builder.room)]
        if degree:
            builder.start(request, degree)
    return builder.build()


def best_fit(snapshot: Snapshot, request: RequestView, table: DegreeTable) -> int:
    """The narrowest degree that meets the deadline from now on; the narrowest of all where none does."""
    due = denoise_due_s(due_s(request, snapshot.config), table.after_s)
    budget_s = due - max(snapshot.now_s, request.ready_s)
    remaining = request.num_steps - request.step_index
    return next((d for d in table.degrees if remaining * table.step_s[d] <= budget_s), table.narrowest)
