"""The options of a command from a YAML file, from `TETRION_*` in the environment, and in writing.

Strongest first: command line, environment, file, default. A key of the file is an option's name (`max_n` or `max-n`),
its value what the option takes: a list where an option may be repeated, a mapping where it takes KEY=VALUE. Nothing is
defined here: keys, bounds and defaults are those of the command's options. Knows nothing of what they mean.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import msgspec

from tetrion.engine.errors import shown
from tetrion.entrypoints.options import SECRETS
from tetrion.entrypoints.terminal import say

PREFIX = "TETRION"
OTHER_VARIABLES = frozenset({"TETRION_COMMIT", f"{PREFIX}_CONFIG"})
"""Variables that are no option's."""
MAX_BYTES = 1 << 20
OWN = frozenset({"config", "print_config", "help"})
"""Options that no file can give."""
SOURCES = {
    click.core.ParameterSource.COMMANDLINE: "command line",
    click.core.ParameterSource.ENVIRONMENT: "environment",
    click.core.ParameterSource.DEFAULT_MAP: "file",
}
HIDDEN = "***"


class ConfigurableCommand(click.Command):
    """A command whose options can be given by the environment, too."""

    def __init__(self, *arguments: Any, **attributes: Any) -> None:
        super().__init__(*arguments, **attributes)
        for option in _options(self):
            option.envvar = variable_of(option)


def config_options(command: Any) -> Any:
    """`--config FILE` and `--print-config`."""
    command = click.option(
        "--print-config",
        is_flag=True,
        help="Print what would be served, with where each value is from, and end.",
    )(command)
    return click.option(
        "--config",
        metavar="FILE",
        type=click.Path(path_type=Path),
        is_eager=True,
        expose_value=False,
        envvar=f"{PREFIX}_CONFIG",
        callback=_load,
        help="Options from this YAML file; the command line and TETRION_* variables count more. `tetrion config` prints"
        " one with every key.",
    )(command)


def _load(ctx: click.Context, parameter: click.Parameter, path: Path | None) -> None:
    """Click's callback: from now on the file's values are the options' defaults."""
    _warn_of_unknown(ctx.command)
    if path is not None:
        ctx.default_map = {**(ctx.default_map or {}), **read(path, ctx)}


def _warn_of_unknown(command: click.Command) -> None:
    known = {variable_of(option) for option in _options(command)} | OTHER_VARIABLES
    for name in sorted(os.environ):
        if name.startswith(PREFIX + "_") and name not in known:
            say(f"tetrion: {name} is set and is no option's; see `tetrion config`")


def read(path: Path, ctx: click.Context) -> dict[str, Any]:
    """The file's values by option, as click takes defaults. Raises click.UsageError naming file, key and bound."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        found = msgspec.yaml.decode(data) if len(data) <= MAX_BYTES else None
    except OSError as error:
        raise click.UsageError(f"config: cannot read {path}: {error.strerror}", ctx) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise click.UsageError(f"config: {path} is not YAML: {' '.join(str(error).split())}", ctx) from None
    if len(data) > MAX_BYTES:
        raise click.UsageError(f"config: {path} is larger than {MAX_BYTES >> 20} MiB", ctx)
    if not isinstance(found, dict | None):
        raise click.UsageError(f"config: {path}: expected a mapping of options, got {shown(found)}", ctx)
    options, values = _by_key(ctx.command), {}
    for key, value in (found or {}).items():
        option = options.get(str(key).replace("-", "_"))
        if option is None:
            names = ", ".join(sorted(key_of(option) for option in _options(ctx.command)))
            raise click.UsageError(f"config: {path}: unknown key {shown(key)}; there are: {names}", ctx)
        if option.name in values:
            raise click.UsageError(f"config: {path}: {key}: given twice", ctx)
        if value is None:
            continue
        try:
            given = _as_given(option, value)
            option.type_cast_value(ctx, given)
        except click.BadParameter as error:
            raise click.UsageError(f"config: {path}: {key}: {error.message}", ctx) from None
        values[str(option.name)] = given
    return values


def _as_given(option: click.Option, value: Any) -> Any:
    """What the command line would give. Raises click.BadParameter."""
    if option.is_flag:
        if not isinstance(value, bool):
            raise click.BadParameter(f"expected true or false, got {shown(value)}")
        return value
    if not option.multiple:
        return _text(value)
    if isinstance(value, Mapping):
        if "=" not in (option.metavar or ""):
            raise click.BadParameter(f"expected a value or a list of them, got {shown(value)}")
        return tuple(f"{key}={item if isinstance(item, str) else _json(item)}" for key, item in value.items())
    return tuple(map(_text, value if isinstance(value, Sequence) and not isinstance(value, str) else (value,)))


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise click.BadParameter(
            f"expected a text or number, got {shown(value)} (quote what YAML does not read as text)"
        )
    return str(value)


def _json(value: Any) -> str:
    try:
        return msgspec.json.encode(value).decode()
    except (TypeError, msgspec.EncodeError) as error:
        raise click.BadParameter(str(error)) from None


# Options ------------------------------------------------------------------------------------------------------------


def _options(command: click.Command) -> Iterator[click.Option]:
    for parameter in command.params:
        if isinstance(parameter, click.Option) and parameter.name not in OWN:
            yield parameter


def _by_key(command: click.Command) -> dict[str, click.Option]:
    return {key: option for option in _options(command) for key in (key_of(option), str(option.name))}


def key_of(option: click.Option) -> str:
    """The option's key in a file: its flag's words joined by underscores."""
    return max(option.opts, key=len).lstrip("-").replace("-", "_")


def variable_of(option: click.Option) -> str:
    """The environment variable that gives it."""
    return f"{PREFIX}_{key_of(option).upper()}"


# In writing ---------------------------------------------------------------------------------------------------------


def template(command: click.Command) -> str:
    """A file with every key of `command`, each commented out, with its help, bound and variable."""
    lines = [f"# Options of `{command.name}`, for --config FILE. Stronger: the environment, then the command line."]
    for option in _options(command):
        says = " ".join((option.help or "").split())
        lines += ["", *_comment(f"{says} {_bound(option)}".strip()), f"# {variable_of(option)}"]
        lines.append(f"#{key_of(option)}: {_example(option)}".rstrip())
    return "\n".join(lines)


def _comment(text: str, width: int = 100) -> list[str]:
    lines, line = [], "#"
    for word in text.split():
        if len(line) + 1 + len(word) > width:
            lines.append(line)
            line = "#"
        line += " " + word
    return [*lines, line]


def _bound(option: click.Option) -> str:
    if isinstance(option.type, click.Choice):
        return f"One of {', '.join(option.type.choices)}."
    describe = getattr(option.type, "_describe_range", None)
    return f"Allowed: {describe()}." if describe else ""


def _example(option: click.Option) -> str:
    if option.multiple:
        return "{}" if "=" in (option.metavar or "") else "[]"
    default = option.to_info_dict()["default"]
    return "" if default is None else _yaml(default)


def effective(ctx: click.Context) -> str:
    """What this command line, environment and file give, as a file; the rest has its defaults. Nothing secret."""
    lines = [f"# {ctx.command_path}: what is given; `tetrion config` has the rest."]
    for option in _options(ctx.command):
        source = ctx.get_parameter_source(str(option.name))
        if source in SOURCES:
            value = HIDDEN if option.name in SECRETS else ctx.params[str(option.name)]
            lines.append(f"{key_of(option)}: {_yaml(value)}  # {SOURCES[source]}")
    return "\n".join(lines)


def _yaml(value: Any) -> str:
    """On one line."""
    if isinstance(value, tuple):
        value = [str(item) for item in value]
    return msgspec.json.encode(str(value) if isinstance(value, Path) else value).decode()
