"""The policy, watched: whatever it raises, and every plan that cannot be carried out, costs the requests it concerns
and not the loop.

    plan ──it raises, or its plan has a fault──▶ each request of the snapshot is planned alone
                                                    │ some fail alone         │ none does, or anybody would
                                                    ▼                         ▼
                                               these end              plan again soon; after MAX_FAILURES
                                                                      in a row by FALLBACK, for good

A request that fails alone is to blame only if the policy can plan a stranger at the same stage: of another size where
there is one, and without a wish. Otherwise one bad request alone on the engine could not be told from a broken policy.
If FALLBACK fails and nobody is to blame, all requests of the snapshot are given up. Pure but for the log and the count.
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping

import msgspec

from tetrion.engine.errors import shown
from tetrion.engine.planning.policies.registry import get_planner
from tetrion.engine.planning.snapshot import Assignment, Planner, RequestView, RoundPlan, Snapshot

logger = logging.getLogger(__name__)
FALLBACK = "fixed-1"
MAX_FAILURES = 3
RETRY_S = 0.01
NOBODY: Mapping[str, Exception] = {}

ViewOf = Callable[[str], RequestView | None]
"""The view of a request in the snapshot."""


class PlanFault(ValueError):
    """A plan that cannot be carried out."""


class GuardedPlanner:
    """`policy`: the name of the one in use."""

    def __init__(self, policy: str) -> None:
        self.policy = policy
        self._fallback: Planner | None = None
        self._num_failures = 0

    def plan(self, planner: Planner, snapshot: Snapshot, view_of: ViewOf) -> tuple[RoundPlan, Mapping[str, Exception]]:
        """What runs next, as `planner` (or FALLBACK in its place) says; requests that are to end, and why."""
        planner = self._fallback or planner
        try:
            plan = planner(snapshot)
            check_plan(plan, snapshot, view_of)
        except Exception as error:  # whatever a policy raises
            return self._without_plan(planner, snapshot, error)
        self._num_failures = 0
        return plan, NOBODY

    def _without_plan(
        self, planner: Planner, snapshot: Snapshot, error: Exception
    ) -> tuple[RoundPlan, Mapping[str, Exception]]:
        plan, ids = RoundPlan(wake_s=snapshot.now_s + RETRY_S), [view.request_id for view in snapshot.all_requests]
        logger.error("the policy %s made no plan for requests %s", self.policy, ", ".join(ids), exc_info=error)
        if to_blame := who_is_to_blame(planner, snapshot):
            return plan, to_blame
        if self._fallback is not None:
            return plan, dict.fromkeys(ids, error)
        self._num_failures += 1
        if self._num_failures == MAX_FAILURES:
            self._fall_back()
        return plan, NOBODY

    def _fall_back(self) -> None:
        logger.error(
            "the policy %s failed %d times in a row: from now on %s plans in its place",
            self.policy,
            MAX_FAILURES,
            FALLBACK,
        )
        self.policy, self._fallback = FALLBACK, get_planner(FALLBACK)


def who_is_to_blame(planner: Planner, snapshot: Snapshot) -> dict[str, Exception]:
    """The requests that `planner` cannot plan even alone, though it can a stranger at their stage."""
    fails_alone = [(view, error) for view, alone in _each_alone(snapshot) if (error := _try(planner, alone, view))]
    stages = {view.stage: view for view, _ in fails_alone}
    strangers = [_stranger(view, snapshot) for view in stages.values()]
    sound = {view.stage for view in strangers if _try(planner, _alone(snapshot, view), view) is None}
    return {view.request_id: error for view, error in fails_alone if view.stage in sound}


def _each_alone(snapshot: Snapshot) -> Iterator[tuple[RequestView, Snapshot]]:
    for view in snapshot.requests:
        yield view, _alone(snapshot, view)
    for view in snapshot.backlog:
        yield view, msgspec.structs.replace(snapshot, requests=(), backlog=(view,))


def _alone(snapshot: Snapshot, view: RequestView) -> Snapshot:
    return msgspec.structs.replace(snapshot, requests=(view,), backlog=())


def _stranger(view: RequestView, snapshot: Snapshot) -> RequestView:
    """A request in the same place that asks for nothing of its own."""
    keys = snapshot.costs.profiles[view.model].classes
    return RequestView(
        request_id="",
        stage=view.stage,
        model=view.model,
        cost_key=next((key for key in keys if key != view.cost_key), view.cost_key),
        step_index=view.step_index,
        num_steps=view.num_steps,
        arrival_s=snapshot.now_s,
        deadline_s=None,
        ready_s=view.ready_s,
        members=view.members,
    )


def _try(planner: Planner, snapshot: Snapshot, view: RequestView) -> Exception | None:
    """Why the policy makes no plan of the one request in `snapshot`, if it does not."""
    try:
        check_plan(planner(snapshot), snapshot, {view.request_id: view}.get)
    except Exception as error:
        return error
    return None


# Plans ------------------------------------------------------------------------------------------------------------


def check_plan(plan: RoundPlan, snapshot: Snapshot, view_of: ViewOf) -> None:
    """Raises PlanFault for a plan that is of the wrong type, or gives a request or a device what it cannot take now.
    (What is no plan at all may raise anything.)"""
    if not isinstance(plan, RoundPlan):
        raise PlanFault(f"{shown(plan)} is no RoundPlan")
    if plan.wake_s is not None and not (isinstance(plan.wake_s, (float, int)) and math.isfinite(plan.wake_s)):
        raise PlanFault(f"wake_s: {shown(plan.wake_s)} is no time")
    if type(plan.num_held) is not int or plan.num_held < 0:
        raise PlanFault(f"num_held: {shown(plan.num_held)} is no number of devices")
    if not plan.assignments:
        return
    limit_s = snapshot.now_s + snapshot.config.lead_s
    idle = {device.device_id: device.stages for device in snapshot.devices if device.free_s <= limit_s}
    assigned: set[str] = set()
    for assignment in plan.assignments:
        view = view_of(assignment.request_id)
        if view is None or assignment.request_id in assigned:
            raise PlanFault(f"request {shown(assignment.request_id)} is not to be planned, or was")
        assigned.add(assignment.request_id)
        _check_stage(assignment, view, snapshot)
        for member in assignment.members:
            if type(member) is not int or member not in idle:
                raise PlanFault(f"device {shown(member)} is not idle, or was given something: {shown(assignment)}")
            if assignment.stage not in idle.pop(member):
                raise PlanFault(f"device {member} does not serve {assignment.stage}: {shown(assignment)}")


def _check_stage(assignment: Assignment, view: RequestView, snapshot: Snapshot) -> None:
    if assignment.stage != view.stage:
        raise PlanFault(f"stage: {shown(assignment.stage)}, the next one is {view.stage}")
    if type(assignment.members) is not tuple:
        raise PlanFault(f"members: {shown(assignment.members)} is no tuple")
    degree = len(assignment.members)
    if view.stage != "denoise":
        if degree != 1:
            raise PlanFault(f"members: {view.stage} runs on one device, got {degree}")
        return
    legal_degrees = snapshot.tables[view.model, view.cost_key].legal
    if degree not in legal_degrees:
        raise PlanFault(f"members: {degree} is not one of the degrees {', '.join(map(str, legal_degrees))}")
    if assignment.step_index != view.step_index:
        raise PlanFault(f"step_index: {shown(assignment.step_index)}, the next step is {view.step_index}")
    steps, num_left = assignment.chunk_steps, view.num_steps - view.step_index
    if type(steps) is not int or not 1 <= steps <= num_left:
        raise PlanFault(f"chunk_steps: must be from 1 to {num_left}, got {shown(steps)}")
