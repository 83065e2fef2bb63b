"""The `edf` policy: earliest deadline first, each at the narrowest degree in time, and left-over devices used.

As `edf-best-fit`, and then what is left widens whoever gains most by it, late ones too. It neither looks ahead nor
gives anything up: a late request keeps its place in the order, so none waits long, and under overload all are late.
"""

from tetrion.engine.planning.forward_fill import Work
from tetrion.engine.planning.policies.best_fit import best_fit
from tetrion.engine.planning.policies.leftover import widen_whoever_gains
from tetrion.engine.planning.policies.stages import ready_to_denoise, start_aux
from tetrion.engine.planning.round_builder import RoundBuilder
from tetrion.engine.planning.slo import denoise_due_s, due_s, urgency
from tetrion.engine.planning.snapshot import RoundPlan, Snapshot


def plan(snapshot: Snapshot) -> RoundPlan:
    """The next round. Pure: same snapshot, same plan."""
    if not snapshot.devices:
        return RoundPlan()
    builder = RoundBuilder(snapshot)
    requests = sorted(snapshot.all_requests, key=lambda request: urgency(request, snapshot.config))
    start_aux(builder, requests)
    left, starting = builder.room, []
    for request in ready_to_denoise(builder, requests):
        if not left:
            break
        table = snapshot.tables[request.model, request.cost_key]
        due = denoise_due_s(due_s(request, snapshot.config), table.after_s)
        work = Work(request, table, max(snapshot.now_s, request.ready_s), due, True)
        work.target = table.largest[min(best_fit(snapshot, request, table), left)]
        left -= work.target
        if work.target:
            starting.append(work)
    widen_whoever_gains(starting, left)
    builder.start_all([(work.view, work.target, None) for work in starting])
    return builder.build()
