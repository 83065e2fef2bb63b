"""Sequence parallelism: slab layout, groups as values, pairwise barrier, exchange. No process group anywhere.

`layout`, `group`, `words` are common to all workers and free of torch. CPU workers: `shared_slab`, `barrier`,
`exchange`. GPU workers: `cuda_runtime`, `raw_memory`, `device_memory`, `device_slab`, `word_upload`, `device_exchange`.
"""
