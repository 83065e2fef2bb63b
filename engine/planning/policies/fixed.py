"""The `fixed-K` policy: static groups of K devices, first come first served. What xDiT, SGLang and diffusers do.

A request keeps its group from encode to decode; encode and decode run on the group's member that holds its state.
Devices that are left over when K does not divide their number stay idle, as they do in those systems.
"""

from collections.abc import Sequence

from tetrion.engine.planning.degrees import usable_degrees
from tetrion.engine.planning.slo import arrival_order
from tetrion.engine.planning.snapshot import Assignment, Planner, RequestView, RoundPlan, Snapshot

Group = tuple[int, ...]


def fixed_planner(group_size: int) -> Planner:
    """The policy `fixed-<group_size>`. Where `group_size` is no size for a group or exceeds the devices (that are
    left), the largest below it takes its place; inside a group, the largest degree that the class of a request has."""
    if group_size < 1:
        raise ValueError(f"policy: fixed-K needs K of at least 1, got {group_size}")

    def plan(snapshot: Snapshot) -> RoundPlan:
        groups = static_groups(snapshot, group_size)
        next_of_group, waiting = _bind(snapshot.all_requests, groups)
        limit_s = snapshot.now_s + snapshot.config.lead_s
        idle = {device.device_id for device in snapshot.devices if device.free_s <= limit_s}
        assignments = []
        for group in groups:
            if not idle.issuperset(group):
                continue
            queue = next_of_group[group] or waiting
            ready = next((request for request in queue if request.ready_s <= limit_s), None)
            if ready is not None:
                queue.remove(ready)
                assignments.append(_assign(snapshot, ready, group))
        return RoundPlan(assignments=tuple(assignments))

    return plan


def static_groups(snapshot: Snapshot, group_size: int) -> list[Group]:
    """Consecutive devices in groups of `group_size`."""
    ids = [device.device_id for device in snapshot.devices]
    if not ids:
        return []
    size = max(degree for degree in snapshot.tables.group_sizes if degree <= group_size)
    return [tuple(ids[i : i + size]) for i in range(0, len(ids) - size + 1, size)]


def _bind(
    requests: Sequence[RequestView], groups: Sequence[Group]
) -> tuple[dict[Group, list[RequestView]], list[RequestView]]:
    """The requests of each group and those that have none yet, in order of arrival."""
    group_of = {device: group for group in groups for device in group}
    bound: dict[Group, list[RequestView]] = {group: [] for group in groups}
    waiting: list[RequestView] = []
    for request in sorted(requests, key=arrival_order):
        held = next((group_of[device] for device in request.members if device in group_of), None)
        (waiting if held is None else bound[held]).append(request)
    return bound, waiting


def _assign(snapshot: Snapshot, request: RequestView, group: Group) -> Assignment:
    if request.stage != "denoise":
        holder = next((device for device in request.members if device in group), group[0])
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
