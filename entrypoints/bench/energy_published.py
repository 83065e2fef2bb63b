"""The published row beside a measured one: what ML.ENERGY v3 gives for the same picture, GPU, degree and batch 1."""

import re
from collections.abc import Sequence
from typing import Any

from tetrion.entrypoints.recommend.choice import Configuration
from tetrion.entrypoints.recommend.sources import read_source


def published_beside(row: dict[str, Any], gpu: str) -> dict[str, Any] | None:
    """What was published for `row` (of `tetrion bench energy`) on `gpu`, and our joules as a share of it; None if
    nothing was. There as here all GPUs of a configuration are counted, but there a picture's PNG is too."""
    if not gpu or row["degree"] is None or row["devices"] % row["degree"]:
        return None
    found = _matching(read_source(None), row, gpu)
    if found is None:
        return None
    joules = row["joules_per_image"]
    return {
        "source": found.system,
        "model": found.model,
        "gpu": found.gpu,
        "joules_per_image": found.joules_per_image,
        "latency_s": found.latency_s,
        "watts": found.watts,
        "share_of_published": None if joules is None else joules / found.joules_per_image,
    }


def _matching(configurations: Sequence[Configuration], row: dict[str, Any], gpu: str) -> Configuration | None:
    for c in configurations:
        is_kind = _plain(c.model.split("/")[-1]) == _plain(row["model"]) and _plain(c.gpu) in _plain(gpu)
        is_picture = f"{c.width}x{c.height}" == row["px"] and c.num_steps == row["steps"]
        if is_kind and is_picture and (c.num_gpus, c.ulysses_degree, c.batch) == (row["degree"], row["degree"], 1):
            return c
    return None


def _plain(name: str) -> str:
    """`flux1dev` for FLUX.1-dev, flux1-dev and FLUX1_dev."""
    return re.sub(r"[^a-z0-9]", "", name.lower())
