"""Sequence parallelism: slab layout, groups as values, pairwise barrier, exchange. No process group anywhere.

`layout`, `group`, `words` are common to all workers and free of torch. CPU workers: `cpu/`. GPU workers: `gpu/`,
which takes types from `cpu/`, never the other way.
"""
