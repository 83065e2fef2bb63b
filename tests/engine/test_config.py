import msgspec
import pytest

from tetrion.engine.config import EngineConfig, parse_devices, threads_per_worker


def test_devices_default_to_two_cpu_workers() -> None:
    assert [device.name for device in parse_devices(None)] == ["cpu:0", "cpu:1"]


@pytest.mark.parametrize("text", ["cpu", "cpu:0", "cpu:-1", "cpu:65", "cpu:two", "tpu:1", " ", "cuda:0"])
def test_bad_devices_name_the_field(text: str) -> None:
    with pytest.raises(ValueError, match=r"^devices: .*cpu:N"):
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
