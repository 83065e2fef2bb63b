"""`POST /v1/images/edits`: a form as OpenAI's client sends it, or JSON with data URLs, as one typed value.

A picture comes with the body or not at all: no URL is fetched and no path is opened, whatever a client writes. What a
value may be is the engine's to say, as in `schema.py`; what a picture may be is `engine/pictures.py`'s.
"""

import base64
import binascii
import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from tetrion.engine.errors import shown
from tetrion.entrypoints.http.errors import ApiError
from tetrion.entrypoints.http.multipart import FormPart, MalformedForm, parse_form
from tetrion.entrypoints.http.schema import GenerationBody, settle_body

IMAGES = ("image", "image[]", "images", "images[]")
"""What a form's parts may be called that are pictures."""
MAX_IMAGES = 16
NUMBERS = frozenset(
    {"n", "width", "height", "output_compression", "seed", "num_inference_steps", "guidance_scale", "true_cfg_scale"}
    | {"slo_ms", "priority", "strength", "stream", "partial_images"}
)
"""Fields that are numbers or booleans, which a form has as text."""
ENERGY = re.compile(r"energy\[(mode|budget_j)\]")
DATA_URL = re.compile(r"data:(image/[a-z0-9.+-]+)?(;[a-z0-9=.+-]+)*;base64,", re.IGNORECASE)

Data = bytes | memoryview


class EditBody(GenerationBody, frozen=True, kw_only=True):
    """`images`, `mask`: files' bytes."""

    images: tuple[Data, ...]
    mask: Data | None = None
    strength: Any = None


def decode_form(content_type: str, body: bytes) -> EditBody:
    """Raises ApiError (400) with the field in `param`."""
    try:
        parts = parse_form(content_type, body)
    except MalformedForm as error:
        raise ApiError(400, f"The body is not valid multipart/form-data: {error}", code="invalid_form") from None
    images = [part.data for part in parts if part.name in IMAGES]
    masks = [part.data for part in parts if part.name == "mask"]
    if len(masks) > 1:
        raise _invalid("mask", "is given twice")
    fields = _fields_of([part for part in parts if part.name not in (*IMAGES, "mask")])
    return _edit(fields, images, masks[0] if masks else None)


def decode_json(data: bytes) -> EditBody:
    """`image` or `images`: a data URL or a list of them, each by itself or as {"image_url": …}; `mask` likewise one.
    Raises ApiError (400) with the field in `param`."""
    try:
        raw = msgspec.json.decode(data, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ApiError(400, f"The body is not a valid JSON object: {error}", code="invalid_json") from None
    given = [(name, raw.pop(name)) for name in ("image", "images") if raw.get(name) is not None]
    if len(given) > 1:
        raise _invalid("images", "and image are both given")
    name, value = given[0] if given else ("image", [])
    images = value if isinstance(value, list) else [value]
    mask = raw.pop("mask", None)
    if len(images) > MAX_IMAGES:
        raise _invalid(name, f"has {len(images)} pictures, at most {MAX_IMAGES} are read")
    decoded = [_of_data_url(name, image) for image in images]
    return _edit(raw, decoded, None if mask is None else _of_data_url("mask", mask))


def _edit(fields: Mapping[str, Any], images: Sequence[Data], mask: Data | None) -> EditBody:
    if not images:
        raise ApiError(400, "image: is required", param="image", code="missing_required_parameter")
    if len(images) > MAX_IMAGES:
        raise _invalid("image", f"has {len(images)} pictures, at most {MAX_IMAGES} are read")
    body = settle_body(fields)
    given = {name: getattr(body, name) for name in GenerationBody.__struct_fields__}
    return EditBody(**given, images=tuple(images), mask=mask, strength=fields.get("strength"))


# Forms ------------------------------------------------------------------------------------------------------------


def _fields_of(parts: Sequence[FormPart]) -> dict[str, Any]:
    """A form's texts as what they would be in JSON."""
    fields: dict[str, Any] = {}
    for part in parts:
        if part.is_file:
            continue  # of a field that is not known here
        try:
            text = bytes(part.data).decode()
        except UnicodeDecodeError:
            raise _invalid(part.name, "is not UTF-8 text") from None
        if energy := ENERGY.fullmatch(part.name):
            name, value = energy[1], _number_of(text)
            fields["energy"] = {**_mapping(fields.get("energy")), name: value}
        elif part.name in fields:
            raise _invalid(part.name, "is given twice")
        elif part.name == "energy":
            fields["energy"] = _json_of(text)
        elif text or part.name not in NUMBERS:  # an empty field is one that was left empty
            fields[part.name] = _number_of(text) if part.name in NUMBERS else text
    return fields


def _mapping(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _number_of(text: str) -> object:
    """What is no number or boolean stays text, of which the engine then says so."""
    value = _json_of(text.strip().lower())
    return value if isinstance(value, bool | int | float) else text


def _json_of(text: str) -> object:
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError:
        return text


# JSON -------------------------------------------------------------------------------------------------------------


def _of_data_url(field: str, value: object) -> bytes:
    if isinstance(value, dict):
        value = value.get("image_url")
    match = DATA_URL.match(value[:256]) if isinstance(value, str) else None
    if match is None or not isinstance(value, str):
        expected = "must be a data URL (data:image/png;base64,…); nothing is fetched from other URLs"
        raise _invalid(field, f"{expected}, got {shown(value)}")
    try:
        return base64.b64decode(value[match.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise _invalid(field, f"is not valid base64: {error}") from None


def _invalid(param: str, message: str) -> ApiError:
    return ApiError(400, f"{param}: {message}", param=param, code="invalid_value")
