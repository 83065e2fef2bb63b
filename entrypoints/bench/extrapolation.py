"""Degrees that a machine is too small to measure, from the library floor: for simulations of larger machines.

A step at such a degree = its floor × (measured step / floor) at the widest degree that was measured (4 on four GPUs).
Such times are no measurements: the profile says under `meta.extrapolated` which they are and how they were made.
"""

from collections.abc import Mapping
from pathlib import Path

import msgspec

from tetrion.engine.planning.cost.profile import ClassCost, Profile

RULE = "floor × (measured step / floor) at the widest degree that was measured"


class FloorTable(msgspec.Struct, frozen=True, kw_only=True):
    """`floor_ms`: "WIDTHxHEIGHT" -> degree -> milliseconds of a step's GEMMs and attention alone."""

    floor_ms: dict[str, dict[int, float]]
    gpu: str = ""
    source: str = ""


def read_floors(path: Path) -> FloorTable:
    """Raises ValueError naming file and field, or OSError."""
    try:
        floors = msgspec.json.decode(path.read_bytes(), type=FloorTable)
    except msgspec.DecodeError as error:
        raise ValueError(f"{path}: floors: {error}") from None
    for size, by_degree in floors.floor_ms.items():
        for degree, ms in by_degree.items():
            if degree < 1 or not 0 < ms < float("inf"):
                raise ValueError(f"{path}: floor_ms.{size}.{degree}: degree at least 1, time above 0; got {ms}")
    return floors


def extrapolated(profile: Profile, floors: FloorTable) -> Profile:
    """`profile` with the degrees of `floors` beyond the widest measured one of each size, marked as such.

    Raises ValueError if nothing can be extrapolated: no size with a floor at its widest measured degree and beyond.
    """
    classes, marks = dict(profile.classes), {}
    for size, cost in profile.classes.items():
        known, reference = floors.floor_ms.get(size, {}), max(cost.step_ms)
        beyond = sorted(degree for degree in known if reference < degree <= profile.heads)
        if beyond and reference in known:
            ratio = cost.step_ms[reference] / known[reference]
            classes[size] = _with_steps(cost, {degree: ratio * known[degree] for degree in beyond})
            marks[size] = {"degrees": beyond, "reference_degree": reference, "ratio": ratio}
    if not marks:
        raise ValueError("floors: no size of the profile has a floor at its widest measured degree and at a wider one")
    made = {"rule": RULE, "floors": floors.source, "floors_gpu": floors.gpu, "classes": marks}
    return msgspec.structs.replace(profile, classes=classes, meta=profile.meta | {"extrapolated": made})


def _with_steps(cost: ClassCost, step_ms: Mapping[int, float]) -> ClassCost:
    return msgspec.structs.replace(cost, step_ms={**cost.step_ms, **step_ms})
