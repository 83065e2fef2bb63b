"""From what a caller asks for to what the engine draws: types settled, bounds checked, defaults filled in.

The one place where a caller's values are looked at. They may come from numpy, torch, pandas or anywhere: a value's own
methods may raise, lie or answer differently each time, so each is asked once, and what it answers is kept as an exact
`int`, `float`, `str` or `tuple`. Nothing behind this module ever meets another type, and all of it can be encoded
for a worker.
"""

import contextlib
import itertools
import operator
import re
import secrets
import uuid
from collections.abc import Callable, Mapping, Set
from typing import Any, TypeVar, get_args

import msgspec

from tetrion.engine.config import EnergyMode
from tetrion.engine.errors import ModelNotFound, RequestError, shown
from tetrion.engine.families.registry import family_of
from tetrion.engine.families.served import ServedModels, serving
from tetrion.engine.model_spec import ModelSpec
from tetrion.engine.params import NO_CFG, Params
from tetrion.engine.pictures import Picture, Pixels, mask_of, read_mask, read_pictures
from tetrion.engine.request import Delivery, EnergyOptions, ImageRequest, ResolvedRequest
from tetrion.engine.shape import Size, StepShape

MAX_PROMPT_CHARS = 32_000
MAX_NAME_CHARS = 256
"""Of `request_id`, `tenant` and `user`."""
MAX_SEED = 2**63 - 1
RANDOM_SEEDS = 2**32
"""Seeds of requests that give none are below this: short enough to be written down."""
MAX_STEPS = 1000
MAX_GUIDANCE = 100
OPTIONAL_INPUTS = ("negative_prompt", "true_cfg_scale", "strength")
"""Fields of a request that not every model takes (`ModelSpec.inputs`); so are `pictures` and `mask`."""
MAX_SLO_MS = 86_400_000
MAX_PRIORITY = 1_000_000
MAX_WEIGHT = 1e6
MAX_BUDGET_J = 1e9

_REAL_DTYPE = re.compile(r"(<dtype: ')?(torch\.)?(u?int|b?float)[0-9]+|[<>=|]?[iuf][0-9]+")
"""What numpy, torch and their like call their whole and real numbers. Their booleans, texts, dates and complex numbers
have `__float__` or `__index__` as well."""

_EXACT = 2**53
"""Below this every whole number is a `float`."""
_ENERGY_KEYS = " and ".join(EnergyOptions.__struct_fields__)

_T = TypeVar("_T")
_Read = Callable[[str, object], _T]


def resolve_request(request: ImageRequest | str, models: ServedModels | ModelSpec, num_devices: int) -> ResolvedRequest:
    """The request in exact builtin types with every default filled in, checked against the model; a string is a prompt
    with all defaults. Without a seed it gets a random one, without an id a new one, without a model the first.

    `models`: all that there are, or the only one.

    Raises RequestError (ModelNotFound for the name of none of them).
    """
    if issubclass(type(request), str):
        request = ImageRequest(prompt=request)  # type: ignore[arg-type]
    if not issubclass(type(request), ImageRequest):
        raise RequestError("request", f"must be an ImageRequest or a prompt, got {shown(request)}")
    asked = _Fields(request, "")
    served = serving(models) if isinstance(models, ModelSpec) else models
    spec = asked.read_optional("model", _model_of(served)) or served.default
    prompt = asked.read("prompt", _prompt)
    negative_prompt = asked.read_optional("negative_prompt", _negative_prompt)
    pictures = asked.read("pictures", _pictures_of(spec), ())
    default = _default_size(spec, pictures)
    width = asked.read("width", _side_of(spec), default[0])
    height = asked.read("height", _side_of(spec), default[1])
    mask = asked.read_optional("mask", _mask_of(spec, pictures, (width, height)))
    if mask is None and pictures and "mask" in spec.inputs:
        mask = mask_of(pictures[0].resized((width, height)))
    strength = asked.read_optional("strength", _real_above_0(1))
    num_steps = asked.read("num_steps", _whole_from(1, MAX_STEPS), spec.num_steps)
    guidance = asked.read("guidance", _real_from(0, MAX_GUIDANCE), spec.guidance)
    true_cfg_scale = asked.read_optional("true_cfg_scale", _real_from(0, MAX_GUIDANCE))
    seed = asked.read_optional("seed", _whole_from(0, MAX_SEED))
    seed = secrets.randbelow(RANDOM_SEEDS) if seed is None else seed
    slo_ms = asked.read_optional("slo_ms", _real_above_0(MAX_SLO_MS, " (a day)"))
    priority = asked.read("priority", _whole_from(-MAX_PRIORITY, MAX_PRIORITY), 0)
    weight = asked.read("weight", _real_above_0(MAX_WEIGHT), 1.0)
    tenant = asked.read("tenant", _name, "")
    user = asked.read("user", _name, "")
    energy = asked.read("energy", _energy, EnergyOptions())
    settled = ImageRequest(
        prompt=prompt,
        negative_prompt=negative_prompt,
        model=spec.name,
        width=width,
        height=height,
        num_steps=num_steps,
        guidance=guidance,
        true_cfg_scale=true_cfg_scale,
        pictures=_sized(spec, pictures, (width, height)),
        mask=mask,
        strength=spec.strength if strength is None and pictures else strength,
        seed=seed,
        slo_ms=slo_ms,
        priority=priority,
        weight=weight,
        tenant=tenant,
        user=user,
        energy=energy,
        delivery=asked.read_optional("delivery", _delivery),
        request_id=asked.read("request_id", _request_id, "") or uuid.uuid4().hex,
    )
    shape = _shape(settled, spec)
    skipped = skipped_steps(settled)
    num_steps -= skipped
    legal = spec.legal_degrees(num_devices, shape.num_branches)
    force_degrees = asked.read("force_degrees", _degrees_of(legal, num_steps), ())
    if force_degrees and energy != EnergyOptions():
        raise RequestError("energy", "cannot be given with force_degrees, which leave nothing to choose")
    params = Params(
        model=spec.name,
        shape=shape,
        num_steps=num_steps,
        skipped_steps=skipped,
        guidance=guidance,
        true_cfg_scale=NO_CFG if true_cfg_scale is None else true_cfg_scale,
        seed=seed,
    )
    return ResolvedRequest(asked=msgspec.structs.replace(settled, force_degrees=force_degrees), params=params)


def _shape(settled: ImageRequest, spec: ModelSpec) -> StepShape:
    """As the model's family makes it, with the pictures. Raises RequestError for what the model does not take."""
    for field in OPTIONAL_INPUTS:
        if getattr(settled, field) is not None:
            _check_input(field, spec)
    if settled.strength is not None and not settled.pictures:
        raise RequestError("strength", "takes a picture to go with it (pictures)")
    family = family_of(spec.family)
    family.check(spec, settled)
    shape = family.shape(spec, settled)
    sizes = tuple([picture.size for picture in settled.pictures])
    if spec.takes_references:
        rows = sum([spec.sizes.num_rows(*size) for size in sizes])
        return msgspec.structs.replace(shape, reference=rows, references=sizes)
    return msgspec.structs.replace(shape, pictures=len(sizes), has_mask=settled.mask is not None)


def _check_input(field: str, spec: ModelSpec) -> None:
    """Raises RequestError."""
    if field not in spec.inputs:
        raise RequestError(field, f"is no input of model {spec.name!r}")


# Pictures ---------------------------------------------------------------------------------------------------------


def decoded(request: ImageRequest, models: ServedModels | ModelSpec, num_devices: int) -> ImageRequest:
    """The same request with its pictures decoded and resized, if it is a good one: for another thread than the event
    loop's, whose `submit` has little left to do then. Raises as `resolve_request`."""
    settled = resolve_request(request, models, num_devices).asked
    return msgspec.structs.replace(request, pictures=settled.pictures, mask=settled.mask, **_size_of(settled))


def _size_of(settled: ImageRequest) -> dict[str, int | None]:
    return {"width": settled.width, "height": settled.height}


def _pictures_of(spec: ModelSpec) -> _Read[tuple[Picture, ...]]:
    def read(field: str, value: object) -> tuple[Picture, ...]:
        if isinstance(value, list | tuple) and not value:
            return ()
        _check_input(field, spec)
        pictures = read_pictures(field, value, spec.max_pictures)
        if (area := spec.reference_area) is not None:
            for picture in pictures:
                if fault := area.fault(picture.size):
                    raise RequestError(field, fault)
        return pictures

    return read


def _default_size(spec: ModelSpec, pictures: tuple[Picture, ...]) -> Size:
    """Of a result that nobody gave a size to: that of the first picture, as far as the model draws it."""
    if not pictures:
        return spec.sizes.default
    size = pictures[0].size
    return spec.sizes.fitted(spec.reference_size(size) if spec.takes_references else size)


def _sized(spec: ModelSpec, pictures: tuple[Picture, ...], size: Size) -> tuple[Picture, ...]:
    """As the model takes them for a result of this size."""
    if not spec.takes_references:
        return tuple([picture.resized(size) for picture in pictures])
    return tuple([_reference(spec, picture) for picture in pictures])


def _reference(spec: ModelSpec, picture: Picture) -> Picture:
    """As the model takes it."""
    size = spec.reference_size(picture.size)
    scaled = size if spec.reference_area is None else spec.reference_area.scaled(picture.size)
    return picture.resized(scaled).cropped(size)


def _mask_of(spec: ModelSpec, pictures: tuple[Picture, ...], size: Size) -> _Read[Pixels]:
    def read(field: str, value: object) -> Pixels:
        _check_input(field, spec)
        if not pictures:
            raise RequestError(field, "takes a picture to go with it (pictures)")
        return read_mask(field, value, size)

    return read


def skipped_steps(settled: ImageRequest) -> int:
    """Steps of the schedule that lie before the first one: as diffusers counts them. Raises RequestError if none is
    left."""
    num_steps, strength = settled.num_steps, settled.strength
    assert num_steps is not None
    if strength is None:
        return 0
    skipped = int(max(num_steps - min(num_steps * strength, num_steps), 0))
    if skipped == num_steps:
        raise RequestError("strength", f"must leave at least one of {num_steps} steps, got {strength:g}")
    return skipped


# Any value as one of a builtin type -------------------------------------------------------------------------------


def whole_number(field: str, value: object, within: str = "") -> int:
    """What has `__index__` (`int`, numpy's and torch's whole numbers), and real numbers that are whole: tables have
    gaps, and then 3 is written as 3.0. No boolean. `within`: the bounds, for the error. Raises RequestError."""
    if type(value) is int:
        return value
    try:
        if _may_be_number(value):
            return _index_or_whole_real(value)
    except Exception:  # a stranger's method; infinity, NaN
        pass
    raise RequestError(field, f"must be a whole number{within}, got {shown(value)}")


def whole_within(field: str, value: object, low: int, high: int) -> int:
    """A whole number from `low` to `high`. Raises RequestError."""
    number = whole_number(field, value, f" from {low} to {high}")
    if not low <= number <= high:
        raise RequestError(field, f"must be from {low} to {high}, got {shown(number)}")
    return number


def _index_or_whole_real(value: object) -> int:
    """Raises TypeError, ValueError, or whatever a stranger's number does."""
    with contextlib.suppress(TypeError):
        return operator.index(value)  # type: ignore[arg-type]
    if not _is_convertible(type(value)):
        raise TypeError("it is no number")
    real = float(value)  # type: ignore[arg-type]
    if not real.is_integer() or (abs(real) >= _EXACT and not isinstance(value, float)):
        raise ValueError("it has a fraction, or `float` may have rounded it")
    return int(real)


def real_number(field: str, value: object) -> float:
    """What has `__float__` or `__index__`: `float`, `Fraction`, `Decimal`, numpy's and torch's scalars, but no boolean,
    text or complex number. NaN is one, which is within no bounds. Raises RequestError."""
    if type(value) is float:
        return value
    try:
        if _may_be_number(value) and _is_convertible(type(value)):
            return float(value)  # type: ignore[arg-type]
    except Exception:  # a stranger's method, or it is too large
        pass
    raise RequestError(field, f"must be a number, got {shown(value)}")


def text(field: str, value: object, max_chars: int) -> str:
    """A `str`, or what a subclass of it holds. Raises RequestError, also for lone surrogates: they are in no encoding
    (bytes that are not UTF-8 reach Python as such)."""
    if not issubclass(type(value), str):
        raise RequestError(field, f"must be text, got {shown(value)}")
    num_chars = str.__len__(value)  # type: ignore[arg-type]
    if num_chars > max_chars:
        raise RequestError(field, f"has {num_chars} characters, at most {max_chars} are allowed")
    exact = str.__str__(value)
    try:
        exact.encode()
    except UnicodeEncodeError:
        raise RequestError(field, "must be valid Unicode text (UTF-8)") from None
    return exact


def _may_be_number(value: object) -> bool:
    kind = type(value)
    if issubclass(kind, (bool, str, bytes, bytearray)):
        return False
    dtype = getattr(value, "dtype", None)
    return dtype is None or _REAL_DTYPE.fullmatch(str(dtype).removesuffix("'>")) is not None


def _is_convertible(kind: type) -> bool:
    """`float` also reads texts and buffers."""
    return hasattr(kind, "__float__") or hasattr(kind, "__index__")


# Fields -----------------------------------------------------------------------------------------------------------


class _Fields:
    """The fields of a caller's struct, each read once. `prefix`: what errors put before their names."""

    def __init__(self, struct: Any, prefix: str) -> None:
        self._struct, self._prefix = struct, prefix

    def read(self, field: str, as_exact: _Read[_T], default: object = None) -> _T:
        """`default` stands for None, which is "not given", unless it is None itself."""
        value = self._value(field)
        return as_exact(self._prefix + field, default if value is None else value)

    def read_optional(self, field: str, as_exact: _Read[_T]) -> _T | None:
        value = self._value(field)
        return None if value is None else as_exact(self._prefix + field, value)

    def _value(self, field: str) -> object:
        try:
            return getattr(self._struct, field)
        except Exception:  # never set, or a subclass's own
            raise RequestError(self._prefix + field, "cannot be read") from None


def _whole_from(low: int, high: int) -> _Read[int]:
    return lambda field, value: whole_within(field, value, low, high)


def _real_from(low: float, high: float) -> _Read[float]:
    def read(field: str, value: object) -> float:
        number = real_number(field, value)
        if not low <= number <= high:
            raise RequestError(field, f"must be from {low:.10g} to {high:.10g}, got {number}")
        return number

    return read


def _real_above_0(high: float, unit: str = "") -> _Read[float]:
    def read(field: str, value: object) -> float:
        number = real_number(field, value)
        if not 0 < number <= high:
            raise RequestError(field, f"must be above 0 and at most {high:.10g}{unit}, got {number}")
        return number

    return read


def _prompt(field: str, value: object) -> str:
    prompt = text(field, value, MAX_PROMPT_CHARS)
    if not prompt.strip():
        raise RequestError(field, "must not be empty")
    return prompt


def _negative_prompt(field: str, value: object) -> str:
    return text(field, value, MAX_PROMPT_CHARS)


def _model_of(served: ServedModels) -> _Read[ModelSpec]:
    def read(field: str, value: object) -> ModelSpec:
        name = text(field, value, MAX_NAME_CHARS)
        spec = served.find(name)
        if spec is None:
            raise ModelNotFound(name, tuple(served.specs))
        return spec

    return read


def _request_id(field: str, value: object) -> str:
    """It is written to logs: one line, and one that can be found again."""
    name = text(field, value, MAX_NAME_CHARS)
    if name and not (name.isprintable() and name.strip()):
        raise RequestError(field, f"must be printable and not blank, got {shown(name)}")
    return name


def _name(field: str, value: object) -> str:
    return text(field, value, MAX_NAME_CHARS)


def _side_of(spec: ModelSpec) -> _Read[int]:
    def read(field: str, value: object) -> int:
        sizes = spec.sizes
        bounds = f"a multiple of {sizes.multiple} from {sizes.min} to {sizes.max} for model {spec.name!r}"
        pixels = whole_number(field, value, f" and {bounds}")
        if not sizes.accept(pixels):
            raise RequestError(field, f"must be {bounds}, got {shown(pixels)}")
        return pixels

    return read


def _degrees_of(legal: tuple[int, ...], num_steps: int) -> _Read[tuple[int, ...]]:
    def read(field: str, value: object) -> tuple[int, ...]:
        entries = _entries(field, value, num_steps + 1)
        if len(entries) > num_steps:
            raise RequestError(field, f"has more than {num_steps} entries for {num_steps} steps")
        allowed = ", ".join(map(str, legal))
        degrees = tuple([whole_number(field, entry, f" out of {allowed}") for entry in entries])
        for degree in degrees:
            if degree not in legal:
                raise RequestError(field, f"{shown(degree)} is not one of {allowed}")
        return degrees

    return read


def _entries(field: str, value: object, max_entries: int) -> list[object]:
    """The first of a list, tuple, array: of what has an order and a length. What can be read only once would be another
    request the next time. Raises RequestError."""
    try:
        kind = type(value)
        if hasattr(kind, "__len__") and not issubclass(kind, (str, bytes, bytearray, memoryview, Mapping, Set)):
            return list(itertools.islice(value, max_entries))  # type: ignore[call-overload]
    except Exception:  # a stranger's iterator, or none
        pass
    raise RequestError(field, f"must be a sequence of whole numbers, got {shown(value)}")


def _energy(field: str, value: object) -> EnergyOptions:
    """An `EnergyOptions`, or what it is in JSON."""
    if isinstance(value, Mapping):
        value = _energy_of(field, value)
    if not issubclass(type(value), EnergyOptions):
        raise RequestError(field, f"must be an EnergyOptions ({_ENERGY_KEYS}), got {shown(value)}")
    asked = _Fields(value, f"{field}.")
    return EnergyOptions(
        mode=asked.read_optional("mode", _mode),
        budget_j=asked.read_optional("budget_j", _real_above_0(MAX_BUDGET_J)),
    )


def _energy_of(field: str, given: Mapping[Any, Any]) -> EnergyOptions:
    try:
        values = dict(given)
    except Exception:  # a stranger's mapping
        raise RequestError(field, "cannot be read") from None
    for key in values:
        if key not in EnergyOptions.__struct_fields__:
            raise RequestError(field, f"has an unknown key {shown(key)}, known are {_ENERGY_KEYS}")
    return EnergyOptions(**values)


def _mode(field: str, value: object) -> EnergyMode:
    return _one_of(get_args(EnergyMode), field, value)  # type: ignore[return-value]


def _delivery(field: str, value: object) -> Delivery:
    return _one_of(get_args(Delivery), field, value)  # type: ignore[return-value]


def _one_of(names: tuple[str, ...], field: str, value: object) -> str:
    name = text(field, value, MAX_NAME_CHARS)
    if name not in names:
        raise RequestError(field, f"must be one of {', '.join(names)}, got {shown(name)}")
    return name
