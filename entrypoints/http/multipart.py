"""A body of multipart/form-data (RFC 7578, RFC 2046) as its parts: views of the body, nothing is copied or written.

Owns the syntax; what a field means is `edits.py`'s. What is not as the RFCs have it is refused, not guessed.
"""

import re
from typing import NamedTuple

from tetrion.engine.errors import shown

FORM_TYPE = "multipart/form-data"
MAX_PARTS = 64
MAX_HEAD_BYTES = 4096
"""Of a part."""
CRLF = b"\r\n"
_BOUNDARY = re.compile(r"""[0-9A-Za-z'()+_,\-./:=? ]{0,69}[0-9A-Za-z'()+_,\-./:=?]""")
_PARAMETER = re.compile(r""";\s*([!#$%&'*+.^_`|~0-9A-Za-z-]+)\s*=\s*("(?:[^"\\]|\\.)*"|[^\s;"]*)\s*""")
_PLAIN_ENCODINGS = ("7bit", "8bit", "binary")


class MalformedForm(ValueError):
    """It is no multipart/form-data; the message says what is wrong."""


class FormPart(NamedTuple):
    """`is_file`: it has a file name, which counts for nothing else."""

    name: str
    data: memoryview
    is_file: bool


def parse_form(content_type: str, body: bytes) -> list[FormPart]:
    """In their order. `content_type`: the header. Raises MalformedForm."""
    delimiter = b"--" + _boundary_of(content_type)
    view, parts = memoryview(body), list[FormPart]()
    position = _first(body, delimiter)
    while True:
        position = _end_of_line(body, position)
        head_end = body.find(CRLF + CRLF, position, position + MAX_HEAD_BYTES)
        if head_end < 0:
            raise MalformedForm(f"a part's head does not end within {MAX_HEAD_BYTES} bytes")
        start = head_end + 2 * len(CRLF)
        end = body.find(CRLF + delimiter, start)
        if end < 0:
            raise MalformedForm("its last part does not end")
        if len(parts) == MAX_PARTS:
            raise MalformedForm(f"it has more than {MAX_PARTS} parts")
        name, is_file = _described(body[position:head_end])
        parts.append(FormPart(name, view[start:end], is_file))
        position = end + len(CRLF) + len(delimiter)
        if body[position : position + 2] == b"--":
            return parts


def _boundary_of(content_type: str) -> bytes:
    boundary = _parameters(content_type).get("boundary", "")
    if not _BOUNDARY.fullmatch(boundary):
        raise MalformedForm(f"its content-type has no boundary, or none that can be one: {shown(boundary)}")
    return boundary.encode("ascii")


def _first(body: bytes, delimiter: bytes) -> int:
    """Behind the first delimiter, before which there may be anything."""
    if body.startswith(delimiter):
        return len(delimiter)
    found = body.find(CRLF + delimiter)
    if found < 0:
        raise MalformedForm("its boundary is nowhere in it")
    return found + len(CRLF) + len(delimiter)


def _end_of_line(body: bytes, position: int) -> int:
    """Behind the end of a delimiter's line, which may have blanks at its end."""
    end = body.find(CRLF, position, position + MAX_HEAD_BYTES)
    if end < 0 or body[position:end].strip(b" \t"):
        raise MalformedForm("something follows its boundary on the same line")
    return end + len(CRLF)


def _described(head: bytes) -> tuple[str, bool]:
    """A part's name, and whether it is a file."""
    fields: dict[str, str] = {}
    for line in head.split(CRLF):
        name, colon, value = _text(line).partition(":")
        if not colon or name.lower() in fields:
            raise MalformedForm(f"a part's head has a line that is no field, or one twice: {shown(_text(line))}")
        fields[name.lower()] = value.strip()
    disposition = fields.get("content-disposition", "")
    parameters = _parameters(disposition)
    if disposition.partition(";")[0].strip().lower() != "form-data" or "name" not in parameters:
        raise MalformedForm(f"a part is no form-data with a name: {shown(disposition)}")
    encoding = fields.get("content-transfer-encoding", "binary").lower()
    if encoding not in _PLAIN_ENCODINGS:
        raise MalformedForm(f"a part's content-transfer-encoding is not supported: {shown(encoding)}")
    return parameters["name"], "filename" in parameters or "filename*" in parameters


def _parameters(value: str) -> dict[str, str]:
    """Of a header's value, behind its first semicolon."""
    found: dict[str, str] = {}
    position = value.find(";")
    while 0 <= position < len(value):
        match = _PARAMETER.match(value, position)
        if match is None or match[1].lower() in found:
            raise MalformedForm(f"a header's parameters cannot be read: {shown(value)}")
        found[match[1].lower()] = _unquoted(match[2])
        position = match.end()
    return found


def _unquoted(value: str) -> str:
    return re.sub(r"\\(.)", r"\1", value[1:-1]) if value.startswith('"') else value


def _text(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise MalformedForm("a part's head is not UTF-8") from None
