"""Text of other programs: which Unicode encoding it is in, whether it is compressed. Knows no sockets."""

import gzip
import json
import zlib

GZIP_MAGIC = b"\x1f\x8b"


def as_utf8(data: bytes) -> bytes:
    """`data` in UTF-8 without a byte order mark. UTF-16 and UTF-32 are told by their marks, or by the zero bytes of
    their first two characters, which are ASCII in JSON (RFC 4627). What is taken for UTF-8 is not looked at.

    Raises UnicodeDecodeError for what is not what it looks like."""
    encoding = json.detect_encoding(data)
    if encoding in ("utf-8", "utf-8-sig"):
        return data.removeprefix(b"\xef\xbb\xbf")
    return data.decode(encoding).encode()


def inflated(data: bytes) -> bytes:
    """A file's content, as it was before it was compressed with gzip, if it was. Raises ValueError."""
    if not data.startswith(GZIP_MAGIC):
        return data
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"it is not what gzip writes: {error}") from None
