"""What a start does when the measurements are known already. Measuring itself runs in the engine's end-to-end tests."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import numpy as np
import pytest
from safetensors.numpy import save_file

from tetrion.engine.config import EngineConfig, parse_devices
from tetrion.engine.executors.processes import ProcessExecutor
from tetrion.engine.families.locate import resolve_model
from tetrion.engine.families.registry import read_model_spec
from tetrion.engine.measure.calibration import Calibrator, _cache_path
from tetrion.engine.planning.cost.profile import Profile


class Watched:
    """A probe that keeps what it is asked for."""

    def __init__(self) -> None:
        self.steps: list[tuple[tuple[int, int], tuple[int, ...]]] = []
        self.decoded: list[tuple[int, int]] = []
        self.with_pictures: list[tuple[int, int]] = []

    def able(self, stage: str) -> tuple[int, ...]:
        return (0, 1, 2)

    def request(self, size: tuple[int, int], num_steps: int) -> SimpleNamespace:
        return SimpleNamespace(params=SimpleNamespace(shape=SimpleNamespace(num_branches=1)))

    async def rehearse(
        self, size: tuple[int, int], groups: list[tuple[int, ...]], *, decoding: bool, with_picture: bool
    ) -> None:
        if with_picture:
            self.with_pictures += [size] * len(groups)
            return
        self.steps += [(size, members) for members in groups]
        self.decoded += [size] * (len(groups) if decoding else 0)


def table_of(*sizes: str) -> Profile:
    cost = {"step_ms": {1: 100.0}, "encode_ms": 1.0, "decode_ms": 1.0}
    return msgspec.convert({"heads": 24, "classes": dict.fromkeys(sizes, cost)}, Profile)


SIDES = (256, 272, 368, 464, 512, 592, 688, 848, 1024, 1040, 2048)
SQUARES = [(side, side) for side in SIDES]


@pytest.mark.parametrize(
    ("kind", "model", "table", "sizes"),
    [
        ("cpu", "flux1-dev", None, []),
        ("cuda", "flux1-dev", None, SQUARES),
        (
            "cuda",
            "flux1-dev",
            table_of("1536x1024", "4096x1024", "520x512"),
            [*SQUARES[:-1], (1536, 1024), SQUARES[-1]],
        ),
        ("cuda", "shapes", None, [(side, side) for side in (128, 256, 272, 368, 464, 512)]),
        ("cuda", "flux1-kontext-dev", None, SQUARES),
    ],
)
async def test_gpus_record_every_usual_step_before_the_first_request(
    kind: str, model: str, table: Profile | None, sizes: list[tuple[int, int]]
) -> None:
    """What the model draws by default, and what the table knows as far as the model draws it."""
    spec = read_model_spec(resolve_model(model), "dummy")
    executor = SimpleNamespace(device_ids=(0, 1, 2), devices=(SimpleNamespace(kind=kind),) * 3)
    calibrator, watched = Calibrator(cast(ProcessExecutor, executor), spec), Watched()
    calibrator._probe = cast(Any, watched)
    await calibrator.warm_up(table)
    groups = [(0,), (1,), (2,), (0, 1), (2, 0), (0, 1, 2)]
    assert watched.steps == [(size, members) for size in sizes for members in groups]
    assert watched.decoded == [size for size in sizes for _ in range(3)]
    times = len(groups) if "kontext" in model else 0
    assert watched.with_pictures == [size for size in sizes for _ in range(times)], "references are rows of the step"


def test_a_calibration_is_kept_for_the_weights_it_was_measured_with(tmp_path: Path) -> None:
    """Touching a file changes nothing, its contents do."""
    spec = msgspec.structs.replace(read_model_spec(resolve_model("flux1-dev"), "dummy"), path=str(tmp_path))
    executor = cast(ProcessExecutor, SimpleNamespace(device_ids=(0,), devices=parse_devices("cpu:1")))
    weights = tmp_path / "vae" / "model.safetensors"
    weights.parent.mkdir()

    def key(value: float) -> str:
        save_file({"bias": np.full(3, value, np.float32)}, weights)
        return _cache_path(executor, spec, EngineConfig()).name

    first = key(1.0)
    os.utime(weights, (1, 1))
    assert key(1.0) == first != key(1.1)
