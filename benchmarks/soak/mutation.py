"""Damaged input: bodies, HTTP streams, lines of a batch.

Case `number` of a seed is the same again in every run, and alone. Damage is done where a format has its joints (fields,
values, encodings, heads) and then, often, to single bytes.
"""

import functools
import gzip
import json
import random
import re
import zlib
from collections.abc import Sequence
from typing import Any

import msgspec

JSON_TYPE = "application/json"
LONG = "a" * 40_000
WHOLE_NUMBERS = (0, -1, 1, 2, 1001, 2**31, 2**53 + 1, 2**63, 2**64, 10**400)
NUMBERS = (*WHOLE_NUMBERS, 3.0, 2.5, 1e-320, 1e308, float("inf"), float("nan"))
SIZES = ("1", "128x128", "128X128", "0x0", "-16x16", "129x128", "128x", "99999999999x16")
TEXTS = ("", " ", "nan", "null", "\0", "\ud800", "\udc00\ud800", "😀" * 300, "é", "../x", LONG, *SIZES)
DEEP: Any = [[[[[[[[[]]]]]]]]]
OTHERS: tuple[Any, ...] = (None, True, False, [], {}, [None], {"a": 1}, {"mode": "fastest"}, {"budget_j": -1}, DEEP)
FIELDS = (
    *("prompt", "model", "n", "size", "width", "height", "response_format", "output_format", "output_compression"),
    *("stream", "seed", "num_inference_steps", "num_steps", "guidance_scale", "negative_prompt", "true_cfg_scale"),
    *("slo_ms", "priority", "energy", "user", "id", "nonsense"),
)
BROKEN_TEXT = (b"\0", b"\xff", b"\xfe\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\x80" * 9)
BYTES = (*BROKEN_TEXT, b'"', b"\\", b"{", b"[" * 300, b"]", b",", b":", b"e9999")
CONTENT_TYPES = (
    *("", "text/plain", "*/*", ";;;", "application/json" * 200, "application/vnd.api+json"),
    *("application/json; charset=utf-8", "application/json; charset=utf-16", "application/json;charset=nosuch"),
    "multipart/form-data; boundary=x",
)
BOMB_BYTES = 1 << 24
CODINGS = ("gzip", "deflate", "br", "identity", "gzip, gzip", "x" * 50)
HOST = b"host: localhost\r\n"
POST = b"POST /v1/images/generations HTTP/1.1\r\n" + HOST + b"content-type: application/json\r\n"
STREAMS = (
    b"GET /health HTTP/1.1\r\n" + HOST + b"\r\n",
    b"GET /metrics HTTP/1.1\r\n" + HOST + b"connection: close\r\n\r\n",
    b"HEAD /ready HTTP/1.1\r\n" + HOST + b"\r\n",
    b"GET /v1/models/shapes HTTP/1.0\r\n\r\n",
    b"OPTIONS /v1/models HTTP/1.1\r\n" + HOST + b"origin: http://a\r\naccess-control-request-method: POST\r\n\r\n",
    b"GET /v1/images/files/%2e%2e%2f HTTP/1.1\r\n" + HOST + b"range: bytes=0-1\r\n\r\n",
    b"GET http://localhost/ready HTTP/1.1\r\n" + HOST + b"upgrade: websocket\r\nconnection: upgrade\r\n\r\n",
    POST + b'content-length: 14\r\n\r\n{"prompt": ""}',
    POST + b'transfer-encoding: chunked\r\n\r\n5\r\n{"pro\r\n9;x=y\r\nmpt": ""}\r\n0\r\ntrailer: a\r\n\r\n',
    POST + b"expect: 100-continue\r\ncontent-length: 2\r\n\r\n{}",
    POST + b"content-encoding: gzip\r\ncontent-length: 4\r\n\r\n\x1f\x8b\x08\x00",
    (b"GET /health HTTP/1.1\r\n" + HOST + b"\r\n") * 2,
)
"""Whole requests, cheap to answer."""


class BodyCase(msgspec.Struct, frozen=True, kw_only=True):
    headers: dict[str, str]
    body: bytes


class StreamCase(msgspec.Struct, frozen=True, kw_only=True):
    """Sent piece by piece; `ends`: then the client closes its side."""

    pieces: tuple[bytes, ...]
    ends: bool


def random_of(seed: int, number: int) -> random.Random:
    return random.Random(f"{seed}:{number}")


def body_case(valid: dict[str, Any], seed: int, number: int) -> BodyCase:
    """`valid` with damage."""
    rng = random_of(seed, number)
    text = _text(_damaged(valid, rng), rng)
    if rng.random() < 0.4:
        text = damaged_bytes(text, rng)
    headers = {"content-type": rng.choice(CONTENT_TYPES) if rng.random() < 0.1 else JSON_TYPE}
    if rng.random() < 0.1:
        headers["content-encoding"], text = _coded(text, rng)
    return BodyCase(headers=headers, body=text)


def line_case(valid: dict[str, Any], seed: int, number: int) -> bytes:
    """One line of a batch file, `valid` with damage, without a line's end."""
    rng = random_of(seed, number)
    text = _text(_damaged(valid, rng), rng)
    return (damaged_bytes(text, rng) if rng.random() < 0.4 else text).replace(b"\n", b" ")


def stream_case(seed: int, number: int) -> StreamCase:
    rng = random_of(seed, number)
    data = rng.choice(STREAMS)
    for _ in range(rng.choice((0, 1, 1, 2, 4))):
        data = rng.choice((damaged_bytes, _damaged_lines, _spliced, _damaged_number))(data, rng)
    cuts = sorted(rng.randrange(len(data) + 1) for _ in range(rng.choice((0, 0, 1, 3))))
    pieces = tuple(data[start:end] for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True))
    return StreamCase(pieces=pieces, ends=rng.random() < 0.7)


def damaged_bytes(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(len(changed) + 1)
        end = min(len(changed), at + rng.choice((1, 1, 2, 16, 200)))
        match rng.randrange(5):
            case 0:
                del changed[at:end]
            case 1:
                changed[at:at] = rng.choice(BYTES)
            case 2:
                changed[at:at] = changed[at:end]
            case 3 if at < len(changed):
                changed[at] ^= 1 << rng.randrange(8)
            case _:
                del changed[at:]
    return bytes(changed)


def _odd(rng: random.Random) -> Any:
    return rng.choice(rng.choice((NUMBERS, TEXTS, OTHERS)))


def _damaged(valid: dict[str, Any], rng: random.Random) -> Any:
    body: Any = dict(valid)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        match rng.randrange(4):
            case 0:
                body.pop(rng.choice(sorted(body) or FIELDS), None)
            case _:
                body[rng.choice(FIELDS)] = _odd(rng)
    return rng.choice(([body], _odd(rng), {"": body})) if rng.random() < 0.05 else body


def _text(value: Any, rng: random.Random) -> bytes:
    """As JSON, or nearly."""
    text = json.dumps(value, ensure_ascii=rng.random() < 0.7)
    if rng.random() < 0.05:
        text = text[:-1] + ", " + text[1:]  # every field twice
    if rng.random() < 0.03:
        depth = rng.choice((10, 500, 20_000))
        text = "[" * depth + text + "]" * depth
    encoding = rng.choice(("utf-16", "utf-32", "latin-1", "utf-8-sig")) if rng.random() < 0.05 else "utf-8"
    return text.encode(encoding, "replace" if encoding == "latin-1" else "surrogatepass")


def _coded(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    """A content coding, and bytes that may or may not be in it; now and then they unpack to `BOMB_BYTES`."""
    coding = rng.choice(CODINGS)
    if rng.random() < 0.1:
        return coding, _bomb(coding)
    if rng.random() < 0.3:
        return coding, data
    packed = zlib.compress(data) if coding == "deflate" else gzip.compress(data, mtime=0)
    return coding, damaged_bytes(packed, rng) if rng.random() < 0.3 else packed


@functools.cache
def _bomb(coding: str) -> bytes:
    spaces = b" " * BOMB_BYTES
    return zlib.compress(spaces) if coding == "deflate" else gzip.compress(spaces, mtime=0)


def _damaged_lines(data: bytes, rng: random.Random) -> bytes:
    """Of a head."""
    lines = data.split(b"\r\n")
    at = rng.randrange(len(lines))
    match rng.randrange(5):
        case 0:
            lines[at:at] = [lines[at]] * rng.choice((1, 2, 500))
        case 1:
            del lines[at]
        case 2:
            lines[at] += rng.choice((b"\n", b"\r", b" ", b"\0", b"\xff", b"x" * 70_000))
        case 3:
            rng.shuffle(lines)
        case _:
            return rng.choice((b"\n", b"\r", b"\r\r\n", b"\r\n\r\n")).join(lines)
    return b"\r\n".join(lines)


def _damaged_number(data: bytes, rng: random.Random) -> bytes:
    found = list(re.finditer(rb"\d+", data))
    if not found:
        return data
    chosen = rng.choice(found)
    numbers: Sequence[bytes] = (b"0", b"-1", b"+5", b"0x10", b"1e3", b"9" * 30, b"", b"1_0", b" 7", b"07", b"1048577")
    return data[: chosen.start()] + rng.choice(numbers) + data[chosen.end() :]


def _spliced(data: bytes, rng: random.Random) -> bytes:
    other = rng.choice(STREAMS)
    return data[: rng.randrange(len(data) + 1)] + other[rng.randrange(len(other)) :]
