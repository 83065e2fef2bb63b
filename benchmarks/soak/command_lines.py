"""Odd command lines of `tetrion`, run up to the start of an engine: exit codes as documented, no traceback, nothing
above two seconds.

    python -m benchmarks.soak.command_lines --count 500 --seed 1

Options are those that the commands have; values are right ones, absurd numbers, files that are missing or of another
kind, and text of every sort. Commands that would measure for minutes get an option that they do not know.
"""

import os
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path

import click

from benchmarks.soak.cases import case_options, finish, run_cases
from tetrion.entrypoints.cli import cli

NUMBERS = (
    *("0", "-1", "1", "2", "16", "0.5", "1e9", "1e400", "-1e-320", "nan", "inf", "-inf", "1_000", "0x10", "١٢", "１"),
    *("999999999999999999999", str(2**31), str(2**63), "1" * 5000, "+3", " 4", "1e", "1,2", "00"),
)
TEXTS = (
    *(
        "",
        " ",
        "-",
        "--",
        "a",
        "a red circle",
        "é" * 300,
        "红色圆圈",
        "🟥",
        "\u202e\x1b[31m",
        "a\nb",
        "\udc80",
        "x" * 100_000,
    ),
    *(
        "=",
        "a=",
        "=b",
        "a=b",
        "a=1",
        "shapes=",
        "shapes=/dev/null",
        "drop=fraction",
        "policy=nobody",
        "late_worth={" * 50,
    ),
    *("[" * 100_000, "null", "true", "128x128", "0x0", "128×128", "999999x999999", "-1x5", "cpu:1", "cpu:0", "cpu:-1"),
    *(
        "cpu:99999999999",
        "cuda:0",
        "cuda:99",
        "cpu:1,cpu:1",
        "cpu:",
        "gpu",
        "shapes",
        "shapes-sd3",
        "owner/name@..",
        "~x/y",
    ),
    *("http://", "https://[", "file:///etc/passwd", "ftp://a", "1,2,1", "1,,2", "9999", "fastest", "least-energy"),
)
COMMANDS = ("generate", "batch", "serve", "recommend", "profile", "bench slo", "bench step", "bench timeline")
LIGHT = ("generate", "batch", "serve")
"""Those that end where an engine would be started."""


class CommandLines:
    """`folder` has files of several kinds that command lines may name."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        (folder / "empty").touch()
        (folder / "binary").write_bytes(bytes(range(256)) * 8)
        (folder / "deep.json").write_bytes(b"[" * 200_000)
        (folder / "object.json").write_text('{"a": [1, {"b": null}]}')
        (folder / "lines.jsonl").write_text('{"prompt": "a red circle"}\n{"prompt": 1}\n')
        (folder / "text.txt").write_text("a red circle\n\n蓝色\n")
        (folder / "folder").mkdir()
        os.mkfifo(folder / "unread")  # for names of outputs; inputs that are pipes are waited for, as by every program
        self._inputs = [str(path) for path in sorted(folder.iterdir()) if path.name != "unread"]
        self._inputs += ["/dev/null", "/proc/self/mem", str(folder / "missing"), str(folder / "empty/below")]
        self._inputs += [str(folder / ("n" * 300)), str(folder / "\udcff"), "/proc/1/root/x"]

    def draw(self, chance: random.Random) -> tuple[str, Sequence[str]]:
        name = chance.choice(COMMANDS if chance.random() < 0.3 else LIGHT)
        command: click.Command = cli
        for word in name.split():
            assert isinstance(command, click.Group)
            command = command.commands[word]
        arguments = name.split()
        options = [one for one in command.params if isinstance(one, click.Option)]
        chosen = chance.sample(options, min(len(options), chance.choice((0, 1, 1, 2, 3, 6))))
        for option in chosen:
            arguments += [chance.choice([*option.opts, *option.secondary_opts])]
            if not option.is_flag or chance.random() < 0.05:
                arguments.append(self._value(chance, option))
        if name == "batch" or chance.random() < 0.5:
            arguments += [self._any(chance) for _ in range(chance.choice((1, 1, 1, 2, 20)))]
        if name == "serve" and "--port" not in arguments:
            arguments += ["--port", "0"]
        if chance.random() < 0.05:
            arguments.insert(
                chance.randrange(len(arguments) + 1), chance.choice(("--help", "--no-such", "-", "--", "-x"))
            )
        if name not in LIGHT:
            arguments.append("--no-such-option")
        if "--output" not in arguments and name in ("generate", "batch"):
            arguments += ["--output", str(self._folder / "out")]
        return " ".join(repr(word[:60]) for word in arguments), arguments

    def _value(self, chance: random.Random, option: click.Option) -> str:
        """Half of them of the kind that is wanted."""
        if isinstance(option.type, click.Choice) and chance.random() < 0.5:
            return chance.choice(list(map(str, option.type.choices)))
        is_number = isinstance(option.type, (click.types.IntParamType, click.types.FloatParamType))
        if is_number and chance.random() < 0.8:
            return chance.choice(NUMBERS)
        return self._any(chance)

    def _any(self, chance: random.Random) -> str:
        return chance.choice(chance.choice((NUMBERS, TEXTS, TEXTS, self._inputs)))


@click.command(help=__doc__)
@case_options
def main(count: int, seed: int, first: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        before = Path.cwd()
        os.chdir(name)  # whatever is written without a folder's name is written there
        try:
            result = run_cases(
                CommandLines(Path(name)).draw, count, seed, first, ("accepted", "exit 0", "exit 1", "exit 2")
            )
        finally:
            os.chdir(before)
    finish(result)


if __name__ == "__main__":
    main()
