"""Which degrees a policy may use for a request, and how long its chunks are. Pure arithmetic over the cost table."""

import functools

from tetrion.engine.model_spec import legal_degrees
from tetrion.engine.planning.cost.profile import MEMO_KEYS, Profile, SizeCost
from tetrion.engine.planning.cost.tables import CostTables
from tetrion.engine.shape import parse_cost_key
from tetrion.engine.stages import AFTER_STEPS, BEFORE_STEPS, Stage

MIN_SPEED_UP = 1.02

ClassName = tuple[str, str]
"""Model, cost key: requests of one class cost the same."""


class DegreeTable:
    """The useful degrees of one class: legal, in the profile, at most the number of devices, and each at least 2 %
    faster than every narrower one (CPU workers that share cores often gain nothing).

    `degrees` ascending; `step_s[degree]` seconds (0.0 where not useful); `speed[degree]`: steps per time, relative to
    the narrowest (0.0 where not useful); `efficiency[degree]`: GPU-seconds of a step at the narrowest, as a share of
    those of a step there; `largest[n]`: the widest useful degree that fits on n devices (0: none);
    `work_s`: GPU-seconds of one step at the narrowest, the measure of size among requests. `step_j[degree]` joules
    (0.0 where not useful), empty if those of any useful degree are not known; `legal`: all degrees that
    the devices can form. `before_s[stage]`: seconds from the beginning of a stage to the first step;
    `after_s`: from the last step to the end.
    """

    __slots__ = (
        "after_s",
        "before_s",
        "cost",
        "degrees",
        "efficiency",
        "fastest_step_s",
        "largest",
        "legal",
        "narrowest",
        "speed",
        "step_j",
        "step_s",
        "widest",
        "work_s",
    )

    def __init__(self, cost: SizeCost, legal: tuple[int, ...], num_devices: int) -> None:
        """`legal`: ascending, at most `num_devices`."""
        self.cost = cost
        before = enumerate(BEFORE_STEPS)
        self.before_s: dict[Stage, float] = {
            stage: sum(cost.aux_s[following] for following in BEFORE_STEPS[number:]) for number, stage in before
        }
        self.after_s = sum(cost.aux_s[stage] for stage in AFTER_STEPS)
        self.degrees = useful_degrees(cost, legal)
        self.legal = legal
        self.step_s = [0.0] * (num_devices + 1)
        self.largest = [0] * (num_devices + 1)
        for degree in self.degrees:
            self.step_s[degree] = cost.step_s(degree)
            self.largest[degree:] = [degree] * (num_devices + 1 - degree)
        self.narrowest, self.widest = self.degrees[0], self.degrees[-1]
        self.speed = [self.step_s[self.narrowest] / step_s if step_s else 0.0 for step_s in self.step_s]
        self.efficiency = [self.narrowest * speed / max(degree, 1) for degree, speed in enumerate(self.speed)]
        self.fastest_step_s = self.step_s[self.widest]
        self.work_s = self.step_s[self.narrowest] * self.narrowest
        known_j = cost.step_by_degree_j
        has_joules = all(degree in known_j for degree in self.degrees)
        useful = [degree if degree in self.degrees else 0 for degree in range(num_devices + 1)]
        self.step_j = [known_j[degree] if degree else 0.0 for degree in useful] if has_joules else []


def usable_degrees(cost: SizeCost, legal: tuple[int, ...]) -> tuple[int, ...]:
    """Legal degrees with a known cost; if there is none, the narrowest legal one, so that nobody is unservable."""
    return tuple(degree for degree in legal if degree in cost.step_by_degree_s) or legal[:1]


def useful_degrees(cost: SizeCost, legal: tuple[int, ...]) -> tuple[int, ...]:
    """Usable degrees of which each is at least 2 % faster than the one before."""
    useful: list[int] = []
    best_s = float("inf")
    for degree in usable_degrees(cost, legal):
        step_s = cost.step_s(degree)
        if step_s * MIN_SPEED_UP <= best_s:
            useful.append(degree)
            best_s = step_s
    return tuple(useful)


def legal_for(profile: Profile, key: str, num_devices: int) -> tuple[int, ...]:
    """Degrees that `num_devices` can form for this key, ascending. One device is always enough for degree 1."""
    return legal_degrees(profile.heads, parse_cost_key(key).num_branches, num_devices)


class DegreeTables(dict[ClassName, DegreeTable]):
    """The table of each (model, cost key), made when it is first asked for."""

    def __init__(self, costs: CostTables, num_devices: int, before: "DegreeTables | None" = None) -> None:
        """`before`: the tables until now. A correction concerns few classes, many times a minute: those of the others
        are used again."""
        super().__init__()
        self.costs = costs
        self.num_devices = num_devices
        self._before: dict[ClassName, DegreeTable] = {}
        if before is not None and before.num_devices == num_devices:
            self._before = dict(before) if len(before._before) >= MEMO_KEYS else {**before._before, **before}

    def __eq__(self, other: object) -> bool:
        """Whatever has been asked for so far."""
        return isinstance(other, DegreeTables) and (self.costs, self.num_devices) == (other.costs, other.num_devices)

    __hash__ = None

    @functools.cached_property
    def group_sizes(self) -> tuple[int, ...]:
        """How many devices a static group may have, ascending: degrees that some class of the cost tables has, and
        those at which some model's heads are shared out evenly."""
        sizes: set[int] = set()
        for model, profile in self.costs.profiles.items():
            sizes.update([n for n in range(1, self.num_devices + 1) if profile.heads % n == 0])
            for table in [self[model, key] for key in profile.classes]:
                sizes.update(usable_degrees(table.cost, table.legal))
        return tuple(sorted(sizes))

    def __missing__(self, name: ClassName) -> DegreeTable:
        if len(self) >= MEMO_KEYS:
            self.clear()
        model, key = name
        profile = self.costs.profiles[model]
        cost, table = profile.cost(key), self._before.get(name)
        if table is None or table.cost is not cost:
            table = DegreeTable(cost, legal_for(profile, key, self.num_devices), self.num_devices)
        self[name] = table
        return table
