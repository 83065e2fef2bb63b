"""Policies by name. A new one is one file with a plain function of a snapshot, and one line here."""

import re

from tetrion.engine.planning import horizon
from tetrion.engine.planning.fixed import fixed_planner
from tetrion.engine.planning.forced import serve_forced
from tetrion.engine.planning.snapshot import Planner

POLICIES: dict[str, Planner] = {
    "horizon": horizon.plan,
}
POLICY_NAMES = (*POLICIES, "fixed-K (fixed-1, fixed-2, …)")


def get_planner(name: str) -> Planner:
    """The policy of that name, serving forced requests too.

    Raises ValueError listing the known names.
    """
    fixed = re.fullmatch(r"fixed-([1-9][0-9]{0,3})", name)
    policy = fixed_planner(int(fixed[1])) if fixed else POLICIES.get(name)
    if policy is None:
        raise ValueError(f"policy: expected one of {', '.join(POLICY_NAMES)}, got {name!r}")
    return serve_forced(policy)
