"""What the planner is shown: the request table and what is in flight, as a `Snapshot` value.

Looks ahead: whatever is dispatched counts as done at its predicted end, so that a device's next command can be planned
shortly before its running one ends. Per request one command may run and one be queued behind it.
"""

from tetrion.engine.config import PlannerConfig
from tetrion.engine.executor import Executor
from tetrion.engine.inflight import InFlight, InFlightTable
from tetrion.engine.messages import Decode
from tetrion.engine.planning.profile import Profile
from tetrion.engine.planning.snapshot import DeviceView, RequestView, Snapshot, Stage
from tetrion.engine.request_table import Request, RequestState, RequestTable

MAX_COMMANDS_PER_REQUEST = 2


def take_snapshot(
    executor: Executor,
    table: RequestTable,
    in_flight: InFlightTable,
    legal_degrees: tuple[int, ...],
    profile: Profile,
    config: PlannerConfig,
) -> Snapshot:
    """All requests that can be given something now or later, and all devices that are alive."""
    now_s = executor.now_s()
    views = [view for request in table.admitted() if (view := _request_view(request, in_flight, now_s))]
    return Snapshot(
        now_s=now_s,
        requests=tuple(sorted(views, key=lambda view: view.request_id)),
        devices=tuple(
            DeviceView(device_id=device_id, free_s=_free_s(device_id, in_flight, now_s, config.lead_s))
            for device_id in executor.device_ids
            if device_id in executor.alive
        ),
        legal_degrees=legal_degrees,
        profile=profile,
        config=config,
    )


def _request_view(request: Request, in_flight: InFlightTable, now_s: float) -> RequestView | None:
    running = in_flight.of_request(request.request_id)
    stage = _next_stage(request, running)
    if stage is None:
        return None
    width, height = request.size
    return RequestView(
        request_id=request.request_id,
        stage=stage,
        width=width,
        height=height,
        step_index=request.planned_step_index,
        num_steps=request.num_steps,
        arrival_s=request.arrival_s,
        deadline_s=request.deadline_s,
        ready_s=max((entry.end_s for entry in running), default=now_s),
        members=request.planned_holders,
        weight=request.params.weight,
        priority=request.params.priority,
        force_degrees=request.params.force_degrees,
    )


def _next_stage(request: Request, running: list[InFlight]) -> Stage | None:
    if request.cancelled or len(running) >= MAX_COMMANDS_PER_REQUEST:
        return None
    if any(isinstance(entry.command, Decode) for entry in running):
        return None
    if request.state is RequestState.WAITING:
        return "encode"
    return "denoise" if request.planned_step_index < request.num_steps else "decode"


def _free_s(device_id: int, in_flight: InFlightTable, now_s: float, lead_s: float) -> float:
    """A device that holds as many commands as it may is beyond the lead, however soon they are predicted to end."""
    free_s = in_flight.free_s(device_id, now_s)
    return free_s if in_flight.has_room(device_id) else max(free_s, now_s + 2 * lead_s)
