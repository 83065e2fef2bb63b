"""Forms: what was put in comes out, and what is no form is refused, whatever it is."""

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tetrion.entrypoints.http.multipart import MAX_PARTS, MalformedForm, parse_form

TYPE = "multipart/form-data; boundary=x-y"
QUOTED = '"\\%'
names = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc"), exclude_characters=QUOTED), min_size=1)
files = st.lists(st.tuples(names, st.binary(max_size=200)), min_size=1, max_size=8)


def form(*parts: bytes, end: bytes = b"--x-y--\r\n") -> bytes:
    return b"".join(b"--x-y\r\n" + part + b"\r\n" for part in parts) + end


def part(name: str = "a", data: bytes = b"1", *, more: str = "") -> bytes:
    return f'Content-Disposition: form-data; name="{name}"{more}\r\n\r\n'.encode() + data


@given(files)
def test_what_httpx_sends_is_read(sent: list[tuple[str, bytes]]) -> None:
    request = httpx.Request("POST", "http://a/", files=[(name, ("f.png", data)) for name, data in sent])
    parts = parse_form(request.headers["content-type"], request.read())
    assert [(p.name, bytes(p.data), p.is_file) for p in parts] == [(name, data, True) for name, data in sent]


@given(st.lists(st.binary(max_size=100), min_size=1, max_size=8))
def test_data_may_hold_anything_but_its_boundary(datas: list[bytes]) -> None:
    datas = [data for data in datas if b"\r\n--x-y" not in b"\r\n" + data]
    if datas:
        parts = parse_form(TYPE, form(*[part("p", data) for data in datas]))
        assert [bytes(p.data) for p in parts] == datas


@given(st.binary(max_size=300), st.sampled_from([TYPE, "multipart/form-data", "multipart/form-data; boundary="]))
def test_any_bytes_are_read_or_refused(body: bytes, content_type: str) -> None:
    for tried in (body, b"--x-y\r\n" + body, form(body), form(part("a", body), end=body)):
        try:
            parse_form(content_type, tried)
        except MalformedForm as error:
            assert str(error).isprintable()


def test_names_and_file_names() -> None:
    body = b"preamble\r\n" + form(
        part("a"), part("b[]", b"", more='; filename="x.png"\r\nContent-Type: image/png'), part(r"q\"r", b"\r\n--x")
    )
    assert [(p.name, bytes(p.data), p.is_file) for p in parse_form(TYPE, body)] == [
        ("a", b"1", False), ("b[]", b"", True), ('q"r', b"\r\n--x", False),
    ]  # fmt: skip
    quoted = 'multipart/form-data; charset=utf-8; boundary="x-y"'
    assert parse_form(quoted, form(part()))[0].name == "a"


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "boundary is nowhere"),
        (form(part(), end=b""), "last part does not end"),
        (b"--x-yz\r\n" + part() + b"\r\n--x-y--", "something follows its boundary"),
        (form(b"no head"), "head does not end"),
        (form(b"Content-Disposition: form-data\r\n\r\n1"), "no form-data with a name"),
        (form(b'Content-Disposition: attachment; name="a"\r\n\r\n1'), "no form-data with a name"),
        (form(part(more='; name="b"')), "parameters cannot be read"),
        (form(part(more="\r\nContent-Disposition: form-data")), "no field, or one twice"),
        (form(part(more="\r\nContent-Transfer-Encoding: base64")), "content-transfer-encoding is not supported"),
        (form(b"A: " + b"a" * 5000 + b"\r\n\r\n1"), "head does not end within 4096 bytes"),
        (form(*[part()] * (MAX_PARTS + 1)), "more than 64 parts"),
        (form(b'Content-Disposition: form-data; name="\xff"\r\n\r\n1'), "not UTF-8"),
    ],
)
def test_what_is_no_form_is_refused(body: bytes, says: str) -> None:
    with pytest.raises(MalformedForm, match=says):
        parse_form(TYPE, body)


@pytest.mark.parametrize("boundary", ["", "a" * 71, "é", "a\tb", "a;b"])
def test_boundaries_have_bounds(boundary: str) -> None:
    with pytest.raises(MalformedForm, match=r"boundary|cannot be read"):
        parse_form(f'multipart/form-data; boundary="{boundary}"', form(part()))
