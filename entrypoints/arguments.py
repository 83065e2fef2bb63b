"""Values as people write them: sizes (`512x256`), degrees (`1,2,1`), what belongs to a model (`flux1-dev=table.json`).
Raises InputError naming the field."""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tetrion.engine.errors import shown
from tetrion.entrypoints.errors import InputError


def parse_size(text: str) -> tuple[int, int]:
    """`512x256` as (width, height). Which sizes a model draws is for the engine to say."""
    match = re.fullmatch(r"([0-9]{1,6})[xX×]([0-9]{1,6})", text.strip())
    if match is None:
        raise InputError(f"size: expected WIDTHxHEIGHT in pixels such as 256x256, got {shown(text)}")
    return int(match[1]), int(match[2])


def parse_wished_size(given: object) -> tuple[int, int] | tuple[None, None]:
    """Of a request: None and `auto` are the model's own size."""
    if given is None or given == "auto":
        return None, None
    if not isinstance(given, str):
        raise InputError(f"size: must be text such as 256x256, or 'auto', got {shown(given)}")
    try:
        return parse_size(given)
    except InputError as error:
        raise InputError(f"{error} (or 'auto')") from None


def parse_degrees(text: str, field: str = "force_degrees") -> tuple[int, ...]:
    """`1,2,1` as (1, 2, 1). `field`: what the error calls it."""
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"[0-9]{1,4}", part) for part in parts):
        raise InputError(f"{field}: expected whole numbers joined by commas such as 1,2,1, got {text!r}")
    return tuple(map(int, parts))


def parse_files(texts: Sequence[str], field: str) -> dict[str, Path]:
    """`MODEL=FILE` each, or one `FILE`, whose model's name is then empty."""
    found = _by_model(texts, field)
    if "" in found and len(found) > 1:
        raise InputError(f"{field}: with several, each needs its model, MODEL=FILE; got {found['']!r}")
    return {model: Path(file) for model, file in found.items()}


def parse_weights(texts: Sequence[str], field: str) -> dict[str, float]:
    """`MODEL=NUMBER` each."""
    return {model: _weight(text, field) for model, text in _by_model(texts, field).items()}


def parse_fields(texts: Sequence[str], field: str) -> dict[str, Any]:
    """`KEY=VALUE` each, the value as JSON if it is some, else as text."""
    found: dict[str, Any] = {}
    for text in texts:
        key, separator, value = text.partition("=")
        if not separator or not key:
            raise InputError(f"{field}: expected KEY=VALUE, got {shown(text)}")
        try:
            found[key] = json.loads(value)
        except ValueError:
            found[key] = value
    return found


def _by_model(texts: Sequence[str], field: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in texts:
        model, separator, value = text.partition("=")
        if not separator or "/" in model:  # a "=" further down in a path names no model
            model, value = "", text
        if model in found:
            raise InputError(f"{field}: given twice for the same model, {found[model]!r} and {value!r}")
        found[model] = value
    return found


def _weight(text: str, field: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not 0 < weight < math.inf:
        raise InputError(f"{field}: expected MODEL=NUMBER with a number above 0, got {text!r}")
    return weight
