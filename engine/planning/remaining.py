"""What a request has still before it, at best: whether its deadline can be met, and how much work it is to others."""

from typing import NamedTuple

from tetrion.engine.planning.degrees import DegreeTable
from tetrion.engine.planning.slo import MARGIN_S
from tetrion.engine.stages import AFTER_STEPS, BEFORE_STEPS, Stage


class Remaining(NamedTuple):
    """`fastest_s`: on idle devices, at the widest degree, with the planner's margin: a request that has less time left
    is late. `device_s`: device seconds at the narrowest degree."""

    fastest_s: float
    device_s: float


NOTHING = Remaining(0.0, 0.0)


def remaining(table: DegreeTable, stage: Stage | None, num_steps: int) -> Remaining:
    """Of a request whose next stage this is (None: its last one runs) and that has so many steps left."""
    if stage is None:
        return NOTHING
    if stage in AFTER_STEPS:
        return Remaining(table.after_s + MARGIN_S, table.after_s)
    before_s = table.before_s[stage] if stage in BEFORE_STEPS else 0.0
    aux_s = before_s + table.after_s
    return Remaining(aux_s + num_steps * table.fastest_step_s + MARGIN_S, aux_s + num_steps * table.work_s)
