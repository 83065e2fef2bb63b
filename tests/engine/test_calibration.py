"""What a start does when the measurements are known already. Measuring itself runs in the engine's end-to-end tests."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from tetrion.engine.calibration import Calibrator
from tetrion.engine.model_spec import read_model_spec
from tetrion.engine.models.locate import resolve_model
from tetrion.engine.process_executor import ProcessExecutor


class Watched:
    """A probe that keeps what it is asked for."""

    def __init__(self) -> None:
        self.steps: list[tuple[tuple[int, int], tuple[int, ...]]] = []
        self.decoded: list[tuple[int, int]] = []

    async def rehearse(self, size: tuple[int, int], groups: list[tuple[int, ...]], *, decoding: bool) -> None:
        self.steps += [(size, members) for members in groups]
        self.decoded += [size] * (len(groups) if decoding else 0)


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
async def test_gpus_record_every_usual_step_before_the_first_request(kind: str) -> None:
    spec = read_model_spec(resolve_model("flux1-dev"), "dummy")
    executor = SimpleNamespace(device_ids=(0, 1, 2), devices=(SimpleNamespace(kind=kind),) * 3)
    calibrator, watched = Calibrator(cast(ProcessExecutor, executor), spec), Watched()
    calibrator._probe = cast(Any, watched)
    await calibrator.warm_up()
    sizes = [(side, side) for side in (256, 512, 1024, 2048)] if kind == "cuda" else []
    groups = [(0,), (1,), (2,), (0, 1), (2, 0), (0, 1, 2)]
    assert watched.steps == [(size, members) for size in sizes for members in groups]
    assert watched.decoded == [size for size in sizes for _ in range(3)]
