"""What a planner sees (`Snapshot`) and what it answers (`RoundPlan`). Values only: no clock, no I/O, no torch."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Protocol

import msgspec

from tetrion.engine.config import EnergyMode, PlannerConfig
from tetrion.engine.planning.cost.tables import CostTables
from tetrion.engine.planning.degrees import DegreeTables
from tetrion.engine.stages import STAGES, Stage

Holder = tuple[str, str]
"""Tenant and user."""


class RequestView(msgspec.Struct, frozen=True, kw_only=True):
    """One admitted request. `model` and `cost_key` (the text of a `CostKey`) say what its stages cost. `stage` is what
    it needs next, startable from `ready_s` on (now or earlier: at once; later: when its running command is predicted to
    end, `members` being busy with it until then). `step_index` is the number of steps done by `ready_s`; `members` are
    the devices that hold, or by then will hold, its latents. `deadline_s`: by when the picture must be ready, which
    leaves time for its delivery; None without an SLO. `weight`: worth of meeting it, all factors multiplied. `holder`:
    its tenant and user. `budget_j`: joules that it may still take, None: any number. A request whose last stage
    already runs is not in the snapshot."""

    request_id: str
    stage: Stage
    model: str
    cost_key: str
    step_index: int
    num_steps: int
    arrival_s: float
    deadline_s: float | None
    ready_s: float
    members: tuple[int, ...] = ()
    weight: float = 1.0
    priority: int = 0
    holder: Holder = ("", "")
    force_degrees: tuple[int, ...] = ()
    energy_mode: EnergyMode = "fastest"
    budget_j: float | None = None

    def chunk_steps(self, step_s: float, chunk_s: float) -> int:
        """Steps of the next chunk: as many whole steps as `chunk_s` holds, at least one, at most those remaining."""
        return max(1, min(int(chunk_s / step_s + 1e-9), self.num_steps - self.step_index))


class DeviceView(msgspec.Struct, frozen=True, kw_only=True):
    """`free_s`: when the device's last queued command is predicted to end (now or earlier: idle). `stages`: what it may
    be given."""

    device_id: int
    free_s: float
    stages: tuple[Stage, ...] = STAGES


NO_RANKS: Mapping[Holder, int] = MappingProxyType({})


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """Times are seconds on one clock. Devices are ordered by id, requests by urgency (see `slo.urgency`). `tables`:
    what a request's stages cost, and at which degrees the devices that denoise may run it.

    `backlog`: requests that nothing can bring home in time and nothing is in flight for: their deadline has passed and
    they are ready to denoise. Kept apart since there may be thousands of them in an overload, which a policy
    need not look through at every decision. `requests` are all others; taken together they are all there are. It is
    ordered by rank and `slo.turn`.

    `ranks`: whose turn it is. Those of rank 0 have had less than their share of device time lately, those with higher
    ones more; who is not there has rank 0. A policy may heed it or not.
    """

    now_s: float
    requests: tuple[RequestView, ...]
    devices: tuple[DeviceView, ...]
    tables: DegreeTables
    config: PlannerConfig
    backlog: tuple[RequestView, ...] = ()
    ranks: Mapping[Holder, int] = NO_RANKS

    def rank(self, request: RequestView) -> int:
        return self.ranks.get(request.holder, 0) if self.ranks else 0

    def devices_for(self, stage: Stage) -> tuple[DeviceView, ...]:
        """Those that serve a stage."""
        return tuple([device for device in self.devices if stage in device.stages])

    @property
    def costs(self) -> CostTables:
        return self.tables.costs

    @property
    def all_requests(self) -> tuple[RequestView, ...]:
        """`requests` and `backlog`, in no order."""
        return self.requests + self.backlog


class Assignment(msgspec.Struct, frozen=True, kw_only=True):
    """Run `stage` of a request on `members` next. For `denoise`: `chunk_steps` steps from `step_index` on."""

    request_id: str
    stage: Stage
    members: tuple[int, ...]
    step_index: int = 0
    chunk_steps: int = 0


class RoundPlan(msgspec.Struct, frozen=True, kw_only=True):
    """`assignments` in the order they are to be dispatched. `wake_s`: plan again at this time even if nothing happens
    (None: only at the next event). `num_held`: devices left idle on purpose, although a request is ready."""

    assignments: tuple[Assignment, ...] = ()
    wake_s: float | None = None
    num_held: int = 0


class Planner(Protocol):
    """A policy. Same snapshot, same plan."""

    def __call__(self, snapshot: Snapshot) -> RoundPlan: ...
