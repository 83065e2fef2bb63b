"""Every member pushes its heads; every token owner must hold all heads of its tokens, text first."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from tests.kernels.group_slabs import GroupSlabs, make_plan
from tests.kernels.tolerance import poisoned
from tetrion.kernels.output_push import output_push

GROUPS = [
    ((0,), 13, 40, 4, 64),
    ((1, 0), 8, 64, 4, 128),
    ((2, 0, 1), 7, 29, 7, 32),
    ((0, 3, 1, 2), 2, 30, 6, 32),
    ((1, 3), 0, 21, 5, 32),
]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("members", "num_text", "num_image", "num_heads", "head_dim"), GROUPS)
def test_owners_hold_all_heads(device, dtype, members, num_text, num_image, num_heads, head_dim, padded) -> None:
    plan = make_plan(members, num_text, num_image, num_heads)
    slabs = GroupSlabs(plan, head_dim, dtype)
    output = torch.randn(plan.num_tokens, num_heads, head_dim).to(dtype)
    for shard in plan.shards:
        wide = poisoned(plan.num_tokens, len(shard.heads) + 1, head_dim, dtype=dtype)
        wide[:, :-1] = output[:, shard.heads.start : shard.heads.stop]
        output_push(
            wide[:, :-1],
            slabs.table(shard.rank),
            slabs.bases,
            slabs.output_offset,
            degree=plan.degree,
            num_heads=num_heads,
            num_text=num_text,
            image_row=-(-num_text // plan.degree) if padded else None,
        )
    for shard in plan.shards:
        image_row = -(-num_text // plan.degree) if padded else len(shard.text)
        pushed = slabs.take_output(shard.rank, image_row + len(shard.image))
        text_rows, image_rows = plan.canonical_rows(shard)
        assert torch.equal(pushed[: len(shard.text)], output[text_rows.start : text_rows.stop])
        assert torch.equal(pushed[image_row:], output[image_rows.start : image_rows.stop])
        assert pushed[len(shard.text) : image_row].isnan().all()
    slabs.assert_untouched()
