"""Whatever a caller asks for: refused with the name of its field, or settled as exact builtin types."""

import decimal
import enum
import fractions
import types
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.engine.specs import make_spec
from tetrion.engine.errors import RequestError
from tetrion.engine.request import EnergyOptions, ImageRequest
from tetrion.engine.resolve import resolve_request

SPEC = make_spec()


def test_defaults_come_from_the_model() -> None:
    resolved = resolve_request(ImageRequest(prompt="a star"), SPEC, 4)
    asked, params = resolved.asked, resolved.params
    assert (asked.width, asked.height, asked.num_steps, asked.guidance) == (256, 256, 12, 0.0)
    assert (params.model, params.shape.size, params.num_steps, params.guidance) == ("tiny", (256, 256), 12, 0.0)
    assert params.seed == asked.seed and asked.request_id
    again = resolve_request(ImageRequest(prompt="a star"), SPEC, 4)
    assert again.asked.request_id != asked.request_id and again.params.seed != params.seed


@pytest.mark.parametrize(
    ("fields", "field", "bound"),
    [
        ({"prompt": "  "}, "prompt", "empty"),
        ({"prompt": "x" * 32_001}, "prompt", "32000"),
        ({"width": 250}, "width", "multiple of 16"),
        ({"height": 528}, "height", "512"),
        ({"width": 112}, "width", "128"),
        ({"num_steps": 0}, "num_steps", "1000"),
        ({"num_steps": 1001}, "num_steps", "1000"),
        ({"guidance": -1.0}, "guidance", "100"),
        ({"guidance": float("nan")}, "guidance", "100"),
        ({"seed": -1}, "seed", "0"),
        ({"seed": 2**63}, "seed", str(2**63 - 1)),
        ({"slo_ms": 0.0}, "slo_ms", "above 0"),
        ({"slo_ms": float("nan")}, "slo_ms", "above 0"),
        ({"priority": 10**7}, "priority", "1000000"),
        ({"weight": 0.0}, "weight", "above 0"),
        ({"force_degrees": (5,)}, "force_degrees", "1, 2, 3, 4"),
        ({"force_degrees": (1, 2, 1), "num_steps": 2}, "force_degrees", "2 steps"),
    ],
)
def test_bad_input_names_the_field_and_the_bound(fields: dict[str, object], field: str, bound: str) -> None:
    with pytest.raises(RequestError, match=bound) as caught:
        resolve_request(ImageRequest(**({"prompt": "x"} | fields)), SPEC, 4)  # type: ignore[arg-type]
    assert caught.value.field == field and str(caught.value).startswith(f"{field}: ")


class Shout(str):
    """Says of itself what it does not hold."""

    def __str__(self) -> str:
        return "nonsense"

    def __len__(self) -> int:
        return 0

    def strip(self, chars: str | None = None, /) -> str:
        raise OSError("no")

    def encode(self, encoding: str = "utf-8", errors: str = "strict") -> bytes:
        return b""


class Colour(enum.StrEnum):
    RED = "a red circle"


class Raises:
    """Whoever touches it gets an error, in messages too."""

    def _no(self, *_: object) -> Any:
        raise ZeroDivisionError("no")

    __index__ = __float__ = __int__ = __len__ = __iter__ = __str__ = __repr__ = __eq__ = __lt__ = __getattr__ = _no  # type: ignore[assignment]
    __hash__ = None  # type: ignore[assignment]


class Answers:
    """`__index__` and `__float__` answer what they were given, one after the other."""

    def __init__(self, *answers: object) -> None:
        self.answers = list(answers)

    def __index__(self) -> Any:
        return self.answers.pop(0)

    def __float__(self) -> Any:
        return self.answers.pop(0)


class Pretends:
    """Calls itself an int."""

    __class__ = int  # type: ignore[assignment]


class Loud:
    def __repr__(self) -> str:
        return "\ud83d\n" * 500_000


class Endless(list[int]):
    def __iter__(self) -> Any:
        while True:
            yield 1


class MyRequest(ImageRequest):
    note: str = ""

    def __getattribute__(self, name: str) -> Any:
        if name == "seed":
            raise OSError("no")
        return super().__getattribute__(name)


class Plain(ImageRequest):
    note: str = ""


WHOLE = [7, np.int8(7), np.uint64(7), np.array(7), torch.tensor(7), torch.tensor(7, dtype=torch.uint8)]
REAL = [
    *WHOLE,
    7.0,
    np.float16(7),
    np.float64(7),
    np.array(7.0, ">f8"),
    torch.tensor(7.0, dtype=torch.bfloat16),
    torch.tensor(7.0, requires_grad=True),
    fractions.Fraction(14, 2),
    decimal.Decimal(7),
]
NO_NUMBERS: list[object] = [
    True,
    np.bool_(True),
    np.array(True),
    torch.tensor(True),
    "7",
    b"7",
    bytearray(b"7"),
    memoryview(b"7"),
    np.str_("7"),
    np.array("7"),
    np.bytes_(b"7"),
    np.array(7, dtype=object),
    np.datetime64("2020"),
    np.timedelta64(7, "s"),
    7j,
    np.complex64(7),
    np.array(7 + 0j),
    torch.tensor(7 + 0j),
    [7],
    (7,),
    {7: 7},
    {7},
    iter([7]),
    np.array([7]),
    np.array([7, 7]),
    torch.tensor([7, 7]),
    pd.NA,
    pd.NaT,
    pd.Timestamp(7),
    object(),
    int,
    len,
    Raises(),
    Raises,
    Pretends(),
    Loud(),
    Answers("7"),
    Answers(None),
    types.SimpleNamespace(dtype="float32"),
    msgspec.UNSET,
    float("nan"),
    np.float32("nan"),
    decimal.Decimal("nan"),
    decimal.Decimal("snan"),
    torch.tensor(float("nan")),
    2**70,
    10**5000,
    -(2**70),
    np.uint64(2**64 - 1),
    float("inf"),
    -np.inf,
    fractions.Fraction(10**400),
    decimal.Decimal("1e999"),
]
WHOLE_REAL = [256.0, np.float32(256), torch.tensor(256.0), fractions.Fraction(256), decimal.Decimal("256.0")]
NO_WHOLE_NUMBERS = [
    *NO_NUMBERS,
    256.5,
    np.float64(256.5),
    torch.tensor(256.5),
    fractions.Fraction(513, 2),
    decimal.Decimal("256.5"),
    decimal.Decimal(2**53 + 1),
    np.float32(1e30),
    1e300,
]
NO_TEXTS: list[object] = [
    7,
    b"a star",
    bytearray(b"a star"),
    ["a star"],
    ("a star",),
    Path("a star"),
    {"prompt": "a star"},
    np.array("a star"),
    np.bytes_(b"a star"),
    object(),
    Raises(),
    Loud(),
    pd.NA,
    float("nan"),
    str,
    "a \ud83d star",
    np.str_("a \udcff star"),
    "x" * 10_000_000,
    Shout("x" * 10_000_000),
]
NO_DEGREES: list[object] = [
    "12",
    b"\x01\x02",
    bytearray(b"\x01"),
    memoryview(b"\x01"),
    {1: 2},
    {1, 2},
    iter([1, 2]),
    (degree for degree in (1, 2)),
    [[1], [2]],
    [(1,)],
    np.array([[1, 2], [1, 2]]),
    np.array(1),
    np.array([1.5]),
    np.array([True]),
    ["1"],
    [None],
    [1.5],
    [True],
    [Raises()],
    [2**70],
    [10**5000],
    1,
    object(),
    list,
    Raises(),
    Endless(),
    range(1, 10**9),
]
NO_WISHES: list[object] = [
    "fastest",
    {"modes": "fastest"},
    {1: 2},
    {"mode": "fastest", "budget": 5},
    [("mode", "fastest")],
    b"",
    7,
    ImageRequest(prompt="x"),
    EnergyOptions,
    Raises(),
]
NO_REQUESTS: list[object] = [
    None,
    7,
    b"a star",
    Path("a star"),
    {"prompt": "a star"},
    ["a star"],
    EnergyOptions(),
    Raises(),
    Loud(),
    ImageRequest,
]


def settled(**fields: Any) -> ImageRequest:
    return resolve_request(ImageRequest(**({"prompt": "a star"} | fields)), SPEC, 4).asked


def is_exact(value: object) -> bool:
    """Whether nothing but builtin types is in there."""
    if type(value) is tuple:
        return all([type(entry) is int for entry in value])
    if type(value) is EnergyOptions:
        return is_exact(value.mode) and is_exact(value.budget_j)
    return value is None or type(value) in (int, float, str)


def check_exact(request: ImageRequest) -> None:
    assert type(request) is ImageRequest
    for field in ImageRequest.__struct_fields__:
        assert is_exact(getattr(request, field)), field
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(request), type=ImageRequest) == request


def refusal(field: str, value: object) -> RequestError:
    where, _, part = field.partition(".")
    wish = {part: value}
    given = EnergyOptions(**wish) if part else value  # type: ignore[arg-type]
    with pytest.raises(RequestError) as caught:
        settled(**{where: given})
    message = str(caught.value)
    assert caught.value.field == field and message.startswith(f"{field}: ")
    assert len(message) < 500 and message.isprintable()
    return caught.value


@pytest.mark.parametrize("field", ["width", "height", "num_steps", "seed", "priority"])
def test_whole_numbers_of_any_library_are_taken_by_their_index(field: str) -> None:
    for seven in [*WHOLE, Answers(7)]:
        number = seven if field in ("num_steps", "seed", "priority") else Answers(256)
        request = settled(**{field: number})
        check_exact(request)
        assert getattr(request, field) in (7, 256)


@pytest.mark.parametrize("field", ["width", "height", "num_steps", "seed", "priority"])
def test_a_real_number_that_is_whole_is_taken_as_a_whole_one(field: str) -> None:
    for number in WHOLE_REAL:
        request = settled(**{field: number})
        check_exact(request)
        assert getattr(request, field) == 256
    assert settled(seed=-0.0).seed == 0 and settled(seed=1e18).seed == 10**18
    assert settled(num_steps=2, force_degrees=[1.0, np.float64(2)]).force_degrees == (1, 2)


def test_a_fraction_is_refused_with_the_bounds() -> None:
    assert str(refusal("num_steps", 3.5)) == "num_steps: must be a whole number from 1 to 1000, got 3.5"
    assert "must be a whole number and a multiple of 16 from" in str(refusal("width", 256.5))


@pytest.mark.parametrize("field", [name for name in ImageRequest.__struct_fields__ if name != "prompt"])
def test_none_is_the_default(field: str) -> None:
    fixed = {"seed": 1, "request_id": "a"} | {field: None}
    left_out = {name: value for name, value in fixed.items() if value is not None}
    same = {"seed", "request_id"} - left_out.keys()  # made anew each time
    given, default = settled(**fixed), settled(**left_out)
    assert all(getattr(given, name) == getattr(default, name) for name in given.__struct_fields__ if name not in same)


def test_energy_may_be_as_json_has_it() -> None:
    wish = {"mode": "balanced", "budget_j": 50}
    assert settled(energy=wish).energy == EnergyOptions(mode="balanced", budget_j=50.0)
    assert settled(energy={}).energy == settled(energy={"mode": None}).energy == EnergyOptions()
    assert "known are mode and budget_j" in str(refusal("energy", {"joules": 5}))


@pytest.mark.parametrize("field", ["guidance", "slo_ms", "weight", "energy.budget_j"])
def test_real_numbers_of_any_library_are_taken_as_floats(field: str) -> None:
    where, _, part = field.partition(".")
    for seven in [*REAL, Answers(7.0)]:
        given = EnergyOptions(budget_j=seven) if part else seven  # type: ignore[arg-type]
        request = settled(**{where: given})
        check_exact(request)
        assert (request.energy.budget_j if part else getattr(request, where)) == 7.0


@pytest.mark.parametrize("field", ["width", "height", "num_steps", "seed", "priority"])
def test_what_is_no_whole_number_within_bounds_is_refused(field: str) -> None:
    for value in NO_WHOLE_NUMBERS:
        refusal(field, value)


@pytest.mark.parametrize("field", ["guidance", "slo_ms", "weight", "energy.budget_j"])
def test_what_is_no_real_number_within_bounds_is_refused(field: str) -> None:
    for value in NO_NUMBERS:
        refusal(field, value)


@pytest.mark.parametrize("field", ["prompt", "tenant", "user", "request_id"])
def test_what_is_no_text_is_refused(field: str) -> None:
    for value in [*NO_TEXTS, *[None] * (field == "prompt")]:
        refusal(field, value)


def test_texts_of_any_library_are_taken_for_what_they_hold() -> None:
    for prompt in (np.str_("a red circle"), Colour.RED, Shout("a red circle")):
        request = settled(prompt=prompt, tenant=prompt, user=prompt, request_id=prompt)
        check_exact(request)
        assert request.prompt == request.tenant == request.user == request.request_id == "a red circle"
        assert resolve_request(prompt, SPEC, 4).asked.prompt == "a red circle"


@pytest.mark.parametrize("name", ["x" * 257, " ", "\t", "a\nb", "a\0b", "\x1b[31m"])
def test_request_ids_fit_into_a_line_of_a_log(name: str) -> None:
    refusal("request_id", name)


def test_tenants_are_at_most_256_characters() -> None:
    assert settled(tenant="é" * 256).tenant == "é" * 256
    refusal("tenant", "é" * 257)
    refusal("user", "é" * 257)


def test_what_is_no_sequence_of_degrees_is_refused() -> None:
    for value in NO_DEGREES:
        refusal("force_degrees", value)


@pytest.mark.parametrize(
    "degrees",
    [[1, 2], (1, 2), range(1, 3), np.array([1, 2]), np.array([1, 2], np.uint8), torch.tensor([1, 2]), [np.int64(1), 2]],
)
def test_sequences_of_degrees_become_tuples(degrees: Any) -> None:
    request = settled(force_degrees=degrees)
    check_exact(request)
    assert request.force_degrees == (1, 2)
    assert settled(force_degrees=[]).force_degrees == settled(force_degrees=np.array([], int)).force_degrees == ()


def test_what_is_no_energy_wish_is_refused() -> None:
    for value in NO_WISHES:
        refusal("energy", value)


def test_what_is_no_energy_mode_is_refused() -> None:
    for value in ("", "FASTEST", 7, b"fastest", ["fastest"], Raises(), np.array("fastest"), "\ud83d"):
        refusal("energy.mode", value)


def test_what_is_no_request_is_refused() -> None:
    for value in NO_REQUESTS:
        with pytest.raises(RequestError, match="must be an ImageRequest or a prompt") as caught:
            resolve_request(value, SPEC, 4)  # type: ignore[arg-type]
        assert caught.value.field == "request" and len(str(caught.value)) < 500


def test_subclasses_of_requests_are_taken_for_their_fields() -> None:
    check_exact(resolve_request(Plain(prompt="a star", note="mine"), SPEC, 4).asked)
    with pytest.raises(RequestError, match="seed: cannot be read"):
        resolve_request(MyRequest(prompt="a star"), SPEC, 4)


def test_a_value_is_asked_once() -> None:
    check_exact(settled(seed=Answers(1), num_steps=Answers(2), guidance=Answers(3.0), weight=Answers(4.0)))


def test_defaults_are_settled_once_and_for_all() -> None:
    request = settled()
    check_exact(request)
    assert resolve_request(request, SPEC, 4).asked == request


MISFITS = NO_TEXTS + NO_DEGREES + NO_WHOLE_NUMBERS
ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-5, 1100),
    st.floats(),
    st.complex_numbers(),
    st.fractions(),
    st.decimals(),
    st.text(st.characters(), max_size=300),
    st.binary(max_size=20),
    st.lists(st.one_of(st.integers(0, 5), st.floats(), st.text(max_size=3)), max_size=20),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=3),
    st.integers(0, 300).map(np.int64),
    st.floats(0, 100).map(np.float32),
    st.floats(0, 100).map(torch.tensor),
    st.sampled_from([256, 512, "fastest", "a star"]),
    st.integers(0, len(MISFITS) - 1).map(lambda number: MISFITS[number]),
    st.builds(dict, a=st.integers()),
)
WISHES = st.one_of(ANYTHING, st.builds(EnergyOptions, mode=ANYTHING, budget_j=ANYTHING))


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(st.data())
def test_anything_is_refused_by_its_field_or_settled_as_what_a_worker_can_be_sent(data: st.DataObject) -> None:
    names = data.draw(st.lists(st.sampled_from(ImageRequest.__struct_fields__), min_size=1, max_size=3, unique=True))
    fields = {name: data.draw(WISHES if name == "energy" else ANYTHING) for name in names}
    try:
        request = settled(**fields)
    except RequestError as error:
        assert error.field.split(".")[0] in names and str(error).isprintable() and len(str(error)) < 500
    else:
        check_exact(request)
