"""Real workers: whatever one caller asks for, his neighbour is drawn, byte for byte, and so is a later request."""

import asyncio
import dataclasses
import hashlib
import http
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import pytest_asyncio
import torch

from tests.engine import test_resolve as misfits
from tetrion.engine.api import AsyncEngine, RequestHandle
from tetrion.engine.config import EngineConfig
from tetrion.engine.errors import GenerationError, RequestError
from tetrion.engine.loop.guarded_planner import FALLBACK
from tetrion.engine.messages import Command, Denoise, EncodePrompt
from tetrion.engine.planning.snapshot import Planner, RoundPlan, Snapshot
from tetrion.engine.request import EnergyOptions, ImageRequest, ImageResult, ResolvedRequest
from tetrion.engine.resolve import resolve_request
from tetrion.engine.transport.ring import MessageTooLong

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.usefixtures("fork_server")]
PATIENCE_S = 300.0


def small(**fields: Any) -> ImageRequest:
    asked: dict[str, Any] = {"prompt": "a red circle", "width": 128, "height": 128, "seed": 5, "num_steps": 2}
    return ImageRequest(**(asked | fields))


NEIGHBOUR = small(prompt="a green star", seed=11, num_steps=100, force_degrees=(1,))
"""Holds one of two workers all the while; the others find the other one."""


def digest(result: ImageResult) -> str:
    return hashlib.sha256(result.image.tobytes()).hexdigest()


async def draw(engine: AsyncEngine, request: Any) -> ImageResult:
    return await asyncio.wait_for(engine.generate(request), PATIENCE_S)


class Spoiler:
    """Around the real executor and the real policy."""

    def __init__(self) -> None:
        self.spoils_plans = self.spoils_bad_plans = False

    def wrap_executor(self, executor: Any) -> Any:
        submit = executor.submit

        def spoilt(command: Command, members: tuple[int, ...]) -> bool:
            if (
                isinstance(command, (EncodePrompt, Denoise))
                and command.request_id == f"bad-{command.__class__.__name__}"
            ):
                raise MessageTooLong("too long")
            return submit(command, members)

        executor.submit = spoilt
        return executor

    def wrap_planner(self, planner: Planner) -> Planner:
        def spoilt(snapshot: Snapshot) -> RoundPlan:
            has_bad = any(view.request_id == "bad-plan" for view in snapshot.all_requests)
            if self.spoils_plans or (self.spoils_bad_plans and has_bad):
                raise ZeroDivisionError("spoilt")
            return planner(snapshot)

        return spoilt


@dataclasses.dataclass
class Watched:
    """Two workers, and what it draws undisturbed."""

    engine: AsyncEngine
    spoiler: Spoiler
    neighbour: str = ""
    later: str = ""

    @asynccontextmanager
    async def beside_a_neighbour(self) -> AsyncIterator[RequestHandle]:
        """What is done inside begins beside a picture of 100 steps; the workers are the same ones afterwards."""
        pids = self.engine.worker_pids()
        handle = self.engine.submit(NEIGHBOUR)
        async for progress in handle:
            if progress.step_index:
                break
        yield handle
        later = self.engine.submit(small())
        assert digest(await asyncio.wait_for(handle.result(), PATIENCE_S)) == self.neighbour
        assert digest(await asyncio.wait_for(later.result(), PATIENCE_S)) == self.later
        assert self.engine.worker_pids() == pids and self.engine.stats().num_admitted == 0


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def watched(fork_server: None) -> AsyncIterator[Watched]:
    spoiler = Spoiler()
    async with AsyncEngine(EngineConfig(devices="cpu:2", num_threads=1), spoiler) as engine:
        it = Watched(engine, spoiler)
        it.neighbour, it.later = [digest(await draw(engine, request)) for request in (NEIGHBOUR, small())]
        yield it


def bad_requests() -> list[tuple[str, Any]]:
    """Each with the field that is to be named."""
    asked: list[tuple[str, Any]] = [("request", request) for request in misfits.NO_REQUESTS]
    for field in ("width", "height", "num_steps", "seed", "priority"):
        asked += [(field, small(**{field: value})) for value in misfits.NO_WHOLE_NUMBERS]
    for field in ("guidance", "slo_ms", "weight"):
        asked += [(field, small(**{field: value})) for value in misfits.NO_NUMBERS]
    asked += [("energy.budget_j", small(energy=EnergyOptions(budget_j=value))) for value in misfits.NO_NUMBERS]  # type: ignore[arg-type]
    for field in ("prompt", "tenant", "request_id"):
        asked += [(field, small(**{field: value})) for value in misfits.NO_TEXTS]
    asked += [("force_degrees", small(force_degrees=value)) for value in misfits.NO_DEGREES]
    asked += [("energy", small(energy=value)) for value in misfits.NO_WISHES]
    asked += [
        ("energy.mode", small(energy=EnergyOptions(mode=value))) for value in (7, b"fastest", "fast", ["fastest"])
    ]  # type: ignore[arg-type]
    asked += [("request_id", small(request_id=value)) for value in ("x" * 10_000_000, "a\0b", " ", "a\nb")]
    return asked


class Prompt(str):
    def __str__(self) -> str:
        return "nonsense"


WELCOME = [
    small(seed=np.int64(5), num_steps=np.uint8(2), width=np.int32(128), height=np.array(128), priority=np.int8(3)),
    small(guidance=np.float64(0.0), weight=torch.tensor(1.0, requires_grad=True), slo_ms=np.float64(1e6)),
    small(prompt=np.str_("a red circle"), tenant=np.str_("me"), request_id=np.str_("mine")),
    small(prompt=Prompt("a red circle"), force_degrees=np.array([1, 1]), num_steps=http.HTTPStatus.OK - 198),
    small(energy=EnergyOptions(mode=Prompt("fastest")), seed=torch.tensor(5)),  # type: ignore[arg-type]
    misfits.Plain(prompt="a red circle", width=128, height=128, seed=5, num_steps=2, note="mine"),
]
ODD = ["a\0b", "\U0010ffff" * 32_000, "\ufeff\u202e x", "\x1b[31m"]
UNSENDABLE: list[dict[str, Any]] = [
    {"prompt": "a \ud83d circle"},
    {"prompt": np.array(3)},
    {"prompt": "x" * 1_000_000},
    {"seed": 2**70},
    {"seed": Path("x")},
]


async def test_whatever_one_asks_for_his_neighbour_and_a_later_request_are_drawn(
    watched: Watched, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = watched.engine
    async with watched.beside_a_neighbour() as neighbour:
        for field, request in bad_requests():
            with pytest.raises(RequestError) as caught:
                engine.submit(request)
            assert caught.value.field == field
            await asyncio.sleep(0)
        settled = resolve_request(small(), engine.spec, len(engine.devices))

        def unchecked(request: ImageRequest, *_: object) -> ResolvedRequest:
            params = msgspec.structs.replace(settled.params, seed=request.seed)
            return ResolvedRequest(asked=request, params=params)

        monkeypatch.setattr("tetrion.engine.api.resolve_request", unchecked)
        for number, fields in enumerate(UNSENDABLE):
            with pytest.raises(GenerationError, match="could not be sent"):
                await draw(engine, msgspec.structs.replace(settled.asked, request_id=f"unsendable-{number}", **fields))
            assert f"request unsendable-{number} failed" in caplog.text
        monkeypatch.undo()
        assert not neighbour.done, "nothing of this takes as long as he does"
        for request in WELCOME:
            result = await draw(engine, request)
            assert digest(result) == watched.later, "as with numbers and texts of Python's own"
            assert type(result.seed) is int and type(result.prompt) is type(result.request_id) is str
        for prompt in ODD:
            await draw(engine, small(prompt=prompt, request_id="é" * 256, tenant="\0" * 256, num_steps=1))


async def test_a_picture_of_what_is_no_number_costs_its_request_alone(
    watched: Watched, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of weights that overflow; it is not tried again."""
    engine = watched.engine
    asked = small(negative_prompt="a square", true_cfg_scale=2.0, request_id="overflown")
    settled = resolve_request(asked, engine.spec, len(engine.devices))
    params = msgspec.structs.replace(settled.params, true_cfg_scale=float("nan"))
    async with watched.beside_a_neighbour():
        with monkeypatch.context() as patched:
            patched.setattr(
                "tetrion.engine.api.resolve_request", lambda *_: msgspec.structs.replace(settled, params=params)
            )
            overflown = engine.submit(asked)
        with pytest.raises(GenerationError, match="its picture has values that are no numbers"):
            await asyncio.wait_for(overflown.result(), PATIENCE_S)
        assert caplog.text.count("request overflown failed on worker") == 1


async def test_errors_of_the_engine_s_own_cost_the_requests_they_concern(
    watched: Watched, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, spoiler = watched.engine, watched.spoiler
    assert engine._loop is not None
    async with watched.beside_a_neighbour():
        for name in ("bad-EncodePrompt", "bad-Denoise"):
            with pytest.raises(GenerationError, match="could not be sent"):
                await draw(engine, small(request_id=name))
            assert f"request {name} failed" in caplog.text
        spoiler.spoils_bad_plans = True
        with pytest.raises(GenerationError, match="cannot plan it"):
            await draw(engine, small(request_id="bad-plan"))
        assert "request bad-plan failed" in caplog.text and engine.stats().policy == "horizon"
        monkeypatch.setattr(engine._loop.cost_models["shapes"], "observe_aux", lambda *_: 1 // 0)
        with pytest.raises(GenerationError, match="could not be written down"):
            await draw(engine, small(request_id="bad-books"))
        monkeypatch.undo()
        assert "request bad-books failed" in caplog.text
        spoiler.spoils_plans = True
        assert digest(await draw(engine, small())) == watched.later
        assert engine.stats().policy == FALLBACK and f"{FALLBACK} plans in its place" in caplog.text
