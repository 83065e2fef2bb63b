"""The bodies of the image API as typed values: what a client may send, what it gets back.

Field names are OpenAI's where OpenAI has one, else those of other diffusion servers (`num_inference_steps`,
`guidance_scale`), else ours (`slo_ms`, `priority`, `energy`). Fields not listed here are accepted and ignored, so that
clients of those servers run unchanged. What a value of a picture's may be is the engine's to say: 3.0 is 3, null is
"not given". Knows the engine's request, nothing of sockets.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar

import msgspec

from tetrion.engine.errors import BudgetUnmeetable, ModelNotFound, RequestError
from tetrion.engine.request import ImageRequest, ImageResult, Receipt
from tetrion.engine.resolve import MAX_NAME_CHARS, MAX_SEED, text, whole_number, whole_within
from tetrion.entrypoints.arguments import parse_wished_size
from tetrion.entrypoints.errors import InputError
from tetrion.entrypoints.http.errors import ApiError
from tetrion.entrypoints.pictures import PictureFormat

PARAM_OF_FIELD = {"num_steps": "num_inference_steps", "guidance": "guidance_scale", "pictures": "image"}
MAX_PICTURES = 10
MAX_COMPRESSION = 100
MAX_PARTIAL_IMAGES = 3
ResponseQuality = Literal["low", "medium", "high", "xhigh", "max"]

_T = TypeVar("_T")


class GenerationBody(msgspec.Struct, frozen=True, kw_only=True):
    """`POST /v1/images/generations`. None means the default of the model or of the API. `user`: divides the tenant.
    The budget in `energy` is that of each picture. `Any`: what the engine settles."""

    prompt: Any
    model: str | None = None
    n: int | None = None
    size: Any = None
    width: Any = None
    height: Any = None
    response_format: Literal["b64_json", "url"] | None = None
    output_format: PictureFormat | None = None
    output_compression: int | None = None
    stream: bool | None = None
    partial_images: int | None = None
    seed: int | None = None
    num_inference_steps: Any = None
    guidance_scale: Any = None
    negative_prompt: Any = None
    true_cfg_scale: Any = None
    slo_ms: Any = None
    priority: Any = None
    energy: Any = None
    user: str | None = None


class _RawBody(GenerationBody, frozen=True, kw_only=True):
    """As it comes."""

    model: Any = None
    n: Any = None
    output_compression: Any = None
    partial_images: Any = None
    seed: Any = None
    user: Any = None


class Picture(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One entry of `data`: the picture as OpenAI gives it, then how it was drawn (times in seconds).

    `latency_s`, `deliver_s` of it and `slo_met` are until this is written: what sending takes nobody knows by then."""

    b64_json: str | None = None
    url: str | None = None
    revised_prompt: str | None = None
    request_id: str
    seed: int
    num_inference_steps: int
    degrees: tuple[int, ...]
    latency_s: float
    queue_s: float
    encode_s: float
    denoise_s: float
    decode_s: float
    deliver_s: float
    slo_met: bool | None = None
    energy: Receipt


class InputTokensDetails(msgspec.Struct, frozen=True, kw_only=True):
    text_tokens: int
    image_tokens: int


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """The prompt's text tokens and those of pictures that came with it, each counted once, and the packed image tokens
    of all pictures that were drawn."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    total_tokens: int


class GenerationResponse(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`model`: the one that drew. `warnings`: what was done otherwise than asked for; left out if nothing was."""

    created: int
    background: Literal["opaque"]
    output_format: PictureFormat
    quality: ResponseQuality
    size: str
    model: str
    data: list[Picture]
    usage: Usage
    warnings: tuple[str, ...] = ()


class CompletedEvent(Picture, frozen=True, kw_only=True, omit_defaults=True):
    """Data of a stream's event: the `index`-th picture of a request. `usage`: of this picture; the prompt counts
    in one event alone, so that the events' sums are those of an answer in one piece."""

    type: str
    created_at: int
    background: Literal["opaque"]
    output_format: PictureFormat
    quality: ResponseQuality
    size: str
    model: str
    index: int
    usage: Usage
    warnings: tuple[str, ...] = ()


P = TypeVar("P", bound=Picture)


def decode_body(data: bytes) -> GenerationBody:
    """Decode and check a request body in UTF-8. Raises ApiError (400) with the field in `param`."""
    try:
        raw = msgspec.json.decode(data, type=_RawBody)
    except msgspec.ValidationError as error:
        raise _invalid(error) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ApiError(400, f"The body is not valid JSON: {error}", code="invalid_json") from None
    return _checked(raw)


def settle_body(fields: Mapping[str, Any]) -> GenerationBody:
    """The same of what a JSON body would hold. Raises ApiError (400)."""
    try:
        raw = msgspec.convert(dict(fields), _RawBody)
    except msgspec.ValidationError as error:
        raise _invalid(error) from None
    return _checked(raw)


def _checked(raw: _RawBody) -> GenerationBody:
    """Raises ApiError (400) with the field in `param`."""
    try:
        body = _settled(raw)
    except RequestError as error:
        raise ApiError(400, str(error), param=error.field, code="invalid_value") from None
    if body.stream and body.response_format == "url":
        message = "response_format: pictures of a stream are in its events, as b64_json"
        raise ApiError(400, message, param="response_format", code="unsupported_value")
    if (body.output_format or "png") == "png" and body.output_compression not in (None, MAX_COMPRESSION):
        message = "output_compression: below 100 it needs output_format webp or jpeg; png is lossless"
        raise ApiError(400, message, param="output_compression", code="invalid_value")
    return body


def _settled(raw: _RawBody) -> GenerationBody:
    """What is looked at before the engine does. Raises RequestError."""

    def given(field: str, settle: Callable[[str, object], _T]) -> _T | None:
        value = getattr(raw, field)
        return None if value is None else settle(field, value)

    fields = {field: getattr(raw, field) for field in GenerationBody.__struct_fields__}
    fields |= {
        "model": given("model", lambda field, value: text(field, value, MAX_NAME_CHARS)),
        "n": given("n", lambda field, value: whole_within(field, value, 1, MAX_PICTURES)),
        "output_compression": given(
            "output_compression", lambda field, value: whole_within(field, value, 0, MAX_COMPRESSION)
        ),
        "partial_images": given(
            "partial_images", lambda field, value: whole_within(field, value, 0, MAX_PARTIAL_IMAGES)
        ),
        "seed": given("seed", lambda field, value: whole_number(field, value, f" from 0 to {MAX_SEED}")),
        "user": given("user", lambda field, value: text(field, value, MAX_NAME_CHARS)),
    }
    return GenerationBody(**fields)


def to_requests(
    body: GenerationBody, model: str | None, seed: int, ids: list[str], tenant: str = "", **pictures: Any
) -> list[ImageRequest]:
    """One request a picture, drawn by `model`, with seeds `seed`, `seed + 1`, … and one of `ids` each. `tenant`: of the
    sender (`tenants.py`). `pictures`: the request's fields about those that it brings. Raises ApiError (400)."""
    width, height = _width_and_height(body)
    return [
        ImageRequest(
            prompt=body.prompt,
            model=model,
            width=width,
            height=height,
            num_steps=body.num_inference_steps,
            guidance=body.guidance_scale,
            negative_prompt=body.negative_prompt,
            true_cfg_scale=body.true_cfg_scale,
            seed=seed + i,
            slo_ms=body.slo_ms,
            priority=body.priority,
            tenant=tenant,
            user=body.user or "",
            request_id=request_id,
            energy=body.energy,
            delivery=body.output_format or "png",
            **pictures,
        )
        for i, request_id in enumerate(ids)
    ]


def model_not_found(error: ModelNotFound) -> ApiError:
    return ApiError(404, str(error), param=error.field, code="model_not_found")


def invalid_request(error: RequestError, body: GenerationBody) -> ApiError:
    """The engine's complaint about a request in the names that the client used."""
    if isinstance(error, ModelNotFound):
        return model_not_found(error)
    detail = str(error).removeprefix(f"{error.field}: ")
    param = PARAM_OF_FIELD.get(error.field, error.field)
    if param in ("width", "height") and getattr(body, param) is None:
        param, detail = "size", f"{param} {detail}"
    if isinstance(error, BudgetUnmeetable):
        message, code = f"{param}: {detail}", "energy_budget_unmeetable"
        return ApiError(400, message, param=param, code=code, cheapest_plan=error.cheapest)
    return ApiError(400, f"{param}: {detail}", param=param, code="invalid_value")


def describe_picture(result: ImageResult, slo_ms: float | None, deliver_s: float, kind: type[P], **more: Any) -> P:
    """`deliver_s`: since it was drawn. `more`: what else this `kind` has."""
    latency_s = result.latency_s + deliver_s
    return kind(
        request_id=result.request_id,
        seed=result.seed,
        num_inference_steps=result.num_steps,
        degrees=result.degrees,
        latency_s=latency_s,
        queue_s=result.queue_s,
        encode_s=result.encode_s,
        denoise_s=result.denoise_s,
        decode_s=result.decode_s,
        deliver_s=deliver_s,
        slo_met=None if slo_ms is None else 1e3 * latency_s <= slo_ms,
        energy=result.energy,
        **more,
    )


def usage(num_text_tokens: int, num_image_tokens: int, num_picture_tokens: int = 0) -> Usage:
    """`num_picture_tokens`: of the pictures that came with the request."""
    num_input_tokens = num_text_tokens + num_picture_tokens
    return Usage(
        input_tokens=num_input_tokens,
        input_tokens_details=InputTokensDetails(text_tokens=num_text_tokens, image_tokens=num_picture_tokens),
        output_tokens=num_image_tokens,
        total_tokens=num_input_tokens + num_image_tokens,
    )


def _width_and_height(body: GenerationBody) -> tuple[Any, Any]:
    try:
        width, height = parse_wished_size(body.size)
    except InputError as error:
        raise ApiError(400, str(error), param="size", code="invalid_value") from None
    if width is None:
        return body.width, body.height
    if body.width not in (None, width) or body.height not in (None, height):
        raise ApiError(
            400, f"size: {body.size!r} contradicts width and height; give one", param="size", code="invalid_value"
        )
    return width, height


def _invalid(error: msgspec.ValidationError) -> ApiError:
    """msgspec's ``Expected `int` <= 10 - at `$.n` `` as a message that starts with the field, which is also `param`."""
    message, _, path = str(error).partition(" - at `$")
    param = path.rstrip("`").lstrip(".") or None
    missing = re.search(r"missing required field `(\w+)`", message)
    if missing:
        param, message = missing[1], "is required"
    if param is None:
        return ApiError(400, f"The body must be a JSON object: {message}", code="invalid_type")
    message = message[0].lower() + message[1:]
    code = "missing_required_parameter" if missing else "invalid_value"
    return ApiError(400, f"{param}: {message}", param=param, code=code)
