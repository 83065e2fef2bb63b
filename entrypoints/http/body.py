"""The body of a POST, as JSON in UTF-8 or as a form: read within a limit, inflated within the same limit, decoded.

What is answered to a body that cannot be taken: 413 (too large, also once inflated), 415 (a content type, content
encoding or charset that is not known here), 400 (damaged).
"""

import re
import zlib
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import Request

from tetrion.engine.errors import shown
from tetrion.entrypoints.http.errors import ApiError
from tetrion.entrypoints.http.multipart import FORM_TYPE
from tetrion.entrypoints.unicode import as_utf8

MAX_BODY_BYTES = 1 << 20
MAX_FORM_BYTES = 48 << 20
"""Of a body with pictures."""
MAX_MEMBERS = 64
"""Streams that one compressed body may be made of, one after the other: each costs time, and may hold nothing."""
JSON_TYPE = re.compile(r"(application|text)/([a-z0-9!#$&^_.-]+\+)?json")
UNICODE_CHARSETS = re.compile(r"utf-?8|utf-?16(le|be)?|utf-?32(le|be)?|us-ascii|ascii")
GZIP, DEFLATE = ("gzip", "x-gzip"), ("deflate",)
GZIP_WBITS, ZLIB_WBITS, RAW_WBITS = 31, 15, -15


async def read_json(request: Request) -> bytes:
    """Raises ApiError, and ClientDisconnect."""
    _check_type(request.headers)
    return _as_utf8(await _read(request, MAX_BODY_BYTES), request.headers)


async def read_form_or_json(request: Request, allowed_origins: Collection[str]) -> tuple[bytes, bool]:
    """A body with pictures, and whether it is a form. Raises ApiError, and ClientDisconnect."""
    if _media_type(request.headers) == FORM_TYPE:
        _check_origin(request.headers, allowed_origins)
        return await _read(request, MAX_FORM_BYTES), True
    _check_type(request.headers, f"application/json or {FORM_TYPE}")
    return _as_utf8(await _read(request, MAX_FORM_BYTES), request.headers), False


async def _read(request: Request, max_bytes: int) -> bytes:
    """The whole body, inflated. Raises ApiError as soon as it is, or is said to be, more than that."""
    encodings = _content_encodings(request.headers)
    data, too_large = bytearray(), _too_large(f"The body has more than {max_bytes} bytes.")
    if int(request.headers.get("content-length", 0)) > max_bytes:
        raise too_large
    async for chunk in request.stream():
        data += chunk
        if len(data) > max_bytes:
            raise too_large
    whole = bytes(data)
    for encoding in reversed(encodings):
        whole = _inflate(whole, encoding, max_bytes)
    return whole


def _too_large(message: str) -> ApiError:
    return ApiError(413, message, code="body_too_large")


def _unsupported(message: str) -> ApiError:
    return ApiError(415, message, code="unsupported_media_type")


# Content type -----------------------------------------------------------------------------------------------------


def _media_type(headers: Headers) -> str:
    return headers.get("content-type", "").partition(";")[0].strip().lower()


def _check_type(headers: Headers, expected: str = "application/json") -> None:
    """JSON has to be called so: pages of any origin may post the types that a browser's forms have."""
    given = _media_type(headers)
    if not JSON_TYPE.fullmatch(given):
        got = f"got {shown(given)}" if given else "there is none"
        raise _unsupported(f"content-type: must be {expected}, {got} (curl: -H 'content-type: application/json')")


def _check_origin(headers: Headers, allowed: Collection[str]) -> None:
    """A form may be posted by a page of any origin, without the browser asking first; but it says whose page that is.
    Other clients say nothing. Raises ApiError (403) unless it is this server's own or one of those that may ask."""
    origin = headers.get("origin")
    if origin is None and headers.get("sec-fetch-site") in (None, "same-origin", "none"):
        return
    is_own = origin is not None and urlsplit(origin).netloc.lower() == headers.get("host", "").lower()
    if not (is_own or "*" in allowed or origin in allowed):
        message = f"Pages of {shown(origin or 'another site')} may not post forms here (see --allow-origin)."
        raise ApiError(403, message, code="origin_not_allowed")


def _as_utf8(data: bytes, headers: Headers) -> bytes:
    """What JSON is in shows at its beginning (RFC 4627); a charset that says otherwise is only believed of what is
    no UTF-8."""
    try:
        decoded = as_utf8(data)
        decoded.decode()
    except UnicodeDecodeError as error:
        charset = _charset(headers)
        if charset and not UNICODE_CHARSETS.fullmatch(charset):
            message = f"content-type: charset {shown(charset)} is not supported; JSON is in UTF-8, UTF-16 or UTF-32"
            raise _unsupported(message) from None
        raise ApiError(400, f"The body is not valid JSON: {error}", code="invalid_json") from None
    return decoded


def _charset(headers: Headers) -> str:
    found = re.search(r"""charset\s*=\s*["']?([^"';\s]+)""", headers.get("content-type", ""), re.IGNORECASE)
    return found[1].lower() if found else ""


# Content encoding -------------------------------------------------------------------------------------------------


def _content_encodings(headers: Headers) -> list[str]:
    """In the order in which they were applied. Raises ApiError for one that is not known, and for more than one."""
    given = [name.strip().lower() for line in headers.getlist("content-encoding") for name in line.split(",")]
    encodings = [name for name in given if name not in ("", "identity")]
    for name in encodings:
        if name not in (*GZIP, *DEFLATE):
            error = _unsupported(f"content-encoding: {shown(name)} is not supported; gzip and deflate are")
            error.headers["accept-encoding"] = "gzip, deflate"
            raise error
    if len(encodings) > 1:
        raise _unsupported(f"content-encoding: at most one is supported, got {shown(', '.join(encodings))}")
    return encodings


def _inflate(data: bytes, encoding: str, max_bytes: int) -> bytes:
    """Raises ApiError, as soon as it is more than that."""
    try:
        return _inflated(data, GZIP_WBITS if encoding in GZIP else _wbits_of_deflate(data), max_bytes)
    except zlib.error as error:
        message = f"content-encoding: the body is not what {encoding} makes: {error}"
        raise ApiError(400, message, code="invalid_encoding") from None


def _inflated(data: bytes, wbits: int, max_bytes: int) -> bytes:
    """Raises zlib.error, ApiError."""
    whole = bytearray()
    for _ in range(MAX_MEMBERS):
        stream = zlib.decompressobj(wbits)
        whole += stream.decompress(data, max_bytes + 1 - len(whole))
        if len(whole) > max_bytes:
            raise _too_large(f"The body has more than {max_bytes} bytes once it is inflated.")
        if not stream.eof:
            raise zlib.error("it ends too early")
        data = stream.unused_data
        if not data:
            return bytes(whole)
        if wbits != GZIP_WBITS:
            raise zlib.error("something follows its end")
    raise zlib.error(f"it has more than {MAX_MEMBERS} parts")


def _wbits_of_deflate(data: bytes) -> int:
    """It is zlib's format, but some send the raw one."""
    is_zlib = len(data) >= 2 and data[0] & 0x0F == 8 and int.from_bytes(data[:2], "big") % 31 == 0
    return ZLIB_WBITS if is_zlib else RAW_WBITS
