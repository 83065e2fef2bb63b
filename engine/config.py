"""Typed configuration: read once, validated on entry, passed down in slices; nothing assigns to it later."""

import os
from collections.abc import Iterable
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from tetrion.engine.hardware.gpus import visible_gpus
from tetrion.engine.shape import COST_KEY

PositiveInt = Annotated[int, Meta(ge=1)]
PositiveFloat = Annotated[float, Meta(gt=0)]
CostKeyText = Annotated[str, Meta(pattern=f"^{COST_KEY}$")]

DEFAULT_CPU_WORKERS = 2
MAX_DEVICES = 64

LoadFormat = Literal["safetensors", "dummy"]
PeerAccess = Literal["auto", "never"]
Attention = Literal["auto", "triton", "cudnn"]
EnergyMode = Literal["fastest", "balanced", "least-energy"]
"""What `horizon` does with time that a deadline leaves: draw at once, at a price, or with as few joules as it can."""


class DeviceSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One device of the engine. `device_id` is its position in the engine; `index` the platform's own number, which
    several devices share when one GPU is named more than once."""

    device_id: int
    kind: Literal["cpu", "cuda"]
    index: int

    @property
    def name(self) -> str:
        return f"{self.kind}:{self.index}"


class PlannerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`lead_s`: a device's next command is planned when its running chunk has at most this long left.
    `chunk_s`: the longest chunk. `patience_s`: soft deadline of requests that carry no SLO, after arrival.

    `class_weights` (of a `CostKey`: "1024x1024") and `tenant_weights` multiply the weight that a request carries (not
    named: by 1).
    `admission`: "reject-hopeless" refuses at once what would miss its deadline.
    `options`: the policy's own, by name or as its struct (`planning/policies/registry.py`; of `horizon`:
    `planning/horizon_options.py`).
    """

    policy: str = "horizon"
    lead_s: Annotated[float, Meta(ge=0, le=1)] = 0.005
    chunk_s: Annotated[float, Meta(gt=0, le=60)] = 0.150
    patience_s: PositiveFloat = 60.0
    class_weights: dict[CostKeyText, PositiveFloat] = {}
    tenant_weights: dict[str, PositiveFloat] = {}
    admission: Literal["all", "reject-hopeless"] = "all"
    options: Any = {}


class MeteringConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`meter`: auto (NVML's counters where the devices are GPUs, else none), nvml, model (the profile's joules), none,
    or `replay:FILE` (recorded readings). `carbon`: grams of CO₂e per kWh, for receipts; None: unknown, unless whoever
    embeds the engine says it (`AsyncEngine`). `period_s`: the shortest time between two readings (see
    `energy/sampler.py`)."""

    meter: Annotated[str, Meta(pattern="^(auto|nvml|model|none|replay:.+)$")] = "auto"
    carbon: float | None = None
    period_s: Annotated[float, Meta(ge=0.02, le=10)] = 0.1
    window_s: Annotated[float, Meta(ge=5, le=600)] = 5.0


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All an engine needs to know. `model`: a diffusers folder, the name of an embedded model (`shapes`), or an id on
    the Hugging Face hub.
    `devices`: `cuda` is every GPU, `cuda:0,2` these two (the same one twice is two workers on it), `cpu:4` four CPU
    workers; None is `cuda` if there is a GPU, else `cpu:2`.
    `load_format`: `dummy` draws random weights, for which config files suffice.
    `peer_access`: `never` keeps the exchange between GPUs in host memory; `auto` does so where they cannot reach
    each other's memory.
    `attention`: what computes it on GPUs; `auto` chooses by token count, head dim and dtype alone.
    `profile`: a file with the measured cost table to plan with; None: the user's or a committed one for these
    GPUs, else measured at the start (see `measure/profile_files.py`, `measure/calibration.py`).
    `num_threads`: CPU threads per worker; None divides the machine's cores among the workers.
    `max_inflight`: requests that may hold a state slot at once; others wait in the queue.
    `max_queued`: requests accepted beyond that before `EngineOverloaded` is raised.
    `start_timeout_s`: how long a worker may take to come up. `stall_timeout_s`: how much longer than predicted a worker
    may be silent, and a recovery may take. `no_worker_timeout_s`: an engine that has had no worker for so long ends."""

    model: str = "shapes"
    devices: str | None = None
    load_format: LoadFormat = "safetensors"
    peer_access: PeerAccess = "auto"
    attention: Attention = "auto"
    profile: str | None = None
    num_threads: PositiveInt | None = None
    max_inflight: Annotated[int, Meta(ge=1, le=4096)] = 64
    max_queued: Annotated[int, Meta(ge=1, le=100_000)] = 4096
    planner: PlannerConfig = PlannerConfig()
    metering: MeteringConfig = MeteringConfig()
    start_timeout_s: PositiveFloat = 300.0
    stall_timeout_s: PositiveFloat = 60.0
    no_worker_timeout_s: PositiveFloat = 120.0
    profile_cache: bool = True


def parse_devices(text: str | None) -> tuple[DeviceSpec, ...]:
    """The devices that `text` names (see `EngineConfig.devices`).

    Raises ValueError naming the field and what is allowed.
    """
    if text is None:
        return _gpus(range(len(visible_gpus()))) or _cpus(DEFAULT_CPU_WORKERS)
    kind, colon, rest = text.strip().partition(":")
    if kind == "cuda":
        return _gpus(_gpu_numbers(text, rest if colon else None))
    if kind != "cpu" or not rest.isdecimal() or not 1 <= int(rest) <= MAX_DEVICES:
        raise ValueError(
            f"devices: expected cpu:N with N from 1 to {MAX_DEVICES} workers, cuda or cuda:0,1,…, got {text!r}"
        )
    return _cpus(int(rest))


def _gpu_numbers(text: str, rest: str | None) -> list[int]:
    num_gpus = len(visible_gpus())
    if not num_gpus:
        raise ValueError(f"devices: no GPU is visible here, use cpu:N; got {text!r}")
    numbers = [str(i) for i in range(num_gpus)] if rest is None else [part.strip() for part in rest.split(",")]
    if not all(number.isdecimal() and int(number) < num_gpus for number in numbers) or len(numbers) > MAX_DEVICES:
        raise ValueError(
            f"devices: expected cuda:I,J,… with up to {MAX_DEVICES} numbers from 0 to {num_gpus - 1}, got {text!r}"
        )
    return [int(number) for number in numbers]


def _gpus(numbers: Iterable[int]) -> tuple[DeviceSpec, ...]:
    return tuple(DeviceSpec(device_id=i, kind="cuda", index=index) for i, index in enumerate(numbers))


def _cpus(count: int) -> tuple[DeviceSpec, ...]:
    return tuple(DeviceSpec(device_id=i, kind="cpu", index=i) for i in range(count))


def threads_per_worker(config: EngineConfig, num_workers: int) -> int:
    """CPU threads for each worker: what the config says, else the available cores divided among the workers."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return config.num_threads or max(1, available // num_workers)
