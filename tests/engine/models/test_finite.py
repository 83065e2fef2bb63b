"""Numbers told from what is none, in every place and dtype."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tetrion.engine.models.finite import is_finite


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@given(size=st.integers(1, 5000), place=st.floats(0, 1, exclude_max=True), bad=st.sampled_from([None, np.nan, np.inf]))
def test_one_value_anywhere_is_found(dtype: torch.dtype, size: int, place: float, bad: float | None) -> None:
    values = torch.linspace(-1, 1, size, dtype=dtype) * torch.finfo(dtype).max
    if bad is not None:
        values[int(place * size)] = bad
        assert not is_finite(-values)
    assert bool(is_finite(values)) == (bad is None)
