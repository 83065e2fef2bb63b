"""What `--roles` may say."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.engine.planning.policies.test_roles import roles
from tetrion.engine.roles import Stages, parse_roles, roles_text, unserved
from tetrion.engine.stages import STAGES


def test_devices_are_named_one_by_one_or_in_ranges() -> None:
    expected: tuple[Stages, ...] = (("encode", "decode"), ("denoise",), ("denoise",), ("denoise", "decode"))
    assert parse_roles("0:encode+decode,1-2:denoise,3:decode + denoise", 4) == expected
    assert roles_text(expected) == "0:encode+decode,1-2:denoise,3:denoise+decode"
    assert parse_roles("all", 2) == (STAGES, STAGES) and roles_text((STAGES, STAGES)) == "all"


@given(given_roles=st.integers(1, 12).flatmap(roles))
def test_what_is_said_of_roles_is_read_as_the_same(given_roles: tuple[Stages, ...]) -> None:
    assert parse_roles(roles_text(given_roles), len(given_roles)) == given_roles


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "expected auto, all or DEVICES:STAGES,… such as 0:encode+decode,1-3:denoise"),
        ("0:encode+nothing", "with the stages encode, denoise, decode, got '0:encode+nothing'"),
        ("x:encode", "expected a device's number or a range such as 1-3, got 'x'"),
        ("0-9:encode", "devices are from 0 to 1 (in the order of devices), got '0-9'"),
        ("1-0:encode", "devices are from 0 to 1"),
        ("0:encode,0:denoise", "device 0 is given twice"),
        ("0:encode+denoise+decode", "device 1 has none"),
        ("0:encode,1:denoise", "no device serves decode"),
    ],
)
def test_bad_roles_are_refused_with_what_is_allowed(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=f"^roles: .*{re.escape(says)}"):
        parse_roles(text, 2)


def test_a_stage_whose_devices_are_gone_is_not_served() -> None:
    stages = dict(enumerate(parse_roles("0:encode+decode,1-2:denoise", 3)))
    assert unserved(stages, {0, 2}) == () and unserved(stages, {1, 2}) == ("encode", "decode")
