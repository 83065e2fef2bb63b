"""What went wrong, as an exit code and one line for a terminal.

Exit codes: 1 the engine or a request failed, 2 the input or the machine does not allow it, 130 interrupted by Ctrl-C,
141 nobody read the output to its end (which is not said: nobody would read it).
An exception that is not listed here is a defect: it keeps its traceback. Knows nothing of HTTP (see `http/errors.py`).
Imports little until something goes wrong, so that `--help` is quick.
"""

from collections.abc import Callable

from tetrion.entrypoints.terminal import EXIT_BROKEN_PIPE, is_reader_gone, say

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


class InputError(ValueError):
    """The command line, a file it names or the machine does not allow what was asked; the message names the field."""


def report_errors(command: Callable[[], int]) -> int:
    """Run `command`; what users or the machine caused becomes one line on stderr and an exit code."""
    try:
        return command()
    except Exception as error:
        if isinstance(error, BrokenPipeError) and is_reader_gone():
            return EXIT_BROKEN_PIPE
        exit_code, line = exit_code_and_line(error)
        say(f"tetrion: error: {line}")
        return exit_code


def exit_code_and_line(error: Exception) -> tuple[int, str]:
    """The exit code for `error` and the line that tells a user about it. Raises `error` again if it is a defect."""
    from tetrion.engine.energy.early_check import MeteringError
    from tetrion.engine.errors import (
        DeadlineUnmeetable,
        EngineOverloaded,
        GenerationError,
        RequestCancelled,
        RequestError,
    )
    from tetrion.engine.model_spec import CheckpointError
    from tetrion.engine.transport.segment import SharedMemoryError

    match error:
        case InputError() | RequestError() | CheckpointError() | MeteringError() | SharedMemoryError():
            return EXIT_BAD_INPUT, str(error)
        case GenerationError():
            return EXIT_FAILED, f"generation failed: {error}"
        case DeadlineUnmeetable():
            return EXIT_FAILED, f"deadline cannot be met: {error}"
        case EngineOverloaded():
            return EXIT_FAILED, f"engine overloaded: {error}"
        case RequestCancelled():
            return EXIT_FAILED, f"cancelled: {error}"
        case OSError():
            return EXIT_FAILED, str(error)
        case _:
            raise error
