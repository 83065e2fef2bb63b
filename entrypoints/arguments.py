"""Values as people write them: sizes (`512x256`), degrees (`1,2,1`). Raises InputError naming the field."""

import re

from tetrion.entrypoints.errors import InputError


def parse_size(text: str) -> tuple[int, int]:
    """`512x256` as (width, height). Which sizes a model draws is for the engine to say."""
    match = re.fullmatch(r"([0-9]{1,6})[xX×]([0-9]{1,6})", text.strip())
    if match is None:
        raise InputError(f"size: expected WIDTHxHEIGHT in pixels such as 256x256, got {text!r}")
    return int(match[1]), int(match[2])


def parse_degrees(text: str, field: str = "force_degrees") -> tuple[int, ...]:
    """`1,2,1` as (1, 2, 1). `field`: what the error calls it."""
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"[0-9]{1,4}", part) for part in parts):
        raise InputError(f"{field}: expected whole numbers joined by commas such as 1,2,1, got {text!r}")
    return tuple(map(int, parts))
