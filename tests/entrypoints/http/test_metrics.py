"""`/metrics`, read with Prometheus' own parser over a real socket."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import httpx
import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.entrypoints.conftest import NO_ENERGY, draw
from tests.entrypoints.http.test_app import Served, serving
from tetrion.engine.energy.figures import EnergyFigures, MeterErrors
from tetrion.engine.errors import GenerationError
from tetrion.engine.loop.recovery import RecoveryFigures
from tetrion.engine.loop.statistics import LoopFigures
from tetrion.engine.loop.tenant_statistics import OTHERS, TenantFigures
from tetrion.engine.request import ImageRequest, PhaseJoules, Receipt
from tetrion.entrypoints.http.metrics import BUCKETS_J, Metrics, size_class
from tetrion.entrypoints.http.tenants import public_name

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]
METERED = EnergyFigures(
    source="nvml",
    reason="",
    active_j={("shapes", "512x512", "denoise"): 900.0, ("shapes", "512x512", "decode"): 30.0},
    idle_j=50.0,
    unattributed_j=20.0,
    counter_j=1000.0,
    watts={"GPU-a": 650.5},
    idle_w={"GPU-a": 71.0},
    num_windows=2,
    worst_identity_error=0.004,
    latest=MeterErrors(unattributed_share=0.01, raw_error=0.02, model_error=-0.03),
    cpu_j=12.0,
)


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    async with serving() as running:
        yield running


def parse(text: str) -> Samples:
    families = text_string_to_metric_families(text)
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


async def scrape(served: Served) -> Samples:
    response = await served.http.get("/metrics")
    assert response.status_code == 200 and response.headers["content-type"].startswith("text/plain; version=")
    return parse(response.text)


def labels(**values: str) -> tuple[tuple[str, str], ...]:
    return tuple(sorted(values.items()))


async def test_joules_by_resolution_phase_and_state_add_up_to_the_counter(served: Served) -> None:
    served.engine.energy, served.engine.meter_age_s = METERED, 0.1
    found = await scrape(served)
    joules = {key[1]: value for key, value in found.items() if key[0] == "tetrion_energy_joules_total"}
    denoise = labels(model="shapes", resolution="512x512", phase="denoise", state="active")
    assert joules[denoise] == 900.0 and sum(joules.values()) == METERED.counter_j
    assert joules[labels(model="", resolution="", phase="", state="idle")] == 50.0
    assert found["tetrion_gpu_power_watts", labels(gpu="GPU-a")] == 650.5
    assert found["tetrion_cpu_energy_joules_total", ()] == 12.0
    errors = ("identity_error", "unattributed_share", "raw_error", "model_error")
    assert [found[f"tetrion_energy_{name}", ()] for name in errors] == [0.004, 0.01, 0.02, -0.03]
    assert found["tetrion_energy_meter_up", labels(source="nvml", reason="")] == 1.0


async def test_what_is_not_known_has_no_sample(served: Served) -> None:
    await served.post()
    found = await scrape(served)
    assert not [key for key in found if "joules" in key[0] or "watts" in key[0]]
    assert found["tetrion_energy_meter_up", labels(source="none", reason=NO_ENERGY.reason)] == 0.0
    assert found["tetrion_devices_alive", ()] == 2.0


async def test_what_the_loop_costs_is_told(served: Served) -> None:
    served.engine.loop = LoopFigures(num_ticks=8, num_commands=4, cpu_s=0.002, device_s=20.0, lost_s=1.5, held_s=1.0)
    found = await scrape(served)
    names = ("loop_cpu_seconds", "commands", "device_seconds", "device_lost_seconds", "device_held_seconds")
    assert [found[f"tetrion_{name}_total", ()] for name in names] == [0.002, 4, 20.0, 1.5, 1.0]


async def test_a_meter_that_fell_silent_is_down(served: Served) -> None:
    served.engine.energy, served.engine.meter_age_s = METERED, 60.0
    found = await scrape(served)
    assert found["tetrion_energy_meter_up", labels(source="nvml", reason="no joules told for more than 15 s")] == 0.0


async def test_before_the_engine_runs_there_is_nothing_to_tell(served: Served) -> None:
    def not_running() -> None:
        raise GenerationError("the engine is not running")

    served.engine.stats = not_running  # type: ignore[method-assign,assignment]
    assert (await served.http.get("/metrics")).status_code == 200


async def test_pictures_fall_into_buckets_up_to_51_kilojoules(served: Served) -> None:
    metrics = Metrics(served.engine)  # type: ignore[arg-type]
    request = ImageRequest(prompt="x", model="shapes", width=256, height=256, num_steps=2, seed=1)
    for joules in (70.0, 51_000.0, 60_000.0):
        receipt = Receipt(method="nvml", active_j=joules, idle_share_j=1.0, phases=PhaseJoules(denoise=joules))
        metrics.observe(msgspec.structs.replace(draw(request), energy=receipt))
    found = parse(metrics.text().decode())
    about = {"model": "shapes", "resolution": "256x256", "phase": "denoise", "state": "active"}
    name = "tetrion_picture_energy_joules_bucket"
    counts = [found[name, labels(**about, le=str(bound))] for bound in (50.0, 100.0, 51_200.0)]
    assert counts == [0, 1, 2] and BUCKETS_J[-1] == 51_200.0
    assert found["tetrion_picture_energy_joules_count", labels(**about)] == 3
    assert found["tetrion_picture_energy_joules_sum", labels(**(about | {"phase": "all", "state": "idle"}))] == 3.0


async def test_pictures_are_counted_by_what_came_of_them(served: Served) -> None:
    await served.post(n=3)
    await served.post(prompt="full")
    await served.post(prompt="full", n=2)
    await served.post(prompt="fail")
    await served.post(size="1x1")
    with contextlib.suppress(httpx.TimeoutException):
        await served.http.post("/v1/images/generations", json={"prompt": "slow"}, timeout=0.2)
    async with asyncio.timeout(10):
        while not (found := await scrape(served)).get(
            ("tetrion_pictures_total", labels(model="shapes", outcome="cancelled"))
        ):
            await asyncio.sleep(0.01)
    counted = {dict(key[1])["outcome"]: value for key, value in found.items() if key[0] == "tetrion_pictures_total"}
    assert counted == {"drawn": 3, "refused": 3, "failed": 1, "cancelled": 1}


async def test_what_pictures_take_by_stage_and_size(served: Served) -> None:
    await served.post(size="256x256", n=2)
    await served.post(size="272x256")
    found = await scrape(served)
    name = "tetrion_picture_seconds_sum"
    about = {"model": "shapes", "size": "up to 256x256"}
    sums = [found[name, labels(**about, stage=stage)] for stage in ("queue", "encode", "denoise", "decode", "all")]
    assert sums == pytest.approx([0.2, 0.2, 0.4, 0.2, 1.0])
    assert found["tetrion_picture_seconds_count", labels(model="shapes", size="up to 512x512", stage="deliver")] == 1


@pytest.mark.parametrize(
    ("width", "height", "name"),
    [(64, 64, "up to 256x256"), (512, 512, "up to 512x512"), (1536, 1024, "up to 2048x2048"), (8192, 4096, "larger")],
)
def test_size_classes(width: int, height: int, name: str) -> None:
    assert size_class(width, height) == name


async def test_answers_and_refusals_are_counted(served: Served) -> None:
    await served.post()
    await served.post(n=11)
    await served.post(prompt="full")
    await served.http.get("/made/up")
    await served.http.get("/v1/models/made-up")
    found = await scrape(served)
    path = "/v1/images/generations"
    for status in ("200", "400", "429"):
        assert found["tetrion_http_requests_total", labels(path=path, status=status)] == 1
    assert found["tetrion_http_requests_total", labels(path="other", status="404")] == 1
    assert found["tetrion_http_requests_total", labels(path="/v1/models/…", status="404")] == 1
    for reason in ("invalid_value", "engine_overloaded", "unknown_url", "model_not_found"):
        assert found["tetrion_http_refusals_total", labels(reason=reason)] == 1


async def test_losses_and_devices_that_return_are_counted(served: Served) -> None:
    served.engine.recovery = RecoveryFigures(num_deaths=3, num_respawns=2, num_retries=5)
    served.engine.num_alive = 1
    found = await scrape(served)
    names = ("worker_deaths_total", "worker_respawns_total", "request_retries_total", "devices_returning")
    assert [found[f"tetrion_{name}", ()] for name in names] == [3, 2, 5, 1]
    ready = (await served.http.get("/ready")).json()
    assert (ready["num_alive"], ready["num_returning"]) == (1, 1)


async def test_what_tenants_have_had_is_told_without_their_addresses(served: Served) -> None:
    address = "ip:192.0.2.7"
    served.engine.tenants = {
        "alice": TenantFigures(num_met=7, num_missed=2, num_refused=1, device_s=12.5),
        address: TenantFigures(num_met=1),
        OTHERS: TenantFigures(device_s=3.0),
    }
    text = (await served.http.get("/metrics")).text
    found = parse(text)
    name = "tetrion_tenant_requests_total"
    counts = [found[name, labels(tenant="alice", outcome=outcome)] for outcome in ("met", "missed", "refused")]
    assert counts == [7, 2, 1]
    assert found["tetrion_tenant_device_seconds_total", labels(tenant="alice")] == 12.5
    assert found["tetrion_tenant_device_seconds_total", labels(tenant=OTHERS)] == 3.0
    assert "192.0.2.7" not in text and found[name, labels(tenant=public_name(address), outcome="met")] == 1
