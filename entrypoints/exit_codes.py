"""From the exceptions of a command to its exit code. Imports nothing but click until something goes wrong."""

from collections.abc import Callable

import click


def report_errors(command: Callable[[], int]) -> int:
    """Run `command`; what users or the machine caused becomes one line on stderr and an exit code."""
    try:
        return command()
    except Exception as error:
        from tetrion.entrypoints.errors import exit_code_and_line

        exit_code, line = exit_code_and_line(error)
        click.echo(f"tetrion: error: {line}", err=True)
        return exit_code
