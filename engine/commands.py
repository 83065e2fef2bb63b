"""From an assignment to the command that carries it out, and how long that is predicted to take."""

from collections.abc import Callable

from tetrion.engine.messages import CopyLatents, Decode, Denoise, EncodePrompt, GroupCommand
from tetrion.engine.planning.cost_tables import CostTables
from tetrion.engine.planning.snapshot import Assignment
from tetrion.engine.request_table import Request


def command_for(
    assignment: Assignment,
    request: Request,
    command_id: int,
    round_id: int,
    acquire_image_slot: Callable[[], int | None],
) -> GroupCommand | None:
    """The command for an assignment, or None while there is no room for its picture. `command_id` is also the state's
    id of an attempt that begins with it."""
    match assignment.stage:
        case "encode":
            request.state_id = command_id
            return encode_command(request, command_id)
        case "denoise":
            return denoise_command(request, command_id, round_id, assignment)
        case "decode":
            image_slot = acquire_image_slot()
            if image_slot is None:
                return None
            return decode_command(request, command_id, assignment.members[0], image_slot)


def encode_command(request: Request, command_id: int) -> EncodePrompt:
    return EncodePrompt(
        command_id=command_id,
        request_id=request.request_id,
        state_id=request.state_id,
        slot=request.slot,
        params=request.params,
        prompt=request.asked.prompt,
        negative_prompt=request.asked.negative_prompt,
    )


def denoise_command(request: Request, command_id: int, round_id: int, assignment: Assignment) -> Denoise:
    """The chunk that follows everything already dispatched for the request."""
    return Denoise(
        command_id=command_id,
        round_id=round_id,
        request_id=request.request_id,
        state_id=request.state_id,
        slot=request.slot,
        members=assignment.members,
        holders=request.planned_holders,
        source=request.planned_holders[0],
        step_index=request.planned_step_index,
        chunk_steps=assignment.chunk_steps,
        params=request.params,
    )


def decode_command(request: Request, command_id: int, device_id: int, image_slot: int) -> Decode:
    holders = request.planned_holders
    return Decode(
        command_id=command_id,
        request_id=request.request_id,
        state_id=request.state_id,
        slot=request.slot,
        source=device_id if device_id in holders else holders[0],
        params=request.params,
        image_slot=image_slot,
    )


def predict_s(command: GroupCommand, costs: CostTables) -> float:
    """Seconds the command will take once its devices are free."""
    cost = costs.cost(command.params.model, command.params.shape.cost_key)
    match command:
        case EncodePrompt():
            return cost.encode_s
        case Denoise():
            return command.chunk_steps * cost.step_s(len(command.members))
        case Decode():
            return cost.decode_s
        case CopyLatents():
            return 0.0


def predict_j(command: GroupCommand, costs: CostTables) -> float:
    """Joules the command will take over all of its members, as far as the profile knows or estimates them."""
    cost = costs.cost(command.params.model, command.params.shape.cost_key)
    match command:
        case EncodePrompt():
            return cost.encode_j or 0.0
        case Denoise():
            return command.chunk_steps * cost.step_by_degree_j.get(len(command.members), 0.0)
        case Decode():
            return cost.decode_j or 0.0
        case CopyLatents():
            return 0.0
