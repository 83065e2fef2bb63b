"""The `fixed-K` policy: static groups of K devices, first come first served. What xDiT, SGLang and diffusers do.

A request keeps its group from encode to decode; encode and decode run on the group's member that holds its state.
Groups are of devices that denoise. A stage that not every group has a device for is done by any device that serves it,
and a request has a group from its first step on.
Devices that are left over when K does not divide their number stay idle, as they do in those systems.
"""

from collections.abc import Sequence

from tetrion.engine.planning.degrees import usable_degrees
from tetrion.engine.planning.policies.stages import start_aux
from tetrion.engine.planning.round_builder import RoundBuilder
from tetrion.engine.planning.slo import arrival_order
from tetrion.engine.planning.snapshot import Assignment, Planner, RequestView, RoundPlan, Snapshot
from tetrion.engine.stages import AUX_STAGES, Stage

Group = tuple[int, ...]


def fixed_planner(group_size: int) -> Planner:
    """The policy `fixed-<group_size>`. Where `group_size` is no size for a group or exceeds the devices (that are
    left), the largest below it takes its place; inside a group, the largest degree that the class of a request has."""
    if group_size < 1:
        raise ValueError(f"policy: fixed-K needs K of at least 1, got {group_size}")

    def plan(snapshot: Snapshot) -> RoundPlan:
        if not snapshot.devices:
            return RoundPlan()
        builder, groups = RoundBuilder(snapshot), static_groups(snapshot, group_size)
        outside = [stage for stage in AUX_STAGES if not _all_serve(builder, groups, stage)]
        requests = sorted(snapshot.all_requests, key=arrival_order)
        start_aux(builder, [request for request in requests if request.stage in outside])
        next_of_group, waiting = _bind([request for request in requests if request.stage not in outside], groups)
        assignments = list(builder.build().assignments)
        for group in groups:
            if not builder.idle.issuperset(group):
                continue
            queue = next_of_group[group] or waiting
            ready = next((request for request in queue if builder.is_ready(request)), None)
            if ready is not None:
                queue.remove(ready)
                assignments.append(_assign(builder, ready, group))
        return RoundPlan(assignments=tuple(assignments))

    return plan


def static_groups(snapshot: Snapshot, group_size: int) -> list[Group]:
    """Devices that denoise, in their order, in groups of `group_size`."""
    ids = [device.device_id for device in snapshot.devices_for("denoise")]
    if not ids:
        return []
    size = max(degree for degree in snapshot.tables.group_sizes if degree <= group_size)
    return [tuple(ids[i : i + size]) for i in range(0, len(ids) - size + 1, size)]


def _all_serve(builder: RoundBuilder, groups: Sequence[Group], stage: Stage) -> bool:
    """Whether each group has a device that serves the stage."""
    return bool(groups) and all([any([builder.serves(device, stage) for device in group]) for group in groups])


def _bind(
    requests: Sequence[RequestView], groups: Sequence[Group]
) -> tuple[dict[Group, list[RequestView]], list[RequestView]]:
    """The requests of each group and those that have none yet, in the order given."""
    group_of = {device: group for group in groups for device in group}
    bound: dict[Group, list[RequestView]] = {group: [] for group in groups}
    waiting: list[RequestView] = []
    for request in requests:
        held = next((group_of[device] for device in request.members if device in group_of), None)
        (waiting if held is None else bound[held]).append(request)
    return bound, waiting


def _assign(builder: RoundBuilder, request: RequestView, group: Group) -> Assignment:
    snapshot = builder.snapshot
    if request.stage != "denoise":
        able = [device for device in group if builder.serves(device, request.stage)]
        holder = next((device for device in request.members if device in able), able[0])
        return Assignment(request_id=request.request_id, stage=request.stage, members=(holder,))
    table = snapshot.tables[request.model, request.cost_key]
    degree = usable_degrees(table.cost, tuple([d for d in table.legal if d <= len(group)]))[-1]
    return Assignment(
        request_id=request.request_id,
        stage="denoise",
        members=group[:degree],
        step_index=request.step_index,
        chunk_steps=request.chunk_steps(table.cost.step_s(degree), snapshot.config.chunk_s),
    )
