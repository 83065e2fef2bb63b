"""Admission: can a new request meet its deadline beside those that are there, and if not, which one could it meet?

Judged as `horizon` plans: a forward fill in order of deadline, in which the new request may displace others just as it
would once it was admitted. Only those count that can still meet their own deadlines: requests without one give way, as
do late ones but for their encodes and decodes, which nobody goes before. Of very many the fill has those nearest to the
newcomer's deadline; what comes before these counts as work that keeps every device busy. Pure arithmetic.
"""

import math
from collections.abc import Sequence

import msgspec

from tetrion.engine.config import PlannerConfig
from tetrion.engine.planning.degrees import DegreeTables
from tetrion.engine.planning.forward_fill import DROP_FIRST, Work, fill
from tetrion.engine.planning.free_profile import FreeProfile
from tetrion.engine.planning.horizon_options import horizon_options
from tetrion.engine.planning.slo import MARGIN_S, denoise_due_s, due_s
from tetrion.engine.planning.snapshot import RequestView, Snapshot
from tetrion.engine.stages import AFTER_STEPS, AUX_FROM, AUX_STAGES, BEFORE_STEPS, STAGES

MIN_BEFORE, BEFORE_A_DEVICE = 48, 4
"""More than `horizon` weighs against each other at once: it looks again when those ahead are done."""


def num_around(num_devices: int, config: PlannerConfig) -> tuple[int, int]:
    """How many requests before and after a newcomer, in order of deadline, are to be in the snapshot."""
    bound = horizon_options(config).max_candidates or max(MIN_BEFORE, BEFORE_A_DEVICE * num_devices)
    return bound, bound // 2


class Forecast(msgspec.Struct, frozen=True, kw_only=True):
    """What is judged: `newcomer`, of which nothing is done yet, beside the requests of the snapshot. `work_before_s`:
    device seconds of requests that come before all of these. `crowded_until_s`: where it would be too much for some
    behind them, and the first to be given up, the time at which their work is done."""

    snapshot: Snapshot
    newcomer: RequestView
    work_before_s: float = 0.0
    crowded_until_s: float | None = None


def earliest_deadline_s(forecast: Forecast) -> float | None:
    """None if the newcomer can meet its deadline, has none, or no device serves some stage now; else the earliest
    deadline that it could meet with nobody displaced for it, as far as the forecast shows them."""
    snapshot, newcomer = forecast.snapshot, forecast.newcomer
    if newcomer.deadline_s is None or not all([snapshot.devices_for(stage) for stage in STAGES]):
        return None
    if forecast.work_before_s:
        snapshot = _later(snapshot, forecast.work_before_s / snapshot.tables.num_devices)
    earliest_s, is_in_time = _judge(snapshot, newcomer, newcomer.deadline_s)
    if forecast.crowded_until_s is not None:
        return max(earliest_s, forecast.crowded_until_s)
    return None if is_in_time else earliest_s


def _judge(snapshot: Snapshot, newcomer: RequestView, deadline_s: float) -> tuple[float, bool]:
    """The earliest deadline that it could meet with nobody displaced for it, and whether it can meet its own."""
    tables = snapshot.tables
    others = [view for view in snapshot.requests if view.deadline_s is not None]
    to_denoise = [view for view in others if view.stage not in AFTER_STEPS]
    works = [work for view in to_denoise if not (work := _work(snapshot, tables, view)).is_late]
    drop_first = DROP_FIRST[horizon_options(snapshot.config).drop]
    profile, new = _free_profile(snapshot), _work(snapshot, tables, newcomer)
    fill(profile, works, drop_first)
    end_s = profile.finish_s(new.table, new.table.widest, new.start_s, new.remaining, math.inf)
    late_s = _aux_s(snapshot, tables, snapshot.backlog)
    earliest_s = end_s + late_s + _aux_s(snapshot, tables, others) + new.table.after_s + MARGIN_S
    if earliest_s <= deadline_s:
        return earliest_s, True
    place = sum(work.due_s <= new.due_s for work in works)
    before = [view for view in others if due_s(view, snapshot.config) <= deadline_s]
    new = _work(snapshot, tables, newcomer, late_s + _aux_s(snapshot, tables, before))
    if not new.is_late:
        fill(_free_profile(snapshot), [*works[:place], new, *works[place:]], drop_first)
    return earliest_s, new.level > 0


def _later(snapshot: Snapshot, seconds: float) -> Snapshot:
    """Every device is free so much later."""
    devices = [
        msgspec.structs.replace(device, free_s=max(device.free_s, snapshot.now_s) + seconds)
        for device in snapshot.devices
    ]
    return msgspec.structs.replace(snapshot, devices=tuple(devices))


def _aux_s(snapshot: Snapshot, tables: DegreeTables, views: Sequence[RequestView]) -> float:
    """How long the encodes and decodes that these requests still need keep all devices busy that serve them."""
    costs = [(view.stage, tables[view.model, view.cost_key].cost.aux_s) for view in views]
    num_devices = {stage: len(snapshot.devices_for(stage)) for stage in AUX_STAGES}
    return sum(aux_s[stage] / num_devices[stage] for following, aux_s in costs for stage in AUX_FROM[following])


def _free_profile(snapshot: Snapshot) -> FreeProfile:
    return FreeProfile(snapshot.now_s, (device.free_s for device in snapshot.devices_for("denoise")))


def _work(snapshot: Snapshot, tables: DegreeTables, view: RequestView, lost_s: float = 0.0) -> Work:
    """`lost_s` of the time until it is due are needed for something else."""
    table, start_s = tables[view.model, view.cost_key], max(snapshot.now_s, view.ready_s)
    if view.stage in BEFORE_STEPS:
        soonest_s = min(device.free_s for device in snapshot.devices_for(view.stage))
        start_s = max(start_s, soonest_s) + table.before_s[view.stage]
    due = denoise_due_s(due_s(view, snapshot.config), table.after_s) - lost_s
    return Work(view, table, start_s, due, True)
