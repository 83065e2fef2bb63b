"""Typed configuration: read once, validated on entry, passed down in slices; nothing assigns to it later."""

import os
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

PositiveInt = Annotated[int, Meta(ge=1)]
PositiveFloat = Annotated[float, Meta(gt=0)]

DEFAULT_DEVICES = "cpu:2"
MAX_DEVICES = 64


class DeviceSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One device of the engine. `device_id` is its position in the engine; `index` the platform's own number."""

    device_id: int
    kind: Literal["cpu"]
    index: int

    @property
    def name(self) -> str:
        return f"{self.kind}:{self.index}"


class PlannerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`lead_s`: a device's next command is planned when its running chunk has at most this long left.
    `chunk_s`: the longest chunk. `patience_s`: soft deadline of requests that carry no SLO, after arrival."""

    policy: str = "horizon"
    lead_s: Annotated[float, Meta(ge=0, le=1)] = 0.005
    chunk_s: Annotated[float, Meta(gt=0, le=60)] = 0.150
    patience_s: PositiveFloat = 60.0


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All an engine needs to know. `model`: a diffusers folder, or the name of an embedded model (`shapes`).
    `devices`: `cpu:4` is four CPU workers; None is `cpu:2`.
    `num_threads`: CPU threads per worker; None divides the machine's cores among the workers.
    `max_inflight`: requests that may hold a state slot at once; others wait in the queue.
    `max_queued`: requests accepted beyond that before `EngineOverloaded` is raised."""

    model: str = "shapes"
    devices: str | None = None
    num_threads: PositiveInt | None = None
    max_inflight: Annotated[int, Meta(ge=1, le=4096)] = 64
    max_queued: Annotated[int, Meta(ge=1, le=100_000)] = 4096
    planner: PlannerConfig = PlannerConfig()
    start_timeout_s: PositiveFloat = 300.0
    stall_timeout_s: PositiveFloat = 60.0
    profile_cache: bool = True


def parse_devices(text: str | None) -> tuple[DeviceSpec, ...]:
    """The devices that `text` names (see `EngineConfig.devices`).

    Raises ValueError naming the field and what is allowed.
    """
    kind, _, rest = (text or DEFAULT_DEVICES).partition(":")
    if kind == "cuda":
        raise ValueError(f"devices: this version has CPU workers only (cpu:N), got {text!r}")
    if kind != "cpu" or not rest.isdecimal() or not 1 <= int(rest) <= MAX_DEVICES:
        raise ValueError(f"devices: expected cpu:N with N from 1 to {MAX_DEVICES} workers, got {text!r}")
    return tuple(DeviceSpec(device_id=i, kind="cpu", index=i) for i in range(int(rest)))


def threads_per_worker(config: EngineConfig, num_workers: int) -> int:
    """CPU threads for each worker: what the config says, else the available cores divided among the workers."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return config.num_threads or max(1, available // num_workers)
