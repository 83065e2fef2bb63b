"""Policies by name. A new one is one file with a plain function of a snapshot, and one line here. If it has options,
they are a struct of its own (`OPTIONS`), which it finds in `snapshot.config.options`."""

import re
from collections.abc import Callable

import msgspec

from tetrion.engine.config import PlannerConfig
from tetrion.engine.errors import shown
from tetrion.engine.planning.horizon_options import HorizonOptions
from tetrion.engine.planning.policies import best_fit, edf, horizon, rssp, tetriserve
from tetrion.engine.planning.policies.fixed import fixed_planner
from tetrion.engine.planning.policies.forced import serve_forced
from tetrion.engine.planning.snapshot import Planner

POLICIES: dict[str, Planner] = {
    "horizon": horizon.plan,
    "rssp": rssp.plan,
    "tetriserve": tetriserve.rounds_planner(tetriserve.PUBLISHED_STEPS),
    "tetriserve-continuous": tetriserve.plan_continuously,
    "edf": edf.plan,
    "edf-best-fit": best_fit.plan,
}
FAMILIES: dict[str, Callable[[int], Planner]] = {
    "fixed": fixed_planner,
    "tetriserve-g": tetriserve.rounds_planner,
}
"""Names that end in a number: `fixed-2`, `tetriserve-g2`."""
OPTIONS: dict[str, type[msgspec.Struct]] = {"horizon": HorizonOptions}
WORK_CONSERVING = frozenset({"tetriserve-continuous", "edf", "edf-best-fit"})
"""Policies that leave no device idle beside a ready request that could use it."""
POLICY_NAMES = ("horizon", "fixed-K (fixed-1, fixed-2, …)", *sorted(POLICIES.keys() - {"horizon"}), "tetriserve-gN")


class NoOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of a policy that has none."""


def get_planner(name: str) -> Planner:
    """The policy of that name, serving forced requests too.

    Raises ValueError listing the known names.
    """
    policy = POLICIES.get(name) or _of_family(name)
    if policy is None:
        raise ValueError(f"policy: expected one of {', '.join(POLICY_NAMES)}, got {name!r}")
    return serve_forced(policy)


def with_options(config: PlannerConfig) -> PlannerConfig:
    """`config` with the options of its policy read. Raises ValueError naming the one that is wrong, and of one that
    there is not, those that there are."""
    kind = OPTIONS.get(config.policy, NoOptions)
    if isinstance(config.options, kind):
        return config
    try:
        return msgspec.structs.replace(config, options=msgspec.convert(config.options, kind))
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `$")
        if unknown := re.search(r"unknown field `(.*)`", message, re.DOTALL):
            own = ", ".join(kind.__struct_fields__)
            others = ", ".join(name for name in PlannerConfig.__struct_fields__ if name not in ("policy", "options"))
            raise ValueError(
                f"planner: there is no option {shown(unknown[1])}; policy {config.policy} has {own or 'none'},"
                f" every planner {others}"
            ) from None
        raise ValueError(f"planner.options{path.rstrip('`')}: {message}") from None


def _of_family(name: str) -> Planner | None:
    match = re.fullmatch(r"(?:(fixed)-|(tetriserve-g))([1-9][0-9]{0,3})", name)
    return FAMILIES[match[1] or match[2]](int(match[3])) if match else None
