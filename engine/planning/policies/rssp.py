"""The `rssp` policy: one fixed degree for each class, first come first served.

The degree is the one with the shortest step that the profile knows (a wider one counts only if it is faster). The
first request in line that does not fit waits, and all behind it wait too.
"""

from tetrion.engine.planning.policies.stages import ready_to_denoise, start_aux
from tetrion.engine.planning.round_builder import RoundBuilder
from tetrion.engine.planning.slo import arrival_order
from tetrion.engine.planning.snapshot import RoundPlan, Snapshot


def plan(snapshot: Snapshot) -> RoundPlan:
    """The next round. Pure: same snapshot, same plan."""
    if not snapshot.devices:
        return RoundPlan()
    builder, tables = RoundBuilder(snapshot), snapshot.tables
    requests = sorted(snapshot.all_requests, key=arrival_order)
    start_aux(builder, requests)
    for request in ready_to_denoise(builder, requests):
        degree = tables[request.model, request.cost_key].widest
        if degree > builder.room:
            break
        builder.start(request, degree)
    return builder.build()
