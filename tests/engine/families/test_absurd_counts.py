"""Whatever number a config has in whatever place: it is taken or refused at once, and little memory is touched."""

import json
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.engine.families.folders import copied
from tetrion.engine.config import EngineConfig, LoadFormat, parse_devices
from tetrion.engine.executors.fleet.segments import Segments
from tetrion.engine.families.registry import read_model_spec
from tetrion.engine.model_spec import CheckpointError
from tetrion.engine.transport.segment import SharedMemoryError

COUNTS = st.sampled_from([0, 1, 2, 999, 1000, 4096, 20_000, 65_536, 10**6, 10**7, 10**9, 2**31, 2**63, 10**18])
LENGTHS = st.sampled_from([0, 1, 10, 1000, 100_000, 1_000_000])
MOST_BYTES = 200 << 20
MOST_CPU_S = 5.0
Place = tuple[str, tuple[str | int, ...]]


@pytest.fixture(scope="module", params=["shapes", "shapes-sd3"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copied(request.param, tmp_path_factory.mktemp("absurd") / request.param)


def numbers_and_lists(value: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    if isinstance(value, dict):
        return [found for key in value for found in numbers_and_lists(value[key], (*path, key))]
    return [path] if path and isinstance(value, int | float | list) and not isinstance(value, bool) else []


def places(folder: Path) -> list[Place]:
    files = [
        path for path in sorted(folder.rglob("*.json")) if path.name != "tokenizer.json" and "index" not in path.name
    ]
    return [
        (str(path.relative_to(folder)), place)
        for path in files
        for place in numbers_and_lists(json.loads(path.read_bytes()))
    ]


def replaced(value: Any, place: tuple[str | int, ...], count: int, length: int) -> Any:
    if place:
        return value | {place[0]: replaced(value[place[0]], place[1:], count, length)}
    return [value[0] if value else 0] * length if isinstance(value, list) else count


@pytest.fixture(scope="module", params=["z-image", "flux2-klein-4b", "qwen-image"])
def configs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of models that do not ship with the package."""
    return copied(request.param, tmp_path_factory.mktemp("absurd") / request.param)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_absurd_counts_of_others(configs: Path, data: st.DataObject) -> None:
    check(configs, "dummy", data)


@pytest.mark.parametrize("load_format", ["safetensors", "dummy"])
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_absurd_counts(folder: Path, load_format: LoadFormat, data: st.DataObject) -> None:
    check(folder, load_format, data)


def check(folder: Path, load_format: LoadFormat, data: st.DataObject) -> None:
    changed = data.draw(st.lists(st.sampled_from(places(folder)), min_size=1, max_size=3, unique=True))
    before: dict[Path, bytes] = {}
    try:
        for name, place in changed:
            path = folder / name
            before.setdefault(path, path.read_bytes())
            content = replaced(json.loads(path.read_bytes()), place, data.draw(COUNTS), data.draw(LENGTHS))
            path.write_bytes(json.dumps(content).encode())
        assert_little_is_taken(folder, load_format)
    finally:
        for path, content in before.items():
            path.write_bytes(content)


def assert_little_is_taken(folder: Path, load_format: LoadFormat) -> None:
    """Up to the point where workers would start, with slabs for one request."""
    tracemalloc.start()
    begun_s = time.process_time()
    try:
        spec = read_model_spec(folder, load_format)
        Segments(parse_devices("cpu:1"), [spec], EngineConfig(max_inflight=1)).close()
    except (CheckpointError, SharedMemoryError) as error:
        text = str(error)
        assert text.isprintable() and len(text) <= 1000
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert time.process_time() - begun_s < MOST_CPU_S and peak < MOST_BYTES
