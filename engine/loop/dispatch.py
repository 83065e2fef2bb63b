"""From an assignment to the command that carries it out."""

from collections.abc import Callable, Sequence
from typing import Any

from tetrion.engine.loop.requests import Request
from tetrion.engine.messages import Decode, Denoise, EncodePrompt, StageCommand
from tetrion.engine.planning.snapshot import Assignment


def command_for(
    assignment: Assignment,
    request: Request,
    command_id: int,
    round_id: int,
    acquire_image_slot: Callable[[], int | None],
    put_pictures: Callable[[Sequence[Any]], int | None],
) -> StageCommand | None:
    """The command for an assignment, or None while there is no room for its picture, or for those that it brings."""
    match assignment.stage:
        case "encode":
            input_slot = put_pictures(request.inputs) if request.inputs else None
            if request.inputs and input_slot is None:
                return None
            return encode_command(request, command_id, input_slot)
        case "denoise":
            return denoise_command(request, command_id, round_id, assignment)
        case "decode":
            image_slot = acquire_image_slot()
            if image_slot is None:
                return None
            return decode_command(request, command_id, assignment.members[0], image_slot)


def encode_command(request: Request, command_id: int, input_slot: int | None = None) -> EncodePrompt:
    """The first command of an attempt: its id is the state's."""
    return EncodePrompt(
        command_id=command_id,
        request_id=request.request_id,
        state_id=command_id,
        slot=request.slot,
        params=request.params,
        prompt=request.asked.prompt,
        negative_prompt=request.asked.negative_prompt,
        input_slot=input_slot,
        step_index=request.step_index,
        chunk_index=request.chunk_index,
    )


def denoise_command(request: Request, command_id: int, round_id: int, assignment: Assignment) -> Denoise:
    """The chunk that follows everything already dispatched for the request. After a loss it begins an attempt."""
    return Denoise(
        command_id=command_id,
        round_id=round_id,
        request_id=request.request_id,
        state_id=command_id if request.is_retried else request.planned_state_id,
        source_state_id=request.planned_state_id,
        slot=request.slot,
        members=assignment.members,
        holders=request.planned_holders,
        source=request.planned_holders[0],
        step_index=request.planned_step_index,
        chunk_index=request.planned_chunk_index,
        chunk_steps=assignment.chunk_steps,
        params=request.params,
    )


def decode_command(request: Request, command_id: int, device_id: int, image_slot: int) -> Decode:
    holders = request.planned_holders
    return Decode(
        command_id=command_id,
        request_id=request.request_id,
        state_id=request.planned_state_id,
        slot=request.slot,
        chunk_index=request.planned_chunk_index,
        source=device_id if device_id in holders else holders[0],
        params=request.params,
        image_slot=image_slot,
    )
