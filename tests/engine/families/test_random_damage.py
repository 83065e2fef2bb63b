"""Whatever a checkpoint's files hold: it is taken, or refused in one line; nothing else is ever raised."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.engine.families.folders import copied
from tetrion.engine.families.registry import read_model_spec
from tetrion.engine.measure.checkpoint_identity import checkpoint_identity
from tetrion.engine.model_spec import CheckpointError
from tetrion.engine.models.ops import ReferenceOps
from tetrion.engine.models.registry import load_shared

LEAVES = (
    st.none() | st.booleans() | st.integers() | st.integers(-2, 2) | st.floats() | st.text(max_size=8)
    | st.sampled_from([2**63, -(2**63), 10**40, "", "..", "/", "\0", "\x1b", "\ud800", "null", 1e308])
)  # fmt: skip
VALUES = st.recursive(LEAVES, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=4), v, max_size=3))
Files = dict[Path, bytes]


@pytest.fixture(scope="module", params=["shapes", "shapes-sd3"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copied(request.param, tmp_path_factory.mktemp("damaged") / request.param)


@pytest.fixture(scope="module")
def files(folder: Path) -> Files:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.suffix in (".json", ".safetensors")}


def head_of(content: bytes) -> int:
    """Where the header of a safetensors file ends, or a JSON file."""
    return 8 + int.from_bytes(content[:8], "little") if content[8:9] == b"{" else len(content)


def placed(data: st.DataObject, value: Any) -> Any:
    """`value` with another value somewhere in it, or a part of it left out."""
    if isinstance(value, dict) and value and data.draw(st.integers(0, 9)):
        key = data.draw(st.sampled_from(sorted(value)))
        if not data.draw(st.integers(0, 3)):
            return {k: v for k, v in value.items() if k != key}
        return value | {key: placed(data, value[key])}
    return data.draw(VALUES)


def damaged(data: st.DataObject, content: bytes) -> bytes:
    end = head_of(content)
    how = data.draw(st.sampled_from(["value", "bytes", "cut", "twice"]))
    if how == "cut":
        return content[: data.draw(st.integers(0, len(content)))]
    if how == "twice":
        return content + content[: data.draw(st.integers(1, len(content)))]
    if how == "bytes":
        at = data.draw(st.integers(0, end - 1))
        return content[:at] + data.draw(st.binary(min_size=1, max_size=4)) + content[at + 1 :]
    begin = 0 if end == len(content) else 8
    text = json.dumps(placed(data, json.loads(content[begin:end]))).encode()
    return text if begin == 0 else len(text).to_bytes(8, "little") + text + content[end:]


def assert_taken_or_refused(folder: Path, load: bool = False) -> None:
    fd = os.memfd_create("weights")
    try:
        spec = read_model_spec(folder)
        checkpoint_identity(folder, "safetensors")
        if load:
            load_shared([spec], fd, True, "safetensors", ReferenceOps(None))  # type: ignore[arg-type]
    except CheckpointError as error:
        text = str(error)
        assert text.startswith("model: ") and text.isprintable() and len(text) <= 1000
    finally:
        os.close(fd)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_the_engine_takes_or_refuses(folder: Path, files: Files, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(sorted(files)))
    path.write_bytes(damaged(data, files[path]))
    try:
        assert_taken_or_refused(folder)
    finally:
        path.write_bytes(files[path])


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_what_the_engine_takes_a_worker_loads_or_refuses(folder: Path, files: Files, data: st.DataObject) -> None:
    """Fields of configs, which libraries make something of."""
    configs = [path for path in sorted(files) if path.name in ("config.json", "tokenizer_config.json")]
    path = data.draw(st.sampled_from(configs))
    path.write_bytes(json.dumps(placed(data, json.loads(files[path]))).encode())
    try:
        assert_taken_or_refused(folder, load=True)
    finally:
        path.write_bytes(files[path])
