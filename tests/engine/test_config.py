from pathlib import Path

import msgspec
import numpy as np
import pytest

from tetrion.engine.config import EngineConfig, PlannerConfig, checked, parse_devices, threads_per_worker
from tetrion.engine.planning.horizon_options import HorizonOptions
from tetrion.engine.planning.policies.registry import with_options


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tetrion.engine.config.visible_gpus", lambda: ("H100", "H100"))


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tetrion.engine.config.visible_gpus", lambda: ())


def test_devices_default_to_two_cpu_workers(no_gpu: None) -> None:
    assert [device.name for device in parse_devices(None)] == ["cpu:0", "cpu:1"]


def test_devices_default_to_every_gpu(two_gpus: None) -> None:
    assert parse_devices(None) == parse_devices("cuda") == parse_devices("cuda:0,1")


def test_a_gpu_may_be_named_twice(two_gpus: None) -> None:
    devices = parse_devices("cuda:1, 1,0")
    assert [(device.device_id, device.name) for device in devices] == [(0, "cuda:1"), (1, "cuda:1"), (2, "cuda:0")]


@pytest.mark.parametrize("text", ["cpu", "cpu:0", "cpu:-1", "cpu:65", "cpu:two", "tpu:1", " ", "cuda:0", "cuda"])
def test_bad_devices_name_the_field(no_gpu: None, text: str) -> None:
    with pytest.raises(ValueError, match=r"^devices: .*cpu:N"):
        parse_devices(text)


@pytest.mark.parametrize("text", ["cuda:2", "cuda:", "cuda:0;1", "cuda:-1", "cuda:" + ",".join("0" * 65)])
def test_gpus_that_are_not_there(two_gpus: None, text: str) -> None:
    with pytest.raises(ValueError, match=r"^devices: expected cuda:I,J,… with up to 64 numbers from 0 to 1"):
        parse_devices(text)


def test_threads_are_divided_but_never_zero() -> None:
    assert threads_per_worker(EngineConfig(), 10_000) == 1
    assert threads_per_worker(EngineConfig(num_threads=3), 2) == 3


@pytest.mark.parametrize(
    ("text", "field"),
    [('{"max_inflight": 0}', "max_inflight"), ('{"planner": {"lead_s": 2}}', "lead_s"), ('{"modle": "x"}', "modle")],
)
def test_a_config_file_with_a_mistake_names_it(text: str, field: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=field):
        msgspec.json.decode(text, type=EngineConfig)


def test_a_configuration_made_in_python_is_looked_at_as_well() -> None:
    given = EngineConfig(num_threads=np.int64(2), models=(Path("shapes"),), stall_timeout_s=np.float32(7))  # type: ignore[arg-type]
    assert checked(given) == EngineConfig(num_threads=2, models=("shapes",), stall_timeout_s=7.0)
    assert checked(EngineConfig()) == EngineConfig()
    options = HorizonOptions(energy="balanced")
    planner = with_options(checked(EngineConfig(planner=PlannerConfig(options=options))).planner)
    assert planner.options == options
    for config, says in (
        (EngineConfig(num_threads=0), "num_threads: Expected `int` >= 1"),
        (EngineConfig(num_threads=True), "num_threads: Expected `int"),
        (EngineConfig(max_queued="7"), "max_queued: Expected `int`, got `str`"),  # type: ignore[arg-type]
        (EngineConfig(start_timeout_s=-1), "start_timeout_s: Expected `float` > 0.0"),
        (EngineConfig(models=()), "models: "),
        (EngineConfig(devices=object()), "config: .* is of no type that a configuration has"),  # type: ignore[arg-type]
        (EngineConfig(planner=PlannerConfig(chunk_s=0)), "planner.chunk_s: Expected `float` > 0.0"),
    ):
        with pytest.raises(ValueError, match=f"^{says}"):
            checked(config)
