"""Policies by name. A new one is one file with a plain function of a snapshot, and one line here."""

import re
from collections.abc import Callable

from tetrion.engine.planning.policies import best_fit, horizon, rssp, tetriserve
from tetrion.engine.planning.policies.fixed import fixed_planner
from tetrion.engine.planning.policies.forced import serve_forced
from tetrion.engine.planning.snapshot import Planner

POLICIES: dict[str, Planner] = {
    "horizon": horizon.plan,
    "rssp": rssp.plan,
    "tetriserve": tetriserve.rounds_planner(tetriserve.PUBLISHED_STEPS),
    "tetriserve-continuous": tetriserve.plan_continuously,
    "edf-best-fit": best_fit.plan,
}
FAMILIES: dict[str, Callable[[int], Planner]] = {
    "fixed": fixed_planner,
    "tetriserve-g": tetriserve.rounds_planner,
}
"""Names that end in a number: `fixed-2`, `tetriserve-g2`."""
WORK_CONSERVING = frozenset({"tetriserve-continuous", "edf-best-fit"})
"""Policies that leave no device idle beside a ready request that could use it."""
POLICY_NAMES = ("horizon", "fixed-K (fixed-1, fixed-2, …)", *sorted(POLICIES.keys() - {"horizon"}), "tetriserve-gN")


def get_planner(name: str) -> Planner:
    """The policy of that name, serving forced requests too.

    Raises ValueError listing the known names.
    """
    policy = POLICIES.get(name) or _of_family(name)
    if policy is None:
        raise ValueError(f"policy: expected one of {', '.join(POLICY_NAMES)}, got {name!r}")
    return serve_forced(policy)


def _of_family(name: str) -> Planner | None:
    match = re.fullmatch(r"(?:(fixed)-|(tetriserve-g))([1-9][0-9]{0,3})", name)
    return FAMILIES[match[1] or match[2]](int(match[3])) if match else None
