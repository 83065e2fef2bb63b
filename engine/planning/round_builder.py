"""A plan in the making: which devices are idle, when the others become free, what has been assigned so far.

The one place that knows which device serves which stage: policies ask it for room, and it chooses who gets what.
"""

from collections.abc import Collection, Iterable, Sequence

from tetrion.engine.planning.placement import NO_CLAIMS, choose_members
from tetrion.engine.planning.snapshot import Assignment, RequestView, RoundPlan, Snapshot
from tetrion.engine.stages import STAGES, Stage

RETURN_S = 10.0
"""A stage that no device serves now is expected to be served again after so long: its worker is being started."""


class RoundBuilder:
    """Collects the assignments of one decision. `limit_s`: devices and requests that are free or ready by then may be
    assigned (the command waits in the queue until both are); `idle`: the devices of which that holds."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        self.limit_s = snapshot.now_s + snapshot.config.lead_s
        now_s = snapshot.now_s
        self.free_s = {d.device_id: d.free_s if d.free_s > now_s else now_s for d in snapshot.devices}
        self.idle = {device_id for device_id, free_s in self.free_s.items() if free_s <= self.limit_s}
        self.stages = {d.device_id: d.stages for d in snapshot.devices if d.stages != STAGES}
        """Of devices that do not serve all."""
        self._assignments: list[Assignment] = []
        self._wake_s: float | None = None

    def is_ready(self, request: RequestView) -> bool:
        return request.ready_s <= self.limit_s

    def serves(self, device_id: int, stage: Stage) -> bool:
        return stage in self.stages.get(device_id, STAGES)

    def idle_for(self, stage: Stage) -> set[int]:
        """Idle devices that serve the stage. Not to be changed."""
        return {device for device in self.idle if self.serves(device, stage)} if self.stages else self.idle

    @property
    def room(self) -> int:
        """How many idle devices there are for steps."""
        return len(self.idle_for("denoise"))

    def free_for(self, stage: Stage) -> dict[int, float]:
        """When each device that serves the stage is free (now or later), by its id."""
        if not self.stages:
            return self.free_s
        return {device: free_s for device, free_s in self.free_s.items() if self.serves(device, stage)}

    def soonest_s(self, stage: Stage) -> float:
        """When the first device that serves the stage is free."""
        return min(self.free_for(stage).values(), default=self.snapshot.now_s + RETURN_S)

    def num_denoising(self, request: RequestView) -> int:
        """How many of its members may be given steps."""
        if not self.stages:
            return len(request.members)
        return sum([self.serves(member, "denoise") for member in request.members])

    def _order(self, device_id: int) -> tuple[int, float]:
        """Those that serve fewest stages first, then the one that is free first."""
        return len(self.stages.get(device_id, STAGES)), self.free_s[device_id]

    def occupy(self, device_ids: Iterable[int], until_s: float) -> None:
        """These devices are busy until then."""
        for device_id in device_ids:
            self.free_s[device_id] = until_s
            self.idle.discard(device_id)

    def start_all(self, starting: Sequence[tuple[RequestView, int, int | None]]) -> None:
        """Start the steps of all these, in order: (request, degree, steps or None), keeping placements: devices that a
        later one holds are taken last."""
        wanted = [set(request.members[:degree]) for request, degree, _ in starting]
        for i, (request, degree, num_steps) in enumerate(starting):
            self.start(request, degree, claimed=set().union(*wanted[i + 1 :]), num_steps=num_steps)

    def start(
        self,
        request: RequestView,
        degree: int = 1,
        claimed: Collection[int] = NO_CLAIMS,
        num_steps: int | None = None,
    ) -> Assignment:
        """Assign the request's stage to `degree` idle devices that serve it (`claimed` ones last), which are busy then
        until `free_s`; `num_steps` overrides the chunk's usual length."""
        cost = self.snapshot.costs.cost(request.model, request.cost_key)
        members = choose_members(request.members, degree, self.idle_for(request.stage), self._order, claimed)
        step_index = steps = 0
        if request.stage == "denoise":
            step_s = cost.step_s(degree)
            step_index = request.step_index
            steps = num_steps or request.chunk_steps(step_s, self.snapshot.config.chunk_s)
            duration_s = steps * step_s
        else:
            duration_s = cost.aux_s[request.stage]
        start_s = max(request.ready_s, *[self.free_s[device_id] for device_id in members])
        self.occupy(members, start_s + duration_s)
        assignment = Assignment(
            request_id=request.request_id,
            stage=request.stage,
            members=members,
            step_index=step_index,
            chunk_steps=steps,
        )
        self._assignments.append(assignment)
        return assignment

    def wake_at(self, time_s: float) -> None:
        """Ask for another decision at this time (the earliest asked for counts)."""
        time_s = max(time_s, self.snapshot.now_s)
        self._wake_s = time_s if self._wake_s is None else min(self._wake_s, time_s)

    def build(self, num_held: int = 0) -> RoundPlan:
        return RoundPlan(assignments=tuple(self._assignments), wake_s=self._wake_s, num_held=num_held)
