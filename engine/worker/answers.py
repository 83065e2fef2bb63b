"""A command's answer: the event that a finished command is reported with, and the one for a command that failed.

Owns which of the command's fields go back. Times are CLOCK_MONOTONIC seconds.
"""

from typing import Literal

import torch

from tetrion.engine.messages import (
    Command,
    CopyLatents,
    Decode,
    Decoded,
    Denoise,
    Denoised,
    Encoded,
    EncodePrompt,
    Failed,
    GroupCommand,
    LatentsCopied,
)
from tetrion.engine.parallel.cpu.barrier import Aborted

MAX_MESSAGE_CHARS = 2000


def encoded(command: EncodePrompt, device_id: int, started_s: float, ended_s: float, num_text_tokens: int) -> Encoded:
    return Encoded(
        command_id=command.command_id,
        device_id=device_id,
        request_id=command.request_id,
        started_s=started_s,
        ended_s=ended_s,
        num_text_tokens=num_text_tokens,
    )


def denoised(command: Denoise, device_id: int, started_s: float, ended_s: float, waited_s: float) -> Denoised:
    return Denoised(
        command_id=command.command_id,
        device_id=device_id,
        request_id=command.request_id,
        step_index=command.step_index + command.chunk_steps,
        started_s=started_s,
        ended_s=ended_s,
        waited_s=waited_s,
    )


def decoded(command: Decode, device_id: int, started_s: float, ended_s: float) -> Decoded:
    return Decoded(
        command_id=command.command_id,
        device_id=device_id,
        request_id=command.request_id,
        image_slot=command.image_slot,
        started_s=started_s,
        ended_s=ended_s,
    )


def latents_copied(command: CopyLatents, device_id: int, shape: tuple[int, ...]) -> LatentsCopied:
    num_tokens, num_channels = shape
    return LatentsCopied(
        command_id=command.command_id,
        device_id=device_id,
        request_id=command.request_id,
        image_slot=command.image_slot,
        num_tokens=num_tokens,
        num_channels=num_channels,
    )


def failed(command: Command, device_id: int, error: Exception) -> Failed:
    kind: Literal["aborted", "out_of_memory", "error"]
    match error:
        case Aborted():
            kind, message = "aborted", "aborted: another member of its group failed or was lost"
        case MemoryError() | torch.OutOfMemoryError():
            kind, message = "out_of_memory", f"out of memory: {error}"
        case _:
            kind, message = "error", f"{type(error).__name__}: {error}"
    return Failed(
        command_id=command.command_id,
        device_id=device_id,
        request_id=command.request_id if isinstance(command, GroupCommand) else "",
        kind=kind,
        message=message[:MAX_MESSAGE_CHARS],
    )
