"""What does not fit into memory is refused by arithmetic, with the numbers, before anything is taken."""

import math
from pathlib import Path

import pytest

from tests.engine.families.folders import change, copied
from tests.engine.specs import make_spec
from tetrion.engine.config import EngineConfig, parse_devices
from tetrion.engine.executors.fleet import room
from tetrion.engine.executors.fleet.segments import Segments
from tetrion.engine.families.locate import resolve_model
from tetrion.engine.families.registry import read_model_spec
from tetrion.engine.model_spec import ModelTooLarge
from tetrion.engine.models.loading import planned_shapes
from tetrion.engine.models.registry import all_components

GB = 10**9
LARGE = make_spec(weights=(("transformer", 3 * GB), ("vae", GB // 10)))


@pytest.mark.parametrize(
    "name",
    ["shapes", "shapes-sd3", "flux1-dev", "sd3-medium", "sd3.5-large", "z-image-turbo", "flux2-klein-9b", "qwen-image"],
)
def test_weights_are_counted_as_workers_load_them(name: str) -> None:
    load_format = "safetensors" if name.startswith("shapes") else "dummy"
    spec = read_model_spec(resolve_model(name), load_format)  # type: ignore[arg-type]
    loaded = {
        component.rpartition("/")[2]: sum(map(math.prod, planned_shapes({component: planned}).values()))
        for component, planned in all_components([spec], load_format).items()  # type: ignore[arg-type]
    }
    assert dict(spec.weights) == loaded


def test_on_cpus_weights_are_there_once_beside_all_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "available_memory_bytes", lambda: 14 * GB)
    room.check_room_on_cpu([LARGE], GB)
    with pytest.raises(ModelTooLarge, match=r"weights take 12\.4 GB \(transformer 12\.0 GB, vae 0\.4 GB\), .* 2\.0 GB"):
        room.check_room_on_cpu([LARGE], 2 * GB)
    monkeypatch.setattr(room, "available_memory_bytes", lambda: None)
    room.check_room_on_cpu([LARGE], 2**60)


def test_on_gpus_the_largest_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "largest_gpu_bytes", lambda: 7 * GB)
    room.check_room_on_gpus([LARGE], GB // 2)
    with pytest.raises(ModelTooLarge, match=r"6\.2 GB .* 7\.0 GB is what the largest GPU has"):
        room.check_room_on_gpus([LARGE], GB)


def test_what_models_may_have_in_common_counts_once() -> None:
    other = make_spec(name="other", weights=(("transformer", 7), ("vae", GB // 10)))
    assert room.weights_bytes([LARGE, other], 2) == {
        "tiny/transformer": 6 * GB, "tiny/vae": GB // 5, "other/transformer": 14
    }  # fmt: skip


def test_segments_of_a_model_that_does_not_fit_take_nothing(tmp_path: Path) -> None:
    """By its configs alone, without its weights."""
    folder = copied("shapes", tmp_path / "model")
    change(folder, "transformer/config.json", num_layers=1000, num_single_layers=1000, num_attention_heads=100)
    spec = read_model_spec(folder, "dummy")
    with pytest.raises(ModelTooLarge, match="does not fit into memory: weights take"):
        Segments(parse_devices("cpu:2"), [spec], EngineConfig())
