import itertools
import json
import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.engine.planning.simulation import flux_profile, make_profile
from tetrion.engine.planning.cost.profile import ClassCost, Profile, parse_profile, read_profile
from tetrion.engine.shape import cost_key_of_size

BY_HAND = """{"heads": 24, "classes": {"1024x1024": {"step_ms": {"1": 164.7, "2": 105.7, "4": 59.8},
    "encode_ms": 25, "decode_ms": 120, "step_j": {"1": 90.5}, "note": "mine"}}, "gpu": "H100", "who": "me"}"""


def test_a_table_written_by_hand_works() -> None:
    profile = parse_profile(BY_HAND)
    assert profile.degrees("1024x1024") == (1, 2, 4)
    assert profile.step_s("1024x1024", 2) == pytest.approx(0.1057)
    assert profile.cost("1024x1024").aux_s["encode"] == pytest.approx(0.025)
    assert profile.cost("1024x1024").aux_s["decode"] == pytest.approx(0.120)
    assert profile.gpu == "H100"
    assert profile.classes["1024x1024"].step_j == {1: 90.5}
    assert parse_profile(msgspec.json.encode(profile)) == profile


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 0}, r"heads: must be at least 1, got 0"),
        ({"classes": {}}, r"classes: must name at least one size"),
        ({"classes": {"big": {}}}, r"\$\.classes\[\.\.\.\]"),
        ({"size": "1024"}, r'expected sizes like "1024x1024" .*, got \'1024\''),
        ({"step_ms": {}}, r"classes\.64x64\.step_ms: must have at least one degree"),
        ({"step_ms": {"1": -3.0}}, r"classes\.64x64\.step_ms\.1: must be above 0 and finite, got -3"),
        ({"step_ms": {"25": 3.0}}, r"degree 25 must be from 1 to 24"),
        ({"step_ms": {"1": "fast"}}, r"Expected `float`"),
        ({"step_j": {"1": 0}}, r"classes\.64x64\.step_j\.1: must be above 0"),
        ({"encode_ms": -1}, r"classes\.64x64\.encode_ms: must be at least 0"),
        ({"decode_ms": -1}, r"classes\.64x64\.decode_ms: must be at least 0"),
    ],
)
def test_malformed_tables_name_the_field_and_the_bound(change: dict[str, object], message: str) -> None:
    size = change.pop("size", "64x64")
    cost = {"step_ms": {"1": 2.0}, "encode_ms": 1, "decode_ms": 1}
    table: dict[str, object] = {"heads": 24, "classes": {size: cost}}
    for key, value in change.items():
        (table if key in table else cost)[key] = value
    with pytest.raises(ValueError, match=message):
        parse_profile(json.dumps(table))


def test_unreadable_text(tmp_path) -> None:
    with pytest.raises(ValueError, match="not JSON"):
        parse_profile("{")
    path = tmp_path / "table.json"
    path.write_text('{"heads": 3}')
    with pytest.raises(ValueError, match=r"table\.json: profile: .*classes"):
        read_profile(path)
    with pytest.raises(ValueError, match="must be above 0 and finite"):
        make_profile({"64x64": {"step_ms": {1: math.nan}, "encode_ms": 1, "decode_ms": 1}})


@given(st.lists(st.integers(1, 256), min_size=2, max_size=12))
def test_estimates_grow_with_the_picture_and_are_positive(sides: list[int]) -> None:
    profile = flux_profile()
    sizes = sorted(side * 16 for side in sides)
    for degree in (1, 4, 8):
        times = [profile.step_s(f"{side}x{side}", degree) for side in sizes]
        assert all(time_s > 0 for time_s in times)
        assert all(small <= large * (1 + 1e-9) for small, large in itertools.pairwise(times))
    assert all(profile.cost(f"{side}x{side}").aux_s["decode"] > 0 for side in sizes)


def test_estimates_lie_between_the_neighbours() -> None:
    profile = flux_profile()
    assert 0.1647 < profile.step_s("1408x1408", 1) < 0.8245
    assert profile.step_s("1024x512", 2) == pytest.approx(profile.step_s("512x1024", 2))
    assert profile.step_s("4096x4096", 1) <= 0.8245 * 16
    assert profile.step_s("512x512", 1) == pytest.approx(0.0535)


def test_noise_cannot_make_a_larger_picture_cheaper() -> None:
    cost = {"encode_ms": 1, "decode_ms": 1}
    profile = make_profile({"64x64": {"step_ms": {1: 9.0}, **cost}, "128x128": {"step_ms": {1: 8.0}, **cost}})
    assert profile.step_s("96x96", 1) == pytest.approx(0.009)
    assert profile.step_s("256x256", 1) == pytest.approx(0.009)
    assert profile.step_s("128x128", 1) == pytest.approx(0.008)


def test_one_class_scales_with_its_tokens_and_free_stages_stay_free() -> None:
    profile = make_profile({"64x64": {"step_ms": {1: 10.0, 2: 6.0}, "encode_ms": 0, "decode_ms": 0}})
    assert profile.step_s("128x64", 2) == pytest.approx(0.012)
    assert profile.cost("64x64").aux_s["encode"] == 0
    assert 0 <= profile.cost("128x128").aux_s["decode"] < 1e-6


def test_degrees_that_the_table_lacks_are_not_offered_but_can_be_estimated() -> None:
    profile = parse_profile(BY_HAND)
    assert 3 not in profile.degrees("1024x1024")
    assert 0.0598 < profile.step_s("1024x1024", 3) < 0.1057
    assert profile.step_s("1024x1024", 8) == pytest.approx(0.0598)
    with pytest.raises(ValueError, match="degree: must be at least 1, got 0"):
        profile.step_s("1024x1024", 0)
    with pytest.raises(ValueError, match=r"expected sizes like .*, got '0x16'"):
        profile.cost("0x16")


def test_an_interpolated_size_offers_what_both_neighbours_offer() -> None:
    cost = {"encode_ms": 1, "decode_ms": 1}
    small, large = {1: 9.0, 2: 6.0, 3: 5.0}, {1: 90.0, 2: 50.0, 4: 30.0}
    profile = make_profile({"64x64": {"step_ms": small, **cost}, "256x256": {"step_ms": large, **cost}})
    assert profile.degrees("128x128") == (1, 2)
    assert profile.degrees("512x512") == (1, 2, 4)


def test_a_profile_is_a_value() -> None:
    profile = flux_profile()
    before = msgspec.json.encode(profile)
    profile.cost("640x480")
    assert msgspec.json.encode(profile) == before
    assert profile == flux_profile()
    with pytest.raises(AttributeError):
        profile.heads = 3  # type: ignore[misc]
    assert isinstance(profile, Profile)


VALUES, DEGREES = st.floats(1.0, 1000.0), st.sampled_from([1, 2, 4])
COSTS = st.builds(
    ClassCost,
    step_ms=st.dictionaries(DEGREES, VALUES, min_size=1),
    encode_ms=VALUES,
    decode_ms=VALUES,
    step_j=st.dictionaries(DEGREES, VALUES),
)
TABLES = st.dictionaries(st.sampled_from(["256x256", "512x512", "512x256", "1024x1024"]), COSTS, min_size=1)


@given(before=TABLES, changed=TABLES, keeps_joules=st.booleans())
def test_a_changed_table_says_what_a_new_one_would(
    before: dict[str, ClassCost], changed: dict[str, ClassCost], keeps_joules: bool
) -> None:
    if keeps_joules:
        known = {name: before[name].step_j if name in before else {} for name in changed}
        changed = {name: msgspec.structs.replace(cost, step_j=known[name]) for name, cost in changed.items()}
    sizes = [(256, 256), (512, 512), (512, 256), (256, 512), (1024, 1024), (384, 384)]
    profile = Profile(heads=24, classes=before)
    keys = [cost_key_of_size(size) for size in sizes]
    asked = [profile.cost(key) for key in keys]
    corrected, new = profile.with_classes(changed), Profile(heads=24, classes={**before, **changed})
    assert [corrected.cost(key) for key in keys] == [new.cost(key) for key in keys]
    assert [profile.cost(key) for key in keys] == asked
    if keeps_joules and "512x512" in before and "512x512" not in changed:
        assert corrected.cost("512x512") is profile.cost("512x512")


two_branches = st.dictionaries(st.sampled_from(["256x256*2", "512x512*2"]), COSTS, min_size=1)


@pytest.mark.parametrize("degree", [1, 2, 3, 4, 6, 8, 12, 16])
def test_two_branches_go_in_turn_at_odd_degrees_and_apart_at_even_ones(degree: int) -> None:
    profile = flux_profile()
    one, two = profile.cost("640x384"), profile.cost("640x384*2")
    assert two.is_estimated and degree in two.degrees
    assert two.step_s(degree) == pytest.approx(2 * one.step_s(degree) if degree % 2 else one.step_s(degree // 2))
    assert two.aux_s == pytest.approx({"encode": 2 * one.aux_s["encode"], "decode": one.aux_s["decode"]})


def test_joules_of_two_branches_are_twice_those_of_one() -> None:
    cost = {"step_ms": {1: 90.0, 2: 50.0}, "step_j": {1: 9.0, 2: 11.0}, "encode_ms": 1, "decode_ms": 1}
    profile = make_profile({"64x64": cost})
    assert profile.cost("64x64*2").step_by_degree_j == {1: 18.0, 2: 18.0, 4: 22.0}


def test_a_table_of_two_branches_prices_one() -> None:
    cost = {"step_ms": {1: 90.0, 2: 50.0, 4: 30.0}, "step_j": {2: 12.0}, "encode_ms": 2, "decode_ms": 1}
    one = make_profile({"64x64*2": cost}).cost("64x64")
    assert one.step_by_degree_s == pytest.approx({1: 0.050, 2: 0.030})
    assert (one.aux_s, one.step_by_degree_j) == ({"encode": 0.001, "decode": 0.001}, {1: 6.0})


@given(classes=TABLES, twos=two_branches, key=st.sampled_from(["256x256", "768x768", "256x512"]))
def test_classes_with_other_branches_say_nothing(
    classes: dict[str, ClassCost], twos: dict[str, ClassCost], key: str
) -> None:
    both, ones = Profile(heads=24, classes=classes | twos), Profile(heads=24, classes=classes)
    assert both.cost(key) == ones.cost(key)
    assert both.cost(f"{key}*2") == Profile(heads=24, classes=twos).cost(f"{key}*2")


@given(rows=st.lists(st.integers(0, 16384), min_size=2, max_size=2), key=st.sampled_from(["256x256", "1024x1024x9"]))
def test_reference_rows_cost_steps_and_no_decode(rows: list[int], key: str) -> None:
    few, many = (flux_profile().cost(f"{key}+r{n}" if n else key) for n in sorted(rows))
    assert few.aux_s["decode"] == many.aux_s["decode"]
    assert all(few.step_s(degree) <= many.step_s(degree) * (1 + 1e-9) for degree in few.degrees)


def test_degrees_of_two_branches_reach_twice_the_heads() -> None:
    cost = {"encode_ms": 1, "decode_ms": 1}
    assert make_profile({"64x64*2": {"step_ms": {48: 3.0}, **cost}}).degrees("64x64*2") == (48,)
    with pytest.raises(ValueError, match="degree 48 must be from 1 to 24"):
        make_profile({"64x64": {"step_ms": {48: 3.0}, **cost}})


def test_a_picture_that_is_encoded_costs_half_its_decode_and_no_step() -> None:
    plain, one, two = (flux_profile().cost(f"1024x1024{pictures}") for pictures in ("", "+p1", "+p2"))
    decode_s = plain.aux_s["decode"]
    assert one.aux_s == pytest.approx({"encode": plain.aux_s["encode"] + decode_s / 2, "decode": decode_s})
    assert two.aux_s["encode"] == pytest.approx(plain.aux_s["encode"] + decode_s)
    assert one.step_by_degree_s == plain.step_by_degree_s and one.is_estimated
    reference = flux_profile().cost("1024x1024+r4096")
    assert reference.aux_s == pytest.approx(one.aux_s), "as many pixels"
    in_branches = flux_profile().cost("1024x1024+p1*2")
    assert in_branches.degrees == flux_profile().cost("1024x1024*2").degrees


def test_what_was_measured_with_pictures_says_nothing_of_requests_without() -> None:
    before = flux_profile()
    measured = msgspec.structs.replace(before.classes["1024x1024"], encode_ms=5000.0)
    after = before.with_classes({"1024x1024+p1": measured})
    assert after.cost("1024x1024+p1").aux_s["encode"] == 5.0
    for key in ("1024x1024", "768x768", "1536x1536", "1024x1024+r64"):
        assert after.cost(key).aux_s == before.cost(key).aux_s


def test_a_table_of_requests_with_pictures_alone_has_them_in_its_encodes() -> None:
    """Of a model that draws nothing without."""
    costs = {f"{n}x{n}+p1": {"step_ms": {1: n / 4}, "encode_ms": n / 8, "decode_ms": n / 4} for n in (64, 256)}
    profile = make_profile(costs)
    assert profile.cost("128x128+p1").aux_s == pytest.approx({"encode": 0.016, "decode": 0.032})
    assert profile.cost("256x256+p1").aux_s["encode"] == 0.032
