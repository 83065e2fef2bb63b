"""Sequence parallelism: slab layout, groups as values, pairwise barrier, exchange. No process group anywhere.

`layout`, `group`, `words` are common to all workers and free of torch; `exchange` says why it
is safe. It is carried out by `cpu/` for CPU workers and by `gpu/` for GPU workers.
"""
