"""What a worker answers for a command that failed."""

import torch

from tetrion.engine.messages import Command, Failed, failed
from tetrion.engine.model_spec import CheckpointError
from tetrion.engine.parallel.cpu.barrier import Aborted

MAX_MESSAGE_CHARS = 2000


class NotFinite(ArithmeticError):
    """A picture was made of NaN or infinities."""

    def __init__(self) -> None:
        super().__init__(
            "its picture has values that are no numbers (NaN or infinity): the checkpoint's weights may be damaged, or"
            " too large for the precision that they are run in (bf16 on GPUs)"
        )


def failure_of(command: Command, device_id: int, error: Exception) -> Failed:
    match error:
        case Aborted():
            return failed(command, device_id, "aborted", "aborted: another member of its group failed or was lost")
        case MemoryError() | torch.OutOfMemoryError():
            return failed(command, device_id, "out_of_memory", f"out of memory: {error}"[:MAX_MESSAGE_CHARS])
        case NotFinite():
            return failed(command, device_id, "error", str(error))
        case CheckpointError():
            return failed(command, device_id, "checkpoint", str(error))
        case _:
            return failed(command, device_id, "error", f"{type(error).__name__}: {error}"[:MAX_MESSAGE_CHARS])
