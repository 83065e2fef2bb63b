"""Tile sizes of the attention kernel, as data.

Owns the table; knows no kernel. A tile may depend on token count, head dim and element size, and on nothing else: the
order in which a row's sums are taken follows from it, and a picture's bits must not depend on the degree, that is on
the number of heads in a call. `benchmarks/gpu/kernels.py` times CANDIDATES; what wins on a GPU goes into TILES.
"""

from typing import NamedTuple


class Tile(NamedTuple):
    """block_m: queries of a program; block_n: keys of one turn of its loop."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


class Row(NamedTuple):
    """`tile` serves `head_dim` and `itemsize` (bytes of an element) up to `max_tokens`."""

    head_dim: int
    itemsize: int
    max_tokens: int
    tile: Tile


NO_LIMIT = 1 << 31
TILES = (
    Row(128, 2, 2048, Tile(64, 64, 4, 3)),
    Row(128, 2, NO_LIMIT, Tile(128, 128, 8, 3)),
    Row(64, 2, 2048, Tile(64, 128, 4, 3)),
    Row(64, 2, NO_LIMIT, Tile(128, 128, 8, 3)),
    Row(32, 2, NO_LIMIT, Tile(128, 128, 4, 3)),
    Row(128, 4, NO_LIMIT, Tile(64, 32, 4, 2)),
    Row(64, 4, NO_LIMIT, Tile(64, 64, 4, 2)),
    Row(32, 4, NO_LIMIT, Tile(64, 64, 4, 2)),
)
CANDIDATES = (
    Tile(128, 128, 8, 2),
    Tile(128, 128, 8, 3),
    Tile(128, 64, 8, 3),
    Tile(128, 64, 8, 4),
    Tile(128, 64, 8, 2),
    Tile(128, 64, 4, 3),
    Tile(64, 128, 4, 2),
    Tile(64, 64, 4, 2),
    Tile(64, 64, 4, 3),
)


def tile_for(num_tokens: int, head_dim: int, itemsize: int) -> Tile:
    """Raises ValueError for a head dim or element size that the table does not have."""
    rows = [row for row in TILES if (row.head_dim, row.itemsize) == (head_dim, itemsize)]
    if not rows:
        raise ValueError(f"no attention tile for head dim {head_dim} with elements of {itemsize} bytes")
    return min((row for row in rows if num_tokens <= row.max_tokens), key=lambda row: row.max_tokens).tile
