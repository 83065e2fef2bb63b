"""Deadline arithmetic: when a request is due, when its denoising must be done, who is more urgent."""

from tetrion.engine.config import PlannerConfig
from tetrion.engine.planning.degrees import DegreeTable
from tetrion.engine.planning.snapshot import RequestView

Turn = tuple[float, int, str]

MARGIN_S = 0.010
STRETCH = 2.0
"""Small ones hardly delay large ones, and finish much sooner."""


def due_s(request: RequestView, config: PlannerConfig) -> float:
    """The deadline; for a request without SLO the soft one, `patience_s` after its arrival."""
    return request.arrival_s + config.patience_s if request.deadline_s is None else request.deadline_s


def denoise_due_s(due: float, after_s: float) -> float:
    """When denoising has to be finished: deadline less what comes after it less a margin for dispatch."""
    return due - after_s - MARGIN_S


def urgency(request: RequestView, config: PlannerConfig) -> tuple[float, int, str]:
    """Sort key: earliest deadline, then larger priority, then request id."""
    return due_s(request, config), -request.priority, request.request_id


def turn(request: RequestView, table: DegreeTable) -> Turn:
    """Sort key of those that no deadline speaks for: first come first served, but that every device second of work
    which is left counts like having come `STRETCH` seconds later; then larger priority, then request id."""
    work_s = (request.num_steps - request.step_index) * table.work_s
    return request.arrival_s + STRETCH * work_s, -request.priority, request.request_id


def arrival_order(request: RequestView) -> tuple[float, int, str]:
    """Sort key: first come first served, then larger priority, then request id."""
    return request.arrival_s, -request.priority, request.request_id
