"""The engine's options, made of the fields of its configuration."""

import json
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from tetrion.engine.config import EngineConfig, MeteringConfig, PlannerConfig
from tetrion.engine.planning.horizon_options import HorizonOptions, horizon_options
from tetrion.engine.planning.policies.registry import with_options
from tetrion.entrypoints.cli import run
from tetrion.entrypoints.errors import InputError
from tetrion.entrypoints.options import OPTIONS, engine_options, only_model, some_engine_options, take_config


def configured(*arguments: object) -> EngineConfig:
    """What a command with all options and these arguments gets."""
    made: list[EngineConfig] = []

    @click.command()
    @engine_options
    def command(**options: Any) -> None:
        made.append(take_config(options))
        assert not options

    result = CliRunner().invoke(command, [str(argument) for argument in arguments])
    if result.exception is not None:
        raise InputError(result.output) if isinstance(result.exception, SystemExit) else result.exception
    return made[0]


def test_without_options_all_is_as_the_configuration_has_it() -> None:
    assert configured() == EngineConfig(planner=with_options(PlannerConfig()))


def test_every_option_reaches_its_field() -> None:
    values = {
        "model": "a", "model_alias": "x=a", "devices": "cpu:3", "load_format": "dummy", "attention": "triton",
        "profile": "a=p.json", "num_threads": 2, "max_inflight": 3, "max_queued": 4, "queue_timeout_s": 6,
        "planner": "late_worth=2", "roles": "all",
        "policy": "horizon", "meter": "model", "carbon": 5,
        "start_timeout_s": 7, "stall_timeout_s": 8, "no_worker_timeout_s": 9,
    }  # fmt: skip
    assert {option.name for option in OPTIONS} == set(values)
    flags = [word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", value)]
    assert configured(*flags) == EngineConfig(
        models=("a",),
        model_aliases={"x": "a"},
        devices="cpu:3",
        roles="all",
        load_format="dummy",
        attention="triton",
        profiles={"a": "p.json"},
        num_threads=2,
        max_inflight=3,
        max_queued=4,
        queue_timeout_s=6.0,
        planner=with_options(PlannerConfig(policy="horizon", options={"late_worth": 2})),
        metering=MeteringConfig(meter="model", carbon=5.0),
        start_timeout_s=7.0,
        stall_timeout_s=8.0,
        no_worker_timeout_s=9.0,
    )


def test_what_is_repeated_adds_up() -> None:
    config = configured("--model", "a", "--model", "b", "--planner", "late_worth=2", "--planner", 'drop="fraction"')
    assert config.models == ("a", "b")
    assert horizon_options(config.planner) == HorizonOptions(late_worth=2.0, drop="fraction")


def test_a_table_without_a_model_is_the_first_ones(tmp_path: Path) -> None:
    odd = tmp_path / "a=b.json"
    odd.write_text("{}")
    assert configured("--profile", "p.json").profiles == {"shapes": "p.json"}
    both = configured("--model", "a", "--model", "b", "--profile", "b=q.json", "--profile", odd)
    assert both.profiles == {"a": str(odd), "b": "q.json"}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--max-inflight", "0"], "1<=x<=4096"),
        (["--num-threads", "0"], "x>=1"),
        (["--stall-timeout-s", "nan"], "x>0"),
        (["--load-format", "pickle"], "safetensors"),
        (["--planner", "late_worth"], "planner: expected KEY=VALUE"),
        (["--planner", "late_worth=-1"], "planner.options.late_worth: Expected `float` >= 0"),
        (["--planner", "colour=7"], "planner: there is no option 'colour'; policy horizon has drop, "),
        (["--meter", "gauge"], "metering.meter: "),
        (["--model-alias", "best"], "model_alias: expected MODEL_ALIAS=…, got 'best'"),
        (["--model-alias", "=a"], "model_alias: expected MODEL_ALIAS=…, got '=a'"),
        (["--profile", "x.json", "--profile", "y.json"], "profile: 'shapes' is given twice"),
        (["--model", "a"] * 33, "models: Expected `array` of length <= 32"),
    ],
)
def test_what_cannot_be_is_refused_with_its_name(arguments: list[str], says: str) -> None:
    with pytest.raises(InputError) as refused:
        configured(*arguments)
    assert says in str(refused.value)


def test_a_command_may_have_some_of_them() -> None:
    @click.command()
    @some_engine_options("models", "num_threads")
    def command(**options: Any) -> None:
        click.echo(json.dumps(options))

    result = CliRunner().invoke(command, ["--num-threads", "2"])
    assert json.loads(result.output) == {"model": [], "num_threads": 2}


def test_a_command_that_knows_one_model_refuses_several() -> None:
    assert only_model(EngineConfig()) == "shapes"
    with pytest.raises(InputError, match="model: this command takes one, got 2"):
        only_model(EngineConfig(models=("a", "b")))


def test_what_measures_every_stage_takes_no_roles(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["profile", "--devices", "cpu:2", "--roles", "0:encode+decode,1:denoise"]) == 2
    assert "roles: this command measures devices that serve all stages" in capsys.readouterr().err
