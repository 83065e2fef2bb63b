"""Typed configuration: read once, validated on entry, passed down in slices; nothing assigns to it later."""

import os
from collections.abc import Iterable
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from tetrion.engine.errors import shown
from tetrion.engine.hardware.control_groups import available_cpus
from tetrion.engine.hardware.gpus import visible_gpus
from tetrion.engine.shape import COST_KEY
from tetrion.engine.stages import STAGES, Stage

PositiveInt = Annotated[int, Meta(ge=1)]
PositiveFloat = Annotated[float, Meta(gt=0)]
CostKeyText = Annotated[str, Meta(pattern=f"^{COST_KEY}$")]

DEFAULT_CPU_WORKERS = 2
MAX_DEVICES = 64
MAX_MODELS = 32

LoadFormat = Literal["safetensors", "dummy"]
PeerAccess = Literal["auto", "never"]
Attention = Literal["auto", "triton", "cudnn"]
EnergyMode = Literal["fastest", "balanced", "least-energy"]
"""What `horizon` does with time that a deadline leaves: draw at once, at a price, or with as few joules as it can."""


def option(description: str, **extra: str) -> Meta:
    """Makes a field of the configuration an option of the command line. `extra`: `flag` where the option has another
    name than the field, `metavar` for what is not a number or a choice."""
    return Meta(description=description, extra=extra)


class DeviceSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One device of the engine. `device_id` is its position in the engine; `index` the platform's own number, which
    several devices share when one GPU is named more than once. `stages`: what it serves."""

    device_id: int
    kind: Literal["cpu", "cuda"]
    index: int
    stages: tuple[Stage, ...] = STAGES

    @property
    def name(self) -> str:
        return f"{self.kind}:{self.index}"


class PlannerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`lead_s`: a device's next command is planned when its running chunk has at most this long left.
    `chunk_s`: the longest chunk. `patience_s`: soft deadline of requests that carry no SLO, after arrival.

    `class_weights` (of a `CostKey`: "1024x1024") and `tenant_weights` multiply the weight that a request carries (not
    named: by 1). Device time is shared by `tenant_weights` (`loop/device_shares.py`), slots are shared equally.
    `admission`: "reject-hopeless" refuses at once what would miss its deadline; who has none is never refused for that.
    `options`: the policy's own, by name or as its struct (`planning/policies/registry.py`; of `horizon`:
    `planning/horizon_options.py`).
    """

    policy: Annotated[str, option("Planner: horizon, fixed-1, fixed-2, …", metavar="NAME")] = "horizon"
    lead_s: Annotated[float, Meta(ge=0, le=1)] = 0.005
    chunk_s: Annotated[float, Meta(gt=0, le=60)] = 0.150
    patience_s: PositiveFloat = 60.0
    class_weights: dict[CostKeyText, PositiveFloat] = {}
    tenant_weights: dict[str, PositiveFloat] = {}
    admission: Literal["all", "reject-hopeless"] = "all"
    options: Any = {}


class MeteringConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`period_s`: the shortest time between two readings (see `energy/sampler.py`); `window_s`: after so long they are
    held against the counters."""

    meter: Annotated[
        str,
        Meta(pattern="^(auto|nvml|model|none|replay:.+)$"),
        option(
            "Energy: auto (NVML's counters where the devices are GPUs, else none), nvml, model (the profile's joules),"
            " none, or replay:FILE (recorded readings).",
            metavar="NAME",
        ),
    ] = "auto"
    carbon: Annotated[
        float | None,
        option("Grams of CO₂e per kWh, for receipts. Default: none given.", metavar="G"),
    ] = None
    period_s: Annotated[float, Meta(ge=0.02, le=10)] = 0.1
    window_s: Annotated[float, Meta(ge=5, le=600)] = 5.0


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All an engine needs to know.

    A field with `option` is an option of every command that starts an engine, and what is said there is its help.
    """

    models: Annotated[
        tuple[str, ...],
        Meta(min_length=1, max_length=MAX_MODELS),
        option(
            "A FLUX.1, SD3 or SD3.5 folder in diffusers layout, its id on the Hugging Face hub (OWNER/NAME or"
            " OWNER/NAME@REVISION), or an embedded model (shapes, shapes-sd3). Repeat it to draw with several; requests"
            " that name none get the first.",
            flag="--model",
            metavar="PATH",
        ),
    ] = ("shapes",)
    model_aliases: Annotated[
        dict[str, str],
        option("Another name that requests may give to a model.", flag="--model-alias", metavar="NAME=MODEL"),
    ] = {}
    devices: Annotated[
        str | None,
        option(
            "cuda (every GPU), cuda:0,1 (these two; the same one twice is two workers on it) or cpu:N (N CPU workers)."
            " Default: all GPUs, or cpu:2.",
            metavar="LIST",
        ),
    ] = None
    roles: Annotated[
        str,
        option(
            "Which stages each device serves, such as 0:encode+decode,1-3:denoise (devices by their place in --devices,"
            " from 0), so that it has the weights of these alone. all: every device serves all. auto: all where the"
            " models fit that way, else roles with which they do.",
            metavar="ROLES",
        ),
    ] = "auto"
    load_format: Annotated[
        LoadFormat, option("dummy: random weights, for measuring without a checkpoint: config files suffice.")
    ] = "safetensors"
    peer_access: PeerAccess = "auto"
    """`never` keeps the exchange between GPUs in host memory; `auto` does so where they cannot reach each other's."""
    attention: Annotated[
        Attention, option("What computes attention on GPUs. auto chooses by token count, head dim and dtype alone.")
    ] = "auto"
    profiles: Annotated[
        dict[str, str],
        option(
            "A model's measured cost table; MODEL= may be left out of the first one's. Default: the user's or the one"
            " that ships for these GPUs, else measured at the start.",
            flag="--profile",
            metavar="[MODEL=]FILE",
        ),
    ] = {}
    num_threads: Annotated[
        PositiveInt | None,
        option("CPU threads per worker. Default: all that there are, or a container's quota, divided."),
    ] = None
    max_inflight: Annotated[
        int,
        Meta(ge=1, le=4096),
        option("Requests that may hold a state slot at once, shared by tenants; others wait in the queue."),
    ] = 64
    max_queued: Annotated[
        int,
        Meta(ge=1, le=100_000),
        option("Requests accepted beyond that before others are refused; shared by tenants, too."),
    ] = 4096
    queue_timeout_s: Annotated[
        PositiveFloat | None,
        option(
            "A request for which no device has done anything for so long fails: one that waits in the queue, and one"
            " that others always go before. What runs is not cut. Default: 600 for serve, else it waits on."
        ),
    ] = None
    planner: Annotated[
        PlannerConfig,
        option("A setting of the planner, such as energy=least-energy; may be repeated.", metavar="KEY=VALUE"),
    ] = PlannerConfig()
    metering: MeteringConfig = MeteringConfig()
    start_timeout_s: Annotated[PositiveFloat, option("How long a worker may take to come up.")] = 300.0
    stall_timeout_s: Annotated[
        PositiveFloat,
        option("A worker whose answer has been overdue (ten times its prediction and a second) for so long is killed."),
    ] = 20.0
    no_worker_timeout_s: Annotated[PositiveFloat, option("An engine that has had no worker for so long ends.")] = 120.0
    profile_cache: bool = True
    """Whether what is measured at the start is kept in the user's cache, and read from there."""

    def __post_init__(self) -> None:
        if isinstance(self.models, str):  # it would be read as letters
            raise ValueError(f"models: must be a sequence of names, got the text {self.models!r}")


def checked(config: EngineConfig) -> EngineConfig:
    """The same in exact builtin types, with every bound kept: what is made in Python was not looked at so far. Raises
    ValueError naming the field and what is allowed."""
    try:
        return msgspec.convert(msgspec.to_builtins(config, enc_hook=_plain), EngineConfig)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `$.")
        raise ValueError(f"{path.rstrip('`') or 'config'}: {message}") from None
    except (TypeError, OverflowError) as error:
        raise ValueError(f"config: {error}") from None


def _plain(value: Any) -> Any:
    """A number of numpy's, a path. Raises TypeError."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "dtype") and getattr(value, "ndim", None) == 0:
        return value.item()
    raise TypeError(f"{shown(value)} is of no type that a configuration has")


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
    """CPU threads for each worker: what the config says, else the processors that this process may use (its affinity,
    its container's quota) divided among the workers."""
    return config.num_threads or max(1, available_cpus() // num_workers)
