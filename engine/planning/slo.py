"""Deadline arithmetic: when a request is due, when its denoising must be done, who is more urgent."""

from tetrion.engine.config import PlannerConfig
from tetrion.engine.planning.snapshot import RequestView

MARGIN_S = 0.010


def due_s(request: RequestView, config: PlannerConfig) -> float:
    """The deadline; for a request without SLO the soft one, `patience_s` after its arrival, and as often later as its
    tenant has had a chunk's device time more than another."""
    if request.deadline_s is not None:
        return request.deadline_s
    return request.arrival_s + config.patience_s * (1 + request.tenant_lead_s / config.chunk_s)


def denoise_due_s(due: float, after_s: float) -> float:
    """When denoising has to be finished: deadline less what comes after it less a margin for dispatch."""
    return due - after_s - MARGIN_S


def slo_s(request: RequestView, config: PlannerConfig) -> float:
    """The SLO in seconds (without one: `patience_s`), at least 1 ms."""
    return max(due_s(request, config) - request.arrival_s, 1e-3)


def urgency(request: RequestView, config: PlannerConfig) -> tuple[float, int, str]:
    """Sort key: earliest deadline, then larger priority, then request id."""
    return due_s(request, config), -request.priority, request.request_id


def arrival_order(request: RequestView) -> tuple[float, int, str]:
    """Sort key: first come first served, then larger priority, then request id."""
    return request.arrival_s, -request.priority, request.request_id
