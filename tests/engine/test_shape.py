import pytest
from hypothesis import given
from hypothesis import strategies as st

from tetrion.engine.shape import CostKey, StepShape, cost_key_of_size, parse_cost_key

sides = st.integers(1, 999_999)
keys = st.builds(
    CostKey,
    width=sides,
    height=sides,
    frames=st.integers(1, 9999),
    reference=st.integers(0, 99_999_999),
    pictures=st.integers(0, 999),
    num_branches=st.integers(1, 999),
)


@given(keys)
def test_a_key_is_read_back_from_its_text(key: CostKey) -> None:
    assert parse_cost_key(key.text) == key
    assert key.transposed.transposed == key and key.transposed.pixels == key.pixels


@given(st.from_regex(r"[1-9]x[1-9](x[0-9]{1,2})?(\+r[0-9]{1,2})?(\+p[0-9]{1,2})?(\*[0-9]{1,2})?", fullmatch=True))
def test_no_two_texts_are_one_key(text: str) -> None:
    try:
        assert parse_cost_key(text).text == text
    except ValueError:
        assert any(part in text for part in ("x0", "x1", "r0", "p0", "*0", "*1"))


def test_keys_of_today_are_the_sizes_that_profiles_name() -> None:
    shape = StepShape(width=1024, height=768, image=3072, text=(512,))
    assert shape.cost_key == "1024x768" == cost_key_of_size(shape.size)
    shape = StepShape(width=832, height=480, frames=81, image=32_760, reference=64, text=(512, 512))
    assert shape.cost_key == "832x480x81+r64*2" and shape.num_branches == 2


@pytest.mark.parametrize(
    "text",
    ["", "1024", "0x16", "16x", "16x16x1", "16x16+r0", "16x16*1", "16x16*2+r3", "16x16+p0", "16x16+p1+r1", " 16x16"],
)
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected sizes like"):
        parse_cost_key(text)
