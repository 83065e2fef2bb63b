"""`GET /metrics` in Prometheus' text form: pictures by outcome and what their stages took, joules by model, resolution,
phase and state, power, the meter's own health, what the engine's loop costs, and what each tenant has had.

Pull only: what the engine counts is read when somebody asks. Histograms are of the pictures that this server has drawn.
What is not known has no sample; it is never 0. Counters are those of closed windows, so they are up to one behind.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from tetrion.engine.errors import GenerationError
from tetrion.engine.request import Delivered, ImageResult
from tetrion.engine.stages import STAGES
from tetrion.entrypoints.http.counters import HttpCounters
from tetrion.entrypoints.http.tenants import public_name

if TYPE_CHECKING:
    from tetrion.engine.api import AsyncEngine, EngineStats

BUCKETS_J = tuple(50.0 * 2**i for i in range(11))
"""50 J to 51.2 kJ."""
BUCKETS_S = tuple(0.005 * 2**i for i in range(12))
"""5 ms to 10 s."""
LONG_BUCKETS_S = tuple(0.01 * 2**i for i in range(16))
"""10 ms to 5.5 minutes."""
CLASS_SIDES = (256, 512, 1024, 2048, 4096)
STALE_S = 15.0
"""A meter whose counters, read every ten seconds or more often, have not been told for so long is down."""
LABELS = ("model", "resolution", "phase", "state")
MEDIA_TYPE = CONTENT_TYPE_LATEST


Outcome = Literal["drawn", "refused", "failed", "cancelled"]


def size_class(width: int, height: int) -> str:
    """The least square that has as many pixels: few labels, whatever sizes clients think of."""
    side = next((side for side in CLASS_SIDES if width * height <= side * side), None)
    return "larger" if side is None else f"up to {side}x{side}"


class Metrics:
    """The registry of one server. `observe` every result, `text` is what a scrape gets."""

    def __init__(self, engine: "AsyncEngine") -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(engine))
        self.http = HttpCounters(self._registry)
        self._joules = Histogram(
            "tetrion_picture_energy_joules",
            "Joules of one picture: active by phase and over all of them, and its share of idle GPUs.",
            LABELS,
            registry=self._registry,
            buckets=BUCKETS_J,
        )
        self._pictures = Counter(
            "tetrion_pictures",
            "Pictures that were asked for: drawn, refused, failed, or cancelled since the client went away.",
            ("model", "outcome"),
            registry=self._registry,
        )
        self._picture_s = Histogram(
            "tetrion_picture_seconds",
            "Seconds of one picture from arrival to the last byte of its answer (all), and by stage.",
            ("model", "size", "stage"),
            registry=self._registry,
            buckets=LONG_BUCKETS_S,
        )
        self._deliver_s = Histogram(
            "tetrion_picture_deliver_seconds",
            "Seconds from a finished picture to the last byte of its answer.",
            ("format",),
            registry=self._registry,
            buckets=BUCKETS_S,
        )

    def asked(self, model: str, outcome: Outcome, number: int = 1) -> None:
        """`number` pictures of a request have come to this. `model`: one that is served."""
        self._pictures.labels(model, outcome).inc(number)

    def delivered(self, result: ImageResult, delivered: Delivered, picture_format: str) -> None:
        """`result`: without the image."""
        self._deliver_s.labels(picture_format).observe(delivered.deliver_s)
        size = size_class(result.width, result.height)
        stages = {"all": delivered.latency_s, "queue": result.queue_s, "deliver": delivered.deliver_s}
        stages |= {stage: getattr(result, f"{stage}_s") for stage in STAGES}
        for stage, seconds in stages.items():
            self._picture_s.labels(result.model, size, stage).observe(seconds)

    def observe(self, result: ImageResult) -> None:
        receipt, resolution = result.energy, f"{result.width}x{result.height}"
        samples = [("all", "active", receipt.active_j), ("all", "idle", receipt.idle_share_j)]
        if receipt.phases is not None:
            samples += [(phase, "active", getattr(receipt.phases, phase)) for phase in STAGES]
        for phase, state, joules in samples:
            if joules is not None:
                self._joules.labels(result.model, resolution, phase, state).observe(joules)

    def text(self) -> bytes:
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    """What the engine says at the moment of a scrape; nothing while it is not running."""

    def __init__(self, engine: "AsyncEngine") -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        try:
            stats = self._engine.stats()
        except GenerationError:
            return
        yield self._joules(stats)
        yield from _power(stats)
        yield from _health(stats)
        yield from _loop(stats)
        yield from _deadlines(stats)
        yield from _tenants(stats)
        yield _stages(stats)
        for name, value, says in (
            ("tetrion_devices_overdue", len(stats.recovery.overdue), "Devices whose answer is overdue."),
            ("tetrion_devices_alive", stats.num_alive, "Devices whose worker lives."),
            (
                "tetrion_devices_returning",
                stats.num_devices - stats.num_alive,
                "Devices whose worker is being started.",
            ),
            ("tetrion_requests_queued", stats.num_queued, "Requests that wait for a state slot."),
            ("tetrion_requests_admitted", stats.num_admitted, "Requests that hold a state slot."),
        ):
            yield GaugeMetricFamily(name, says, value=value)

    def describe(self) -> list[Metric]:
        """Registering asks for names; an engine that has not started has no values yet."""
        return []

    def _joules(self, stats: "EngineStats") -> Metric:
        family = CounterMetricFamily(
            "tetrion_energy_joules",
            "Joules of all GPUs: active, idle and unattributed make up their counters.",
            labels=LABELS,
        )
        energy = stats.energy
        for (model, cost_key, phase), joules in sorted((energy.active_j or {}).items()):
            family.add_metric((model, cost_key, phase, "active"), joules)
        for state, total_j in (("idle", energy.idle_j), ("unattributed", energy.unattributed_j)):
            if total_j is not None:
                family.add_metric(("", "", "", state), total_j)
        return family


def _stages(stats: "EngineStats") -> Metric:
    family = GaugeMetricFamily(
        "tetrion_stage_served", "1 if a living device that answers serves the stage, else 0.", labels=("stage",)
    )
    for stage in STAGES:
        family.add_metric((stage,), float(stage not in stats.unserved))
    return family


def _power(stats: "EngineStats") -> Iterator[Metric]:
    power = GaugeMetricFamily("tetrion_gpu_power_watts", "The latest reading of each GPU's power.", labels=("gpu",))
    idle = GaugeMetricFamily("tetrion_gpu_idle_power_watts", "What a GPU drew while it was idle.", labels=("gpu",))
    for family, watts in ((power, stats.energy.watts), (idle, stats.energy.idle_w)):
        for uuid, value in sorted(watts.items()):
            family.add_metric((uuid,), value)
        yield family
    if stats.energy.cpu_j is not None:
        yield CounterMetricFamily(
            "tetrion_cpu_energy_joules",
            "Joules of the CPU packages (RAPL), no part of the GPUs'.",
            value=stats.energy.cpu_j,
        )


def _health(stats: "EngineStats") -> Iterator[Metric]:
    energy, age_s = stats.energy, stats.meter_age_s
    is_up = not energy.reason and (age_s is None or age_s <= STALE_S)
    up = GaugeMetricFamily("tetrion_energy_meter_up", "1 while the meter tells joules.", labels=("source", "reason"))
    reason = energy.reason or ("" if is_up else f"no joules told for more than {STALE_S:g} s")
    up.add_metric((energy.source, reason), float(is_up))
    yield up
    for name, value, says in (
        (
            "identity_error",
            energy.worst_identity_error,
            "Worst window: |active + idle + unattributed − counter| / counter.",
        ),
        (
            "unattributed_share",
            energy.latest.unattributed_share,
            "Latest windows: unattributed over active, before rescaling.",
        ),
        ("raw_error", energy.latest.raw_error, "Latest windows: power samples against the counter."),
        ("model_error", energy.latest.model_error, "Latest windows: the profile's joules against the counter."),
        ("metering_core_share", stats.metering_cost.core_share, "CPU time of sampling, as a share of one core."),
    ):
        if value is not None:
            yield GaugeMetricFamily(f"tetrion_energy_{name}", says, value=value)


def _deadlines(stats: "EngineStats") -> Iterator[Metric]:
    """By the last byte of the answer."""
    delivery = stats.delivery
    deadlines = CounterMetricFamily("tetrion_deadlines", "Deadlines of finished pictures.", labels=("outcome",))
    deadlines.add_metric(("met",), delivery.num_met)
    deadlines.add_metric(("missed",), delivery.num_missed)
    yield deadlines
    yield CounterMetricFamily("tetrion_pictures_dropped", "Pictures that nobody took.", value=delivery.num_dropped)


def _loop(stats: "EngineStats") -> Iterator[Metric]:
    loop, recovery = stats.loop, stats.recovery
    for name, value, says in (
        ("tetrion_loop_cpu_seconds", loop.cpu_s, "CPU time of the engine's loop."),
        ("tetrion_commands", loop.num_commands, "Commands (encodes, chunks of steps, decodes) that devices have done."),
        ("tetrion_device_seconds", loop.device_s, "Usable devices × time."),
        ("tetrion_device_lost_seconds", loop.lost_s, "Device time idle beside a request that could run."),
        ("tetrion_device_held_seconds", loop.held_s, "The part of it that was left idle on purpose."),
        ("tetrion_worker_deaths", recovery.num_deaths, "Workers that were lost."),
        ("tetrion_worker_respawns", recovery.num_respawns, "Workers that were started in place of lost ones."),
        ("tetrion_worker_stalls", recovery.num_stalls, "Times that a worker's answer was overdue."),
        ("tetrion_request_retries", recovery.num_retries, "Requests that went on after a loss or a stall."),
        ("tetrion_repeated_steps", recovery.num_repeated_steps, "Steps that these have run again."),
    ):
        yield CounterMetricFamily(name, says, value=value)


def _tenants(stats: "EngineStats") -> Iterator[Metric]:
    """Of the tenants with most device time, the others in one (see engine/loop/tenant_statistics.py)."""
    requests = CounterMetricFamily(
        "tetrion_tenant_requests",
        "Requests with a deadline that was met or missed, and those that were refused.",
        labels=("tenant", "outcome"),
    )
    device_s = CounterMetricFamily(
        "tetrion_tenant_device_seconds", "Device time of a tenant's commands.", labels=("tenant",)
    )
    for tenant, figures in sorted(stats.tenants.items()):
        name = public_name(tenant)
        requests.add_metric((name, "met"), figures.num_met)
        requests.add_metric((name, "missed"), figures.num_missed)
        requests.add_metric((name, "refused"), figures.num_refused)
        device_s.add_metric((name,), figures.device_s)
    yield requests
    yield device_s
