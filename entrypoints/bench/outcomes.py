"""What became of the requests of a trace (`Outcome`) in one run of it (`Run`), simulated or live, and what devices did
(`Chunk`). Values only. Times are seconds from the start of the trace."""

from typing import Literal

import msgspec

from tetrion.engine.loop.statistics import LoopFigures
from tetrion.engine.stages import Stage
from tetrion.entrypoints.bench.workloads import TraceRequest

Mode = Literal["sim", "live"]


class Chunk(msgspec.Struct, frozen=True, kw_only=True):
    """One command: `stage` of request number `request` (its place in the trace) on `members`.

    `start_s`: when the first member began, its wait for the others included; `joined_s`: when the last one began;
    `end_s`: when the last one was done; `net_s`: the time of the stage itself on the slowest member, without waiting;
    `busy_s`: device-seconds over all members. Only `denoise` has steps. `failed`: it brought no result.
    """

    request: int
    stage: Stage
    members: tuple[int, ...]
    start_s: float
    joined_s: float
    end_s: float
    net_s: float
    busy_s: float
    step_index: int = 0
    chunk_steps: int = 0
    failed: bool = False


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one request of the trace. `finished_s`: seconds from the start of the trace, None: it failed.
    `gpu_s`: GPU-seconds spent on it, those of lost attempts included; None where the server does not say. `degrees`: of
    each step. `refused`: at once, by admission."""

    request: TraceRequest
    finished_s: float | None
    gpu_s: float | None
    degrees: tuple[int, ...]
    refused: bool = False

    @property
    def latency_s(self) -> float | None:
        return None if self.finished_s is None else self.finished_s - self.request.arrival_s

    @property
    def is_met(self) -> bool | None:
        """Whether it finished by its deadline; None without an SLO."""
        if self.request.slo_s is None:
            return None
        latency_s = self.latency_s
        return latency_s is not None and latency_s <= self.request.slo_s


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """`outcomes` in the order of the trace; `end_s`: when the last request ended; `decision_s`: wall-clock seconds of
    each call of the planner (of a simulation the only part that differs between two runs of one seed).

    `max_lag_s`: by how much the latest request was submitted after its time (0 in simulation). `loop`: what the engine
    loop cost in this run; None where the server does not say. `joules`: by the receipt of each finished picture, its
    share of idle included (None: not metered); empty in simulation. `zero_s`: the trace's start on the loop's clock, on
    which TetriServe's rounds lie; None: not known.
    """

    outcomes: tuple[Outcome, ...]
    num_devices: int
    end_s: float
    decision_s: tuple[float, ...] = ()
    max_lag_s: float = 0.0
    loop: LoopFigures | None = None
    joules: tuple[float | None, ...] = ()
    zero_s: float | None = None

    @property
    def gpu_s(self) -> float | None:
        """GPU-seconds of all requests, None if those of any are unknown."""
        spent = [outcome.gpu_s for outcome in self.outcomes]
        return None if any(gpu_s is None for gpu_s in spent) else sum(filter(None, spent))

    @property
    def utilisation(self) -> float | None:
        """Share of the devices' time that commands took, until the end."""
        gpu_s = self.gpu_s
        return None if gpu_s is None or self.end_s <= 0 else gpu_s / (self.num_devices * self.end_s)
