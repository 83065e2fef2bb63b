"""Which degrees a policy may use for a request, and how long its chunks are. Pure arithmetic over the cost table."""

from collections.abc import Sequence

from tetrion.engine.planning.profile import MEMO_SIZES, Profile, SizeCost
from tetrion.engine.planning.snapshot import RequestView, Snapshot

MIN_SPEED_UP = 1.02


class DegreeTable:
    """The useful degrees of one size: legal, in the profile, at most the number of devices, and each at least 2 %
    faster than every narrower one (CPU workers that share cores often gain nothing).

    `degrees` ascending; `step_s[degree]` seconds (0.0 where not useful); `speed[degree]`: steps per time, relative to
    the narrowest (0.0 where not useful); `largest[n]`: the widest useful degree that fits on n devices (0: none);
    `work_s`: GPU-seconds of one step at the narrowest, the measure of size among requests. `step_j[degree]` joules
    (0.0 where not useful), empty if those of any useful degree are not known.
    """

    __slots__ = (
        "cost",
        "degrees",
        "fastest_step_s",
        "largest",
        "narrowest",
        "speed",
        "step_j",
        "step_s",
        "widest",
        "work_s",
    )

    def __init__(self, cost: SizeCost, legal_degrees: Sequence[int], num_devices: int) -> None:
        self.cost = cost
        self.degrees = useful_degrees(cost, legal_degrees, num_devices)
        self.step_s = [0.0] * (num_devices + 1)
        self.largest = [0] * (num_devices + 1)
        for degree in self.degrees:
            self.step_s[degree] = cost.step_s(degree)
            self.largest[degree:] = [degree] * (num_devices + 1 - degree)
        self.narrowest, self.widest = self.degrees[0], self.degrees[-1]
        self.speed = [self.step_s[self.narrowest] / step_s if step_s else 0.0 for step_s in self.step_s]
        self.fastest_step_s = self.step_s[self.widest]
        self.work_s = self.step_s[self.narrowest] * self.narrowest
        known_j = cost.step_by_degree_j
        has_joules = all(degree in known_j for degree in self.degrees)
        useful = [degree if degree in self.degrees else 0 for degree in range(num_devices + 1)]
        self.step_j = [known_j[degree] if degree else 0.0 for degree in useful] if has_joules else []


def legal_on(legal_degrees: Sequence[int], num_devices: int) -> tuple[int, ...]:
    """Legal degrees that `num_devices` devices can form, ascending. One device is always enough for degree 1."""
    return tuple(sorted({degree for degree in legal_degrees if 1 <= degree <= num_devices})) or (1,)


def usable_degrees(cost: SizeCost, legal_degrees: Sequence[int], num_devices: int) -> tuple[int, ...]:
    """Legal degrees with a known cost; if there is none, the narrowest legal one, so that nobody is unservable."""
    legal = legal_on(legal_degrees, num_devices)
    return tuple(degree for degree in legal if degree in cost.step_by_degree_s) or legal[:1]


def useful_degrees(cost: SizeCost, legal_degrees: Sequence[int], num_devices: int) -> tuple[int, ...]:
    """Usable degrees of which each is at least 2 % faster than the one before."""
    useful: list[int] = []
    best_s = float("inf")
    for degree in usable_degrees(cost, legal_degrees, num_devices):
        step_s = cost.step_s(degree)
        if step_s * MIN_SPEED_UP <= best_s:
            useful.append(degree)
            best_s = step_s
    return tuple(useful)


def chunk_steps(request: RequestView, step_s: float, chunk_s: float) -> int:
    """Steps of the next chunk: as many whole steps as `chunk_s` holds, at least one, at most those remaining."""
    return max(1, min(int(chunk_s / step_s + 1e-9), request.num_steps - request.step_index))


class DegreeTables(dict[tuple[int, int], DegreeTable]):
    """The table of each size (width, height), made when it is first asked for."""

    def __init__(self, profile: Profile, legal_degrees: Sequence[int], num_devices: int) -> None:
        super().__init__()
        self._profile = profile
        self._legal_degrees = tuple(legal_degrees)
        self._num_devices = num_devices

    def __missing__(self, size: tuple[int, int]) -> DegreeTable:
        if len(self) >= MEMO_SIZES:
            self.clear()
        cost, key = self._profile.cost(*size), (DegreeTable, self._legal_degrees, self._num_devices)
        table = cost.derived.get(key)
        if table is None:
            table = cost.derived[key] = DegreeTable(cost, self._legal_degrees, self._num_devices)
        self[size] = table
        return table


def degree_tables(snapshot: Snapshot) -> DegreeTables:
    """The tables of a snapshot's profile and devices; they live as long as the profile does."""
    profile, legal_degrees, num_devices = snapshot.profile, snapshot.legal_degrees, len(snapshot.devices)
    key = (DegreeTables, legal_degrees, num_devices)
    tables = profile.derived.get(key)
    if tables is None:
        tables = profile.derived[key] = DegreeTables(profile, legal_degrees, num_devices)
    return tables
