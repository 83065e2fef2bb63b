"""Values of unknown type in messages: short, on one line, printable, whatever the value does when it is asked."""

import reprlib

MAX_CHARS = 80

_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = MAX_CHARS


def shown(value: object) -> str:
    """`repr(value)`, cut to `MAX_CHARS` characters or so; of a value that cannot be shown its type."""
    try:
        text = _short.repr(_beginning(value))
    except Exception:  # its `__repr__` is a stranger's, and a whole number of thousands of digits has none
        text = f"a value of type {type(value).__name__}"
    if len(text) > 2 * MAX_CHARS:
        text = f"{text[: 2 * MAX_CHARS]}..."
    return "".join([c if c.isprintable() else " " if c.isspace() else ascii(c)[1:-1] for c in text])


def _beginning(value: object) -> object:
    """Of text and bytes, which may be long, no more than is shown."""
    if issubclass(type(value), str):
        return str.__str__(value)[: MAX_CHARS + 1]
    if issubclass(type(value), (bytes, bytearray)):
        return bytes(value[: MAX_CHARS + 1])  # type: ignore[index]
    return value
