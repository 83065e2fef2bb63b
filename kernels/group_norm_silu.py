"""Group normalisation (arXiv:1803.08494) and SiLU of a picture's pixels, as one operator.

Owns the arithmetic of `reference.group_norm_silu`. Three launches: some programs each go over tiles of pixels and keep
count, mean and sum of squared differences of every group, joined tile by tile as in Chan, Golub and LeVeque (1983), so
that a large mean costs no digits; one program joins theirs; then every tile is read once more, normed and written.
Everything in fp32 and in one fixed order.

Shapes: P pixels, C channels, G groups of K channels, N programs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 8192
"""Elements of a tile."""
MAX_PROGRAMS = 512
NUM_WARPS, JOIN_WARPS = 8, 16


def can_norm(width: int, num_groups: int) -> bool:
    """Whether the kernel does `width` channels in `num_groups` groups: powers of two."""
    return all(n & (n - 1) == 0 for n in (width, num_groups)) and width % num_groups == 0


def group_norm_silu(x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, epsilon: float) -> Tensor:
    """x: [P, C], contiguous; weight, bias: [C]; channels and groups as `can_norm` says. A new tensor like x."""
    num_pixels, width = x.shape
    assert x.is_contiguous() and num_pixels > 0, f"{tuple(x.shape)}, strides {x.stride()}"
    assert can_norm(width, num_groups), f"{width} in {num_groups}"
    block = max(1, TILE // width)
    num_tiles = triton.cdiv(num_pixels, block)
    num_programs = min(num_tiles, MAX_PROGRAMS)
    partials = x.new_empty(3, num_programs, num_groups, dtype=torch.float32)
    statistics = x.new_empty(2, num_groups, dtype=torch.float32)
    shapes = {"WIDTH": width, "GROUPS": num_groups, "BLOCK": block, "num_warps": NUM_WARPS}
    _partial_statistics[(num_programs,)](x, partials, num_pixels, num_programs, **shapes)
    _join_statistics[(1,)](
        partials,
        statistics,
        num_programs,
        epsilon,
        GROUPS=num_groups,
        PROGRAMS=triton.next_power_of_2(MAX_PROGRAMS),
        num_warps=JOIN_WARPS,
    )
    out = torch.empty_like(x)
    _norm_silu[(num_tiles,)](x, weight, bias, statistics, out, num_pixels, **shapes)
    return out


@triton.jit(do_not_specialize=["num_pixels", "num_programs"])
def _partial_statistics(
    x, partials, num_pixels, num_programs, WIDTH: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr
):
    program = tl.program_id(0)
    column_C = tl.arange(0, WIDTH)
    count = 0.0
    mean_G = tl.zeros([GROUPS], dtype=tl.float32)
    squares_G = tl.zeros([GROUPS], dtype=tl.float32)
    for tile in range(program, tl.cdiv(num_pixels, BLOCK), num_programs):
        pixel_P = tile * BLOCK + tl.arange(0, BLOCK)
        inside_P = pixel_P < num_pixels
        offset_PC = pixel_P[:, None].to(tl.int64) * WIDTH + column_C[None, :]
        x_PC = tl.load(x + offset_PC, mask=inside_P[:, None], other=0.0).to(tl.float32)
        x_PGK = tl.reshape(x_PC, (BLOCK, GROUPS, WIDTH // GROUPS))
        more = (tl.minimum(num_pixels - tile * BLOCK, BLOCK) * (WIDTH // GROUPS)).to(tl.float32)
        tile_mean_G = tl.sum(tl.sum(x_PGK, 2), 0) / more
        centred_PGK = tl.where(inside_P[:, None, None], x_PGK - tile_mean_G[None, :, None], 0.0)
        all_of_them = count + more
        difference_G = tile_mean_G - mean_G
        mean_G += difference_G * (more / all_of_them)
        squares_G += tl.sum(tl.sum(centred_PGK * centred_PGK, 2), 0)
        squares_G += difference_G * difference_G * (count * more / all_of_them)
        count = all_of_them
    group_G = tl.arange(0, GROUPS)
    out_G = partials + program * GROUPS + group_G
    plane = num_programs * GROUPS
    tl.store(out_G, tl.zeros([GROUPS], dtype=tl.float32) + count)
    tl.store(out_G + plane, mean_G)
    tl.store(out_G + 2 * plane, squares_G)


@triton.jit(do_not_specialize=["num_programs"])
def _join_statistics(partials, statistics, num_programs, epsilon, GROUPS: tl.constexpr, PROGRAMS: tl.constexpr):
    program_N = tl.arange(0, PROGRAMS)
    group_G = tl.arange(0, GROUPS)
    inside_N1 = (program_N < num_programs)[:, None]
    at_NG = partials + program_N[:, None] * GROUPS + group_G[None, :]
    plane = num_programs * GROUPS
    count_NG = tl.load(at_NG, mask=inside_N1, other=0.0)
    mean_NG = tl.load(at_NG + plane, mask=inside_N1, other=0.0)
    squares_NG = tl.load(at_NG + 2 * plane, mask=inside_N1, other=0.0)
    count_G = tl.sum(count_NG, 0)
    mean_G = tl.sum(mean_NG * (count_NG / count_G[None, :]), 0)
    difference_NG = mean_NG - mean_G[None, :]
    squares_G = tl.sum(squares_NG + count_NG * difference_NG * difference_NG, 0)
    tl.store(statistics + group_G, mean_G)
    tl.store(statistics + GROUPS + group_G, tl.rsqrt(squares_G / count_G + epsilon))


@triton.jit(do_not_specialize=["num_pixels"])
def _norm_silu(
    x, weight, bias, statistics, out, num_pixels, WIDTH: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr
):
    column_C = tl.arange(0, WIDTH)
    group_C = column_C // (WIDTH // GROUPS)
    pixel_P = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside_P1 = (pixel_P < num_pixels)[:, None]
    offset_PC = pixel_P[:, None].to(tl.int64) * WIDTH + column_C[None, :]
    mean_C = tl.load(statistics + group_C)
    factor_C = tl.load(statistics + GROUPS + group_C) * tl.load(weight + column_C).to(tl.float32)
    bias_C = tl.load(bias + column_C).to(tl.float32)
    x_PC = tl.load(x + offset_PC, mask=inside_P1, other=0.0).to(tl.float32)
    normed_PC = tl.where(inside_P1, (x_PC - mean_C[None, :]) * factor_C[None, :] + bias_C[None, :], 0.0)
    result_PC = normed_PC / (1 + tl.exp(-normed_PC))
    tl.store(out + offset_PC, result_PC.to(out.dtype.element_ty), mask=inside_P1)
