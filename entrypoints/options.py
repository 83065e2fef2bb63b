"""The engine's options on the command line. They are made of the fields of `EngineConfig`: a field with `option` there
is an option here, with its type, bounds, default and help.
"""

import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import msgspec
from msgspec import inspect

from tetrion.engine.config import EngineConfig, PlannerConfig
from tetrion.entrypoints.errors import InputError
from tetrion.entrypoints.number_range import NumberRange

Command = Callable[..., Any]
OPTIONS_PREFIX = "options."
SECRETS = frozenset({"api_key", "api_keys"})
"""Options whose values are written nowhere."""
FIRST_MODELS = "profiles"
"""An option whose KEY= may be left out: it is the first model's then."""


class EngineOption(msgspec.Struct, frozen=True, kw_only=True):
    """One option. `path`: of its field, from `EngineConfig` on; `name`: what click calls its value."""

    path: tuple[str, ...]
    name: str
    click_option: Callable[[Command], Command]
    is_mapping: bool = False
    is_json: bool = False


def engine_options(command: Command) -> Command:
    """The options of every command that starts an engine."""
    return _with(OPTIONS, command)


def some_engine_options(*fields: str) -> Callable[[Command], Command]:
    """Those of these fields, for a command that has its own in place of others."""
    some = [option for option in OPTIONS if option.path[-1] in fields]
    assert len(some) == len(fields), f"not all of {fields} are options"
    return lambda command: _with(some, command)


def take_config(options: dict[str, Any]) -> EngineConfig:
    """The configuration that a command's `options` ask for; those of the engine are taken out. Raises InputError naming
    field and bound."""
    from tetrion.engine.planning.policies.registry import with_options

    given: dict[str, Any] = {}
    for option in OPTIONS:
        value = options.pop(option.name, None)
        if value is not None and value != ():
            *above, field = option.path
            target = given
            for name in above:
                target = target.setdefault(name, {})
            if option.is_json:
                target.setdefault(field, {}).update(planner_settings(value, option.name))
            else:
                target[field] = _mapping(option, value, given) if option.is_mapping else value
    try:
        config = msgspec.convert(given, EngineConfig)
        return msgspec.structs.replace(config, planner=with_options(config.planner))
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `$.")
        raise InputError(f"{path.rstrip('`') or 'config'}: {message}") from None
    except ValueError as error:
        raise InputError(str(error)) from None


def only_model(config: EngineConfig) -> str:
    """The model of a command that knows one. Raises InputError for several."""
    if len(config.models) > 1:
        raise InputError(f"model: this command takes one, got {len(config.models)}")
    return config.models[0]


def refuse_roles(config: EngineConfig) -> None:
    """Of a command that measures devices which serve all stages. Raises InputError."""
    from tetrion.engine.roles import ALL, AUTO

    if config.roles not in (ALL, AUTO):
        raise InputError(f"roles: this command measures devices that serve all stages, got {config.roles!r}")


# From texts to values ---------------------------------------------------------------------------------------------


def planner_settings(texts: Sequence[str], name: str = "planner") -> dict[str, Any]:
    """`lead_s=0.01`, `late_worth=2`, `options.late_worth=2` each: the planner's own fields, and under `options` those
    of its policy. Values are JSON where they are JSON, else strings. Raises InputError."""
    settings: dict[str, Any] = {"options": {}}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise InputError(f"{name}: expected KEY=VALUE such as drop=fraction, got {text!r}")
        own = key in PlannerConfig.__struct_fields__
        target = settings if own else settings["options"]
        try:
            target[key.removeprefix(OPTIONS_PREFIX)] = msgspec.json.decode(value)
        except msgspec.DecodeError:
            target[key.removeprefix(OPTIONS_PREFIX)] = value
    return settings


def _mapping(option: EngineOption, texts: tuple[str, ...], given: Mapping[str, Any]) -> dict[str, str]:
    mapping: dict[str, str] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if option.path[-1] == FIRST_MODELS and (not equals or Path(text).exists()):
            key, value = given.get("models", EngineConfig().models)[0], text
        elif not (key and equals and value):
            raise InputError(f"{option.name}: expected {option.name.upper()}=…, got {text!r}")
        if key in mapping:
            raise InputError(f"{option.name}: {key!r} is given twice")
        mapping[key] = value
    return mapping


# From fields to options -------------------------------------------------------------------------------------------


def _options_of(struct: type[msgspec.Struct], above: tuple[str, ...] = ()) -> list[EngineOption]:
    described = inspect.type_info(struct)
    assert isinstance(described, inspect.StructType)
    options = []
    for field in described.fields:
        path, kind = (*above, field.name), _plain(field.type)
        if isinstance(field.type, inspect.Metadata) and "description" in (field.type.extra_json_schema or {}):
            options.append(_option_of(path, field.type, field.default))
        if isinstance(kind, inspect.StructType):
            options += _options_of(kind.cls, path)
    return options


def _option_of(path: tuple[str, ...], described: inspect.Metadata, default: Any) -> EngineOption:
    extra, kind = described.extra or {}, _plain(described)
    flag = extra.get("flag", f"--{path[-1].replace('_', '-')}")
    says = (described.extra_json_schema or {})["description"]
    if isinstance(default, str | int | float) and not isinstance(default, bool):
        says += f" Default: {default:g}." if isinstance(default, float) else f" Default: {default}."
    is_mapping, is_json = isinstance(kind, inspect.DictType), isinstance(kind, inspect.StructType)
    attributes: dict[str, Any] = {"help": says, "metavar": extra.get("metavar")}
    if is_mapping or is_json or isinstance(kind, inspect.VarTupleType):
        attributes |= {"multiple": True}
    else:
        attributes |= {"type": _click_type(kind)}
    name = flag.removeprefix("--").replace("-", "_")
    return EngineOption(
        path=path,
        name=name,
        click_option=click.option(flag, name, **attributes),
        is_mapping=is_mapping,
        is_json=is_json,
    )


def _plain(kind: inspect.Type) -> inspect.Type:
    """Without its description, and without None."""
    while isinstance(kind, inspect.Metadata):
        kind = kind.type
    if isinstance(kind, inspect.UnionType):
        (kind,) = (one for one in kind.types if not isinstance(one, inspect.NoneType))
        return _plain(kind)
    return kind


def _click_type(kind: inspect.Type) -> Any:
    match kind:
        case inspect.LiteralType():
            return click.Choice([str(value) for value in kind.values])
        case inspect.IntType():
            return click.IntRange(min=kind.ge, max=kind.le)
        case inspect.FloatType(ge=None, gt=None, le=None):
            return float
        case inspect.FloatType():
            low = kind.ge if kind.ge is not None else kind.gt
            return NumberRange(low, kind.le, min_open=kind.ge is None)
        case inspect.StrType():
            return str
        case _:
            raise TypeError(f"no option can be of type {kind}")


def _with(options: list[EngineOption], command: Command) -> Command:
    for option in reversed(options):
        command = option.click_option(command)
    return command


OPTIONS = _options_of(EngineConfig)


def command_line(ctx: click.Context) -> str:
    """The command with every option that was given, but for what is secret."""
    words = ctx.command_path.split()
    for parameter in ctx.command.params:
        name = parameter.name or ""
        if ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE and name not in SECRETS:
            value = ctx.params[name]
            for item in value if isinstance(value, tuple) else (value,):
                words += [parameter.opts[-1]] if item is True else [parameter.opts[-1], str(item)]
    return shlex.join(words)
