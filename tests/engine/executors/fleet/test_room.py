"""What does not fit into memory is refused by arithmetic, with the numbers, before anything is taken."""

import math
from pathlib import Path

import pytest

from tests.engine.families.folders import change, copied
from tests.engine.specs import make_spec
from tetrion.engine.config import DeviceSpec, EngineConfig, parse_devices
from tetrion.engine.executors.fleet import room
from tetrion.engine.executors.fleet.segments import Segments
from tetrion.engine.families.locate import resolve_model
from tetrion.engine.families.registry import read_model_spec
from tetrion.engine.model_spec import ModelTooLarge
from tetrion.engine.models.loading import planned_shapes
from tetrion.engine.models.registry import all_components
from tetrion.engine.roles import roles_text

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
    room.check_room_on_gpus([LARGE], GB // 2, parse_devices("cpu:1"))
    with pytest.raises(ModelTooLarge, match=r"6\.2 GB .* 7\.0 GB is what the largest GPU has"):
        room.check_room_on_gpus([LARGE], GB, parse_devices("cpu:1"))


FLUX2_DEV = make_spec(weights=(("text_encoder", 24 * GB), ("transformer", 32 * GB), ("vae", GB // 10)))


@pytest.mark.parametrize(
    ("available_gb", "num_devices", "roles"),
    [
        (141, 2, "all"),
        (80, 2, "0:encode,1:denoise+decode"),
        (65, 4, "0:encode+decode,1-3:denoise"),
        (60, 4, None),
        (80, 1, None),
    ],
)
def test_roles_are_chosen_where_devices_cannot_have_everything(
    available_gb: int, num_devices: int, roles: str | None
) -> None:
    chosen = room.roles_that_fit([FLUX2_DEV], num_devices, GB * 9 // 10, available_gb * GB)
    assert (None if chosen is None else roles_text(chosen)) == roles


def test_a_refusal_says_with_which_roles_it_would_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "largest_gpu_bytes", lambda: 80 * GB)
    gpus = tuple(DeviceSpec(device_id=i, kind="cuda", index=i) for i in range(2))
    with pytest.raises(ModelTooLarge, match=r"112\.2 GB .*; they fit with roles 0:encode,1:denoise\+decode$"):
        room.check_room_on_gpus([FLUX2_DEV], GB, gpus)
    config = EngineConfig(max_inflight=1)
    fitted = room.with_roles(gpus, [FLUX2_DEV], config)
    assert roles_text([gpu.stages for gpu in fitted]) == "0:encode,1:denoise+decode"
    room.check_room_on_gpus([FLUX2_DEV], GB, fitted)
    swapped = room.with_roles(gpus, [FLUX2_DEV], EngineConfig(roles="0:denoise,1:encode+decode"))
    room.check_room_on_gpus([FLUX2_DEV], GB, swapped)
    with pytest.raises(ModelTooLarge, match=r"on cuda:0 to denoise: weights take 64\.0 GB \(transformer 64\.0 GB\)"):
        room.check_room_on_gpus([FLUX2_DEV], 30 * GB, swapped)


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
