"""From an assignment to the command that carries it out, and how long that is predicted to take."""

from collections.abc import Callable

from tetrion.engine.messages import CopyLatents, Decode, Denoise, EncodePrompt, GroupCommand
from tetrion.engine.planning.profile import Profile
from tetrion.engine.planning.snapshot import Assignment
from tetrion.engine.request_table import Request
from tetrion.engine.shape import Params, StepShape


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


def params_of(request: Request) -> Params:
    width, height = request.size
    unit = 16
    return Params(
        model="shapes",
        shape=StepShape(width=width, height=height, image=(width // unit) * (height // unit), text=(64,)),
        num_steps=request.num_steps,
        guidance=request.params.guidance or 0.0,
        seed=request.params.seed or 0,
    )


def encode_command(request: Request, command_id: int) -> EncodePrompt:
    assert request.params.seed is not None
    return EncodePrompt(
        command_id=command_id,
        request_id=request.request_id,
        state_id=request.state_id,
        slot=request.slot,
        params=params_of(request),
        prompt=request.params.prompt,
    )


def denoise_command(request: Request, command_id: int, round_id: int, assignment: Assignment) -> Denoise:
    """The chunk that follows everything already dispatched for the request."""
    assert request.params.guidance is not None
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
        params=params_of(request),
    )


def decode_command(request: Request, command_id: int, device_id: int, image_slot: int) -> Decode:
    holders = request.planned_holders
    return Decode(
        command_id=command_id,
        request_id=request.request_id,
        state_id=request.state_id,
        slot=request.slot,
        source=device_id if device_id in holders else holders[0],
        params=params_of(request),
        image_slot=image_slot,
    )


def predict_s(command: GroupCommand, profile: Profile) -> float:
    """Seconds the command will take once its devices are free."""
    match command:
        case EncodePrompt():
            return profile.encode_s(command.params.shape.width, command.params.shape.height)
        case Denoise():
            return command.chunk_steps * profile.step_s(command.params.shape.width, command.params.shape.height, len(command.members))
        case Decode():
            return profile.decode_s(command.params.shape.width, command.params.shape.height)
        case CopyLatents():
            return 0.0


def predict_j(command: GroupCommand, profile: Profile) -> float:
    """Joules the command will take over all of its members, as far as the profile knows or estimates them."""
    cost = profile.cost(command.params.shape.width, command.params.shape.height)
    match command:
        case EncodePrompt():
            return cost.encode_j or 0.0
        case Denoise():
            return command.chunk_steps * cost.step_by_degree_j.get(len(command.members), 0.0)
        case Decode():
            return cost.decode_j or 0.0
        case CopyLatents():
            return 0.0
