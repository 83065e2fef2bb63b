import re
import subprocess
import sys

import pytest

from tetrion.engine.config import PlannerConfig
from tetrion.engine.planning.horizon_options import HorizonOptions
from tetrion.engine.planning.policies.registry import get_planner, with_options


def test_known_names() -> None:
    for name in ("horizon", "fixed-1", "fixed-2", "fixed-16", PlannerConfig().policy):
        assert callable(get_planner(name))


@pytest.mark.parametrize("name", ["", "Horizon", "fixed", "fixed-", "fixed-0", "fixed-x", "fixed-1.5", "fixed--1"])
def test_unknown_names_are_answered_with_the_known_ones(name: str) -> None:
    with pytest.raises(ValueError, match=rf"policy: expected one of horizon, fixed-K.*got '{re.escape(name)}'"):
        get_planner(name)


def test_options_by_name_become_the_policys_own_struct() -> None:
    read = with_options(PlannerConfig(options={"drop": "fraction"}))
    assert read.options == HorizonOptions(drop="fraction") and with_options(read) is read


@pytest.mark.parametrize(
    ("policy", "options", "what"),
    [
        ("horizon", {"drop": "largest"}, r"planner\.options\.drop: Invalid enum value 'largest'"),
        (
            "horizon",
            {"pace": 1},
            r"planner: there is no option 'pace'; policy horizon has drop, .*, every planner lead_s, chunk_s,",
        ),
        ("rssp", {"drop": "work"}, r"planner: there is no option 'drop'; policy rssp has none, every planner lead_s,"),
        ("fixed-2", HorizonOptions(), r"planner\.options: Expected `object`"),
    ],
)
def test_options_that_a_policy_does_not_have_are_refused(policy: str, options: object, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        with_options(PlannerConfig(policy=policy, options=options))


def test_planning_imports_no_torch_and_no_io() -> None:
    code = (
        "import sys; import tetrion.engine.planning.policies.registry, tetrion.engine.planning.cost.correction\n"
        "print([name for name in ('torch', 'numpy', 'asyncio') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
