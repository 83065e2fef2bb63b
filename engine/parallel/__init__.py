"""Sequence parallelism: slab layout, groups as values, pairwise barrier, exchange. No process group anywhere."""
