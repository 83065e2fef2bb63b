"""Which stages each device serves (`--roles`). Values only; imports no torch.

Every device serves every stage unless roles are given, or models do not fit that way (`executors/fleet/room.py`). A
device has the weights of its stages alone. Degrees are formed by the devices that denoise.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby

from tetrion.engine.errors import shown
from tetrion.engine.stages import AFTER_STEPS, BEFORE_STEPS, STAGES, Stage

Stages = tuple[Stage, ...]
"""Of one device, in their order."""
ALL, AUTO = "all", "auto"
EXAMPLE = "0:encode+decode,1-3:denoise"
TRANSFORMER = "transformer"
DECODER = "vae"


def parse_roles(text: str, num_devices: int) -> tuple[Stages, ...]:
    """The stages of each device, by its id: `all`, or like `EXAMPLE`.

    Raises ValueError naming the field and what is allowed."""
    if text == ALL:
        return (STAGES,) * num_devices
    found: dict[int, Stages] = {}
    for part in text.split(","):
        devices, colon, stages = part.strip().partition(":")
        names = [name.strip() for name in stages.split("+")]
        if not colon or not set(names) <= set(STAGES):
            raise ValueError(
                f"roles: expected {AUTO}, {ALL} or DEVICES:STAGES,… such as {EXAMPLE} with the stages"
                f" {', '.join(STAGES)}, got {shown(text)}"
            )
        for device_id in _device_ids(devices.strip(), num_devices):
            if device_id in found:
                raise ValueError(f"roles: device {device_id} is given twice in {shown(text)}")
            found[device_id] = tuple(stage for stage in STAGES if stage in names)
    if missing := sorted(set(range(num_devices)) - found.keys()):
        raise ValueError(f"roles: device {', '.join(map(str, missing))} has none in {shown(text)}")
    roles = tuple(found[device_id] for device_id in range(num_devices))
    for stage in STAGES:
        if not able(dict(enumerate(roles)), stage):
            raise ValueError(f"roles: no device serves {stage} in {shown(text)}")
    return roles


def _device_ids(text: str, num_devices: int) -> range:
    first, dash, last = text.partition("-")
    last = last if dash else first
    if not (first.isdecimal() and last.isdecimal() and len(first) < 4 and len(last) < 4):
        raise ValueError(f"roles: expected a device's number or a range such as 1-3, got {shown(text)}")
    if not int(first) <= int(last) < num_devices:
        raise ValueError(f"roles: devices are from 0 to {num_devices - 1} (in the order of devices), got {shown(text)}")
    return range(int(first), int(last) + 1)


def roles_text(roles: Sequence[Stages]) -> str:
    """As `parse_roles` reads it."""
    if all(stages == STAGES for stages in roles):
        return ALL
    parts = []
    for stages, group in groupby(enumerate(roles), key=lambda item: item[1]):
        ids = [device_id for device_id, _ in group]
        parts.append(f"{ids[0]}-{ids[-1]}:{'+'.join(stages)}" if len(ids) > 1 else f"{ids[0]}:{'+'.join(stages)}")
    return ",".join(parts)


def able(stages: Mapping[int, Stages], stage: Stage) -> tuple[int, ...]:
    """The devices that serve a stage, ascending. `stages`: by device id."""
    return tuple(sorted(device_id for device_id, own in stages.items() if stage in own))


def unserved(stages: Mapping[int, Stages], alive: Iterable[int]) -> Stages:
    """The stages that no device among `alive` serves."""
    served = {stage for device_id in alive for stage in stages[device_id]}
    return tuple(stage for stage in STAGES if stage not in served)


def stages_of(component: str, *, pictures_in: bool) -> Stages:
    """What a component of a checkpoint is needed for. `pictures_in`: requests may bring pictures, which are encoded by
    the decoder's other half. (Of the transformer, encoding needs what its family names: `models/registry.py`.)"""
    if component == TRANSFORMER:
        return ("denoise",)
    if component == DECODER:
        return (*BEFORE_STEPS, *AFTER_STEPS) if pictures_in else AFTER_STEPS
    return BEFORE_STEPS
