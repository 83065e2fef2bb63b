"""Bodies that are compressed, in other Unicode encodings, or of another type, over a real socket."""

import gzip
import json
import zlib
from collections.abc import AsyncIterator

import httpx
import pytest

from tests.entrypoints.http.test_app import Served, error_of, serving
from tetrion.entrypoints.http.body import MAX_BODY_BYTES

BODY = '{"prompt": "ein grüner Stern ☆", "seed": 5}'
UTF_8 = BODY.encode()


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    async with serving() as running:
        yield running


def raw_deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(data) + packer.flush()


def check_drawn(served: Served, response: httpx.Response) -> None:
    assert response.status_code == 200, response.text
    assert served.engine.handles[-1].request.prompt == "ein grüner Stern ☆"


@pytest.mark.parametrize(
    ("content", "encoding"),
    [
        (gzip.compress(UTF_8, mtime=0), "gzip"),
        (gzip.compress(UTF_8, mtime=0), "X-GZIP"),
        (gzip.compress(UTF_8[:9], mtime=0) + gzip.compress(b"", mtime=0) + gzip.compress(UTF_8[9:], mtime=0), "gzip"),
        (gzip.compress(UTF_8, mtime=0), "identity, gzip"),
        (zlib.compress(UTF_8), "deflate"),
        (raw_deflate(UTF_8), "deflate"),
        (UTF_8, "identity"),
        (gzip.compress(BODY.encode("utf-16"), mtime=0), "gzip"),
    ],
)
async def test_compressed_bodies_are_inflated(served: Served, content: bytes, encoding: str) -> None:
    check_drawn(served, await served.post_raw(content, content_encoding=encoding))


@pytest.mark.parametrize("encoding", ["br", "zstd", "compress", "gzip, br", "gzip, gzip", "gzip,,gzip", "utf-8", "*"])
async def test_other_content_encodings_are_named(served: Served, encoding: str) -> None:
    response = await served.post_raw(UTF_8, content_encoding=encoding)
    assert response.status_code == 415 and error_of(response)["message"].startswith("content-encoding: ")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        UTF_8,
        gzip.compress(UTF_8, mtime=0)[:-4],
        gzip.compress(UTF_8, mtime=0) + b"x",
        gzip.compress(b"", mtime=0) * 1000,
        b"\x1f\x8b\x08",
    ],
)
async def test_a_damaged_compressed_body_is_a_bad_request(served: Served, content: bytes) -> None:
    response = await served.post_raw(content, content_encoding="gzip")
    assert (response.status_code, error_of(response)["code"]) == (400, "invalid_encoding")


async def test_the_limit_holds_for_what_is_inflated(served: Served) -> None:
    for size, status in ((MAX_BODY_BYTES, 200), (MAX_BODY_BYTES + 1, 413), (300 << 20, 413)):
        padded = gzip.compress(UTF_8 + b" " * (size - len(UTF_8)), 1)
        assert (
            len(padded) > MAX_BODY_BYTES
            or (await served.post_raw(padded, content_encoding="gzip")).status_code == status
        )
    bombs = gzip.compress(b" " * (1 << 19), mtime=0) * 3
    response = await served.post_raw(bombs, content_encoding="gzip")
    assert (response.status_code, error_of(response)["code"]) == (413, "body_too_large")


@pytest.mark.parametrize(
    "encoding",
    ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"],
)
async def test_other_unicode_encodings_are_decoded(served: Served, encoding: str) -> None:
    check_drawn(served, await served.post_raw(BODY.encode(encoding)))


@pytest.mark.parametrize(
    ("content", "charset", "status", "says"),
    [
        (BODY.encode("utf-16"), "utf-16", 200, ""),
        (UTF_8, "iso-8859-1", 200, ""),  # JSON has no charset, and this is UTF-8 beyond doubt
        ('{"prompt": "grün"}'.encode("latin-1"), "ISO-8859-1", 415, "charset 'iso-8859-1' is not supported"),
        ('{"prompt": "grün"}'.encode("latin-1"), "utf-8", 400, "not valid JSON"),
        ("\ufeff{".encode("utf-16-le") + b"\x00\xd8", "utf-16", 400, "not valid JSON"),
        (b"\xff\xfe\x00\x00\xff\xff\xff\xff", "utf-32", 400, "not valid JSON"),
    ],
)
async def test_charsets(served: Served, content: bytes, charset: str, status: int, says: str) -> None:
    response = await served.post_raw(content, content_type=f'application/json; charset="{charset}"')
    assert response.status_code == status and says in (error_of(response)["message"] if says else "")


@pytest.mark.parametrize(
    ("content_type", "status"),
    [
        ("application/json", 200),
        ("Application/JSON ; charset=utf-8", 200),
        ("application/vnd.api+json", 200),
        ("text/json", 200),
        ("text/plain", 415),
        ("application/x-www-form-urlencoded", 415),
        ("multipart/form-data; boundary=json", 415),
        ("application/jsonp", 415),
        ("", 415),
    ],
)
async def test_json_has_to_be_called_so(served: Served, content_type: str, status: int) -> None:
    response = await served.post_raw(json.dumps({"prompt": "a star"}), content_type=content_type)
    assert response.status_code == status
    if status == 415:
        assert "content-type: must be application/json" in error_of(response)["message"]
