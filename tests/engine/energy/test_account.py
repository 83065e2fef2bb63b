"""The account through the real loop: simulated devices, a meter in virtual time, receipts on results."""

import asyncio
import queue
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.engine.loop.test_loop import COSTS, PROFILE, SPEC, costs_of
from tetrion.engine.api import AsyncEngine
from tetrion.engine.config import EngineConfig, MeteringConfig, PlannerConfig
from tetrion.engine.energy.account import EnergyAccount, RequestFacts
from tetrion.engine.energy.meters.base import ModelMeter, NoMeter, Reading
from tetrion.engine.energy.meters.replay import ReplayMeter
from tetrion.engine.energy.quantum import Share
from tetrion.engine.executors.simulated import SimulatedExecutor
from tetrion.engine.loop.dispatch import encode_command
from tetrion.engine.loop.loop import EngineLoop
from tetrion.engine.loop.requests import Request
from tetrion.engine.messages import Command
from tetrion.engine.planning.cost.correction import CostModels
from tetrion.engine.planning.cost.profile import ClassCost, Profile
from tetrion.engine.planning.policies.registry import get_planner
from tetrion.engine.request import ImageRequest, ImageResult, Output, Receipt
from tetrion.engine.resolve import resolve_request

UUIDS = {0: "GPU-a", 1: "GPU-b"}
BUSY_W, IDLE_W = 600.0, 100.0
WITH_JOULES = Profile(
    heads=12,
    classes={
        "512x512": ClassCost(
            step_ms={1: 200, 2: 105}, encode_ms=5, decode_ms=80, step_j={1: 100.0, 2: 120.0}, encode_j=1.0, decode_j=9.0
        )
    },
)


class MeteredLoop:
    """The loop on two simulated devices. The meter reads every 100 ms of virtual time: a device draws `BUSY_W` while it
    executes a command, else `IDLE_W`; `gain`: what the counter counts over what power readings say; one reading of
    `powers_a_counter` has the counters."""

    def __init__(self, account: EnergyAccount | None, profile: Profile = PROFILE, gain: float = 1.0) -> None:
        self.account = account
        self.gain, self.powers_a_counter = gain, 1
        self.results: dict[str, ImageResult] = {}
        self.executor = SimulatedExecutor(costs_of(profile), 2)
        self.loop = EngineLoop(
            executor=self.executor,
            planner=get_planner("horizon"),
            cost_models=CostModels({SPEC.name: profile}),
            config=EngineConfig(planner=PlannerConfig()),
            outputs=self._receive,
            energy=account,
        )
        self._num_due = self._num_readings = 0
        self._joules = dict.fromkeys(UUIDS.values(), 1e6)

    def request(self, request_id: str, at_s: float, **fields: object) -> None:
        asked = {"prompt": "x", "seed": 1, "request_id": request_id, "width": 512, "height": 512} | fields
        params = resolve_request(ImageRequest(**asked), SPEC, 2)  # type: ignore[arg-type]
        self._num_due += 1
        self.executor.at(at_s, lambda: self.loop.submit(params) and None)

    def read_until(self, end_s: float, stop_s: float | None = None) -> None:
        for i in range(round(end_s / 0.1)):
            self.executor.at(i * 0.1, self._read)
        self.executor.at(end_s if stop_s is None else stop_s, self.loop.stop)

    async def run(self) -> None:
        await self.loop.run()

    def _read(self) -> None:
        assert self.account is not None
        now_s = self.executor.now_s()
        watts = {}
        for device_id, uuid in UUIDS.items():
            watts[uuid] = BUSY_W if self.executor._free_s[device_id] > now_s else IDLE_W
            self._joules[uuid] += 0.1 * watts[uuid] * self.gain
        joules = {} if self._num_readings % self.powers_a_counter else dict(self._joules)
        self._num_readings += 1
        self.account.receive(Reading(time_s=now_s, joules=joules, watts=watts))

    def _receive(self, output: Output) -> None:
        if isinstance(output, ImageResult):
            self.results[output.request_id] = output


def replayed_account(**options: object) -> EnergyAccount:
    meter = ReplayMeter([Reading(time_s=0.0, joules=dict.fromkeys(UUIDS.values(), 0.0), watts={})])
    return EnergyAccount(meter, UUIDS, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("powers_a_counter", [1, 40])
async def test_receipts_and_totals_agree_with_the_counters(powers_a_counter: int) -> None:
    account = replayed_account()
    metered = MeteredLoop(account, gain=1.05)
    metered.powers_a_counter = powers_a_counter
    for number in range(6):
        metered.request(f"r{number}", at_s=6.0 + 3.0 * number, num_steps=20, force_degrees=(2,))
    metered.read_until(60.0)
    await metered.run()
    figures = account.figures()
    assert len(metered.results) == 6
    assert figures.num_windows >= (20 if powers_a_counter == 1 else 12)
    assert figures.active_j is not None and figures.idle_j is not None and figures.unattributed_j is not None
    total_j = sum(figures.active_j.values()) + figures.idle_j + figures.unattributed_j
    assert total_j == pytest.approx(figures.counter_j, rel=1e-9)
    assert figures.worst_identity_error is not None and figures.worst_identity_error <= 1e-9
    receipts = [result.energy for result in metered.results.values()]
    active_j = sum(receipt.active_j or 0.0 for receipt in receipts)
    assert active_j == pytest.approx(sum(figures.active_j.values()), rel=0.1)
    busy_s = 6 * (0.005 + 20 * 2 * 0.105 + 0.080)
    assert active_j == pytest.approx(busy_s * BUSY_W * 1.05, rel=0.05)
    assert all(receipt.method == "replay" for receipt in receipts)


async def test_a_reading_that_comes_while_a_command_is_given_settles_nothing_of_it() -> None:
    """As another thread's may: the member is at work before the loop goes on."""
    account = replayed_account()
    metered = MeteredLoop(account)
    submit = metered.executor.submit

    def read_meanwhile(command: Command, members: tuple[int, ...]) -> bool:
        taken = submit(command, members)
        later_s = metered.executor.now_s() + 0.03
        account.receive(Reading(time_s=later_s, joules={}, watts=dict.fromkeys(UUIDS.values(), BUSY_W)))
        return taken

    metered.executor.submit = read_meanwhile  # type: ignore[method-assign]
    metered.request("a", at_s=6.0, num_steps=20, force_degrees=(1,))
    metered.read_until(30.0)
    await metered.run()
    receipt = metered.results["a"].energy
    assert receipt.active_j == pytest.approx(BUSY_W * 4.085, rel=0.05), receipt.reasons


async def test_a_receipt_says_phases_idle_share_and_uncertainty() -> None:
    metered = MeteredLoop(replayed_account(g_per_kwh=lambda: 500.0))
    metered.request("a", at_s=6.0, num_steps=20, force_degrees=(1,))
    metered.read_until(30.0)
    await metered.run()
    receipt = metered.results["a"].energy
    assert receipt.active_j is not None and receipt.phases is not None and receipt.uncertainty_j is not None
    assert receipt.phases.denoise == pytest.approx(20 * 0.2 * BUSY_W, rel=0.05)
    assert receipt.phases.encode is not None and receipt.phases.decode is not None
    assert sum((receipt.phases.encode, receipt.phases.denoise or 0, receipt.phases.decode)) == receipt.active_j
    assert abs(receipt.active_j - BUSY_W * 4.085) <= receipt.uncertainty_j
    # One of the two GPUs is idle all the while, and nobody else is under way.
    assert receipt.idle_share_j == pytest.approx(4.1 * IDLE_W, rel=0.05)
    assert receipt.wh == pytest.approx((receipt.active_j + receipt.idle_share_j) / 3600)
    assert receipt.co2e_g == pytest.approx(receipt.wh * 0.5)
    assert receipt.degrees == (1,) * 20
    assert receipt.saved_j is None
    assert "no joules" in receipt.reasons["saved_j"]


async def test_the_model_meter_books_what_the_profile_says_and_what_the_fastest_plan_would_have_taken() -> None:
    metered = MeteredLoop(EnergyAccount(ModelMeter(()), UUIDS), WITH_JOULES)
    metered.request("a", at_s=0.0, num_steps=10, force_degrees=(1,) * 4 + (2,))
    metered.executor.at(20.0, metered.loop.stop)
    await metered.run()
    receipt = metered.results["a"].energy
    assert receipt.method == "model"
    assert receipt.active_j == pytest.approx(1 + 4 * 100 + 6 * 120 + 9)
    assert receipt.fastest_plan_j == pytest.approx(1 + 10 * 120 + 9)
    assert receipt.saved_j == pytest.approx(80.0)
    assert metered.account is not None and metered.account.figures().counter_j is None


async def test_what_the_profile_does_not_say_is_none_and_not_zero() -> None:
    metered = MeteredLoop(EnergyAccount(ModelMeter(()), UUIDS))
    metered.request("a", at_s=0.0, num_steps=2)
    metered.executor.at(20.0, metered.loop.stop)
    await metered.run()
    receipt = metered.results["a"].energy
    assert receipt.active_j is None and receipt.wh is None
    assert "profile has no joules" in receipt.reasons["active_j"]


async def test_what_was_saved_is_told_even_where_some_phase_has_no_joules() -> None:
    cost = msgspec.structs.replace(WITH_JOULES.classes["512x512"], encode_j=None)
    profile = msgspec.structs.replace(WITH_JOULES, classes={"512x512": cost})
    metered = MeteredLoop(EnergyAccount(ModelMeter(()), UUIDS), profile)
    metered.request("a", at_s=0.0, num_steps=10, force_degrees=(1,))
    metered.executor.at(20.0, metered.loop.stop)
    await metered.run()
    receipt = metered.results["a"].energy
    assert receipt.active_j is None and "encode" in receipt.reasons["active_j"]
    assert receipt.saved_j == pytest.approx(200.0) and "saved_j" not in receipt.reasons


async def test_without_a_meter_every_field_is_none_and_says_why() -> None:
    metered = MeteredLoop(EnergyAccount(NoMeter("no GPU here"), UUIDS))
    metered.request("a", at_s=0.0, num_steps=2)
    metered.executor.at(20.0, metered.loop.stop)
    await metered.run()
    receipt = metered.results["a"].energy
    assert (receipt.active_j, receipt.idle_share_j, receipt.phases, receipt.wh) == (None, None, None, None)
    assert set(receipt.reasons.values()) == {"no GPU here"}
    assert receipt.degrees == metered.results["a"].degrees


async def test_a_meter_that_never_reads_gives_no_joules() -> None:
    metered = MeteredLoop(replayed_account())
    metered.request("a", at_s=0.0, num_steps=2)
    metered.executor.at(20.0, metered.loop.stop)
    await metered.run()
    assert metered.results["a"].energy.active_j is None
    assert "no reading" in metered.results["a"].energy.reasons["active_j"]


def test_a_lost_member_leaves_nothing_open() -> None:
    account = replayed_account()
    request = Request(resolve_request(ImageRequest(prompt="x", seed=1, request_id="a"), SPEC, 2), 0.0)
    account.sent(encode_command(request, 7), (0,), COSTS, 1.0)
    for i in range(5):
        account.receive(Reading(time_s=i * 0.5, joules={"GPU-a": 300.0 * i}, watts={"GPU-a": 600.0}))
    account.failed(7, 0, 2.0)
    facts = RequestFacts(request_id="a", model=SPEC.name, cost_key="512x512", degrees=())
    receipt = account.ended(facts, COSTS, 2.0)()
    assert receipt.active_j == pytest.approx(600.0)
    account.answered(7, 0, 1.0, 2.0, 2.0)  # what comes later is nobody's
    for i in range(5, 20):
        account.receive(Reading(time_s=i * 0.5, joules={"GPU-a": 300.0 * i}, watts={"GPU-a": 600.0}))
    figures = account.figures()
    assert figures.active_j is not None
    assert sum(figures.active_j.values()) == pytest.approx(600.0)


def test_receipts_come_from_other_threads_while_the_loop_goes_on_telling() -> None:
    """Encodes of 10 ms back to back on one GPU, told by one thread; readings and receipts are two others' work."""
    account, ends = replayed_account(), queue.SimpleQueue[Callable[[], Receipt] | None]()
    watts, count = 600.0, 400

    def read() -> None:
        for i in range(count // 10 + 40):
            joules = {"GPU-a": watts * i * 0.1, "GPU-b": 0.0}
            account.receive(Reading(time_s=i * 0.1, joules=joules, watts={"GPU-a": watts, "GPU-b": 0.0}))

    def collect() -> list[Receipt]:
        return [end() for end in iter(ends.get, None)]

    with ThreadPoolExecutor(2) as others:
        receipts = others.submit(collect)
        reading = others.submit(read)
        for i in range(count):
            params = ImageRequest(prompt="x", seed=1, request_id=f"r{i}")
            request = Request(resolve_request(params, SPEC, 2), i / 100)
            account.sent(encode_command(request, i), (0,), COSTS, i / 100)
            account.answered(i, 0, i / 100, (i + 1) / 100, (i + 1) / 100)
            facts = RequestFacts(request_id=f"r{i}", model=SPEC.name, cost_key=request.cost_key, degrees=())
            ends.put(account.ended(facts, COSTS, (i + 1) / 100))
        ends.put(None)
        reading.result()
        made = receipts.result()
    figures = account.figures()
    assert len(made) == count and all(receipt.method == "replay" for receipt in made)
    assert figures.active_j is not None and figures.idle_j is not None and figures.unattributed_j is not None
    total_j = sum(figures.active_j.values()) + figures.idle_j + figures.unattributed_j
    assert total_j == pytest.approx(figures.counter_j, rel=1e-9) and figures.num_windows >= 2


async def test_once_no_reading_comes_receipts_say_so() -> None:
    account = replayed_account(g_per_kwh=lambda: 500.0)
    metered = MeteredLoop(account)
    metered.request("a", at_s=6.0, num_steps=20, force_degrees=(1,))
    metered.request("b", at_s=20.0, num_steps=20, force_degrees=(1,))
    metered.read_until(12.0, stop_s=40.0)
    await metered.run()
    known, unknown = metered.results["a"].energy, metered.results["b"].energy
    assert known.active_j == pytest.approx(BUSY_W * 4.085, rel=0.05)
    assert (unknown.active_j, unknown.wh, unknown.co2e_g, unknown.uncertainty_j) == (None, None, None, None)
    assert all("no reading" in unknown.reasons[name] for name in ("active_j", "wh", "co2e_g", "uncertainty_j"))


@pytest.mark.usefixtures("fork_server")
async def test_an_engine_without_gpus_runs_and_says_why_it_meters_nothing() -> None:
    async with AsyncEngine(EngineConfig(devices="cpu:1", num_threads=1)) as engine:
        result = await engine.generate(ImageRequest(prompt="a red circle", width=128, height=128, num_steps=2, seed=1))
        stats = engine.stats()
    assert result.energy.active_j is None
    assert "CPU workers" in result.energy.reasons["active_j"]
    assert (stats.energy.active_j, stats.energy.counter_j) == (None, None)
    assert "CPU workers" in stats.energy.reason


@pytest.mark.usefixtures("fork_server")
async def test_a_recording_meters_an_engine_of_cpu_workers(tmp_path: Path) -> None:
    readings = (Reading(time_s=i * 0.05, joules={"GPU-a": 25.0 * i}, watts={"GPU-a": 500.0}) for i in range(9000))
    recording = tmp_path / "readings.jsonl"
    recording.write_bytes(b"\n".join(map(msgspec.json.encode, readings)))
    metering = MeteringConfig(meter=f"replay:{recording}", period_s=0.02)
    async with AsyncEngine(EngineConfig(devices="cpu:1", num_threads=1, metering=metering)) as engine:
        assert engine.stats().energy.idle_w == {"GPU-a": pytest.approx(500.0)}, "known before the first request"
        while engine.stats().energy.num_windows < 1:
            await asyncio.sleep(0.05)
        request = ImageRequest(prompt="a red circle", width=128, height=128, num_steps=100, seed=1)
        result = await engine.generate(request)
    busy_s = result.encode_s + result.denoise_s + result.decode_s
    assert result.energy.method == "replay"
    assert "active_j" not in result.energy.reasons, result.energy.reasons
    assert result.energy.active_j == pytest.approx(busy_s * 500.0, rel=0.05)


async def test_what_cannot_be_booked_costs_its_request_the_receipt_and_nobody_else(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever comes next works off what was noted for all."""

    def share(request_id: str, *place: Any) -> Share:
        if request_id == "bad":
            raise ZeroDivisionError("spoilt")
        return Share(request_id, *place)

    monkeypatch.setattr("tetrion.engine.energy.account.Share", share)
    account = EnergyAccount(ModelMeter(tuple(UUIDS.values())), UUIDS)
    metered = MeteredLoop(account, WITH_JOULES)
    metered.request("bad", at_s=0.1, width=128, height=128)
    metered.request("good", at_s=0.1)
    metered.executor.at(30.0, metered.loop.stop)
    await metered.run()
    assert metered.results["good"].energy.active_j is not None
    assert "could not be kept" in metered.results["bad"].energy.reasons["active_j"]
    assert "the account of request bad could not be kept" in caplog.text
    assert not account._sent and not account._spent
