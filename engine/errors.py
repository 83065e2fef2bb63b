"""Why a request is refused, fails or ends early: the exceptions of the engine's users."""

import reprlib

import msgspec

MAX_CHARS = 80
MAX_LINE_CHARS = 1000


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
    return _printable(text)


def one_line(text: str) -> str:
    """`text` on a single line of at most `MAX_LINE_CHARS` characters, with nothing that a terminal would obey."""
    line = _printable(text[: MAX_LINE_CHARS + 1])
    return line if len(line) <= MAX_LINE_CHARS else f"{line[: MAX_LINE_CHARS - 3]}..."


def _printable(text: str) -> str:
    return "".join([c if c.isprintable() else " " if c.isspace() else ascii(c)[1:-1] for c in text])


def _beginning(value: object) -> object:
    """Of text and bytes, which may be long, no more than is shown."""
    if issubclass(type(value), str):
        return str.__str__(value)[: MAX_CHARS + 1]
    if issubclass(type(value), (bytes, bytearray)):
        return bytes(value[: MAX_CHARS + 1])  # type: ignore[index]
    return value


class RequestError(ValueError):
    """A request is not acceptable; `field` names what is wrong with it, the message names the bound."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field


class ModelNotFound(RequestError):
    """A request names a model that is not served; `served` are the names of those that are."""

    def __init__(self, name: str, served: tuple[str, ...]) -> None:
        super().__init__("model", f"{shown(name)} is not served here; served: {', '.join(served)}")
        self.served = served


class CheapestPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What an energy budget is refused with. `degrees`: of each step; `seconds` from encode to decode on idle devices;
    `joules` as the profile has them, without the stages in `uncounted`, which it does not know; `in_time`: whether it
    meets the deadline, None if there is none."""

    joules: float
    seconds: float
    degrees: tuple[int, ...]
    uncounted: tuple[str, ...] = ()
    in_time: bool | None = None

    @property
    def text(self) -> str:
        runs = [f"{self.degrees.count(d)} steps at degree {d}" for d in dict.fromkeys(self.degrees)]
        without = f", without {' and '.join(self.uncounted)}, of which no joules are known" if self.uncounted else ""
        what = f"{self.joules:.4g} J in {self.seconds:.3g} s ({', '.join(runs)}{without})"
        if self.in_time is None:
            return f"the cheapest plan takes {what}"
        if self.in_time:
            return f"the cheapest plan that meets the deadline takes {what}"
        return f"the cheapest plan takes {what}, and none meets the deadline"


class BudgetUnmeetable(RequestError):
    """No plan that meets the deadline takes so few joules. `cheapest`: the one that takes least; of those that are late
    if all are."""

    def __init__(self, budget_j: float, cheapest: CheapestPlan) -> None:
        super().__init__("energy.budget_j", f"{budget_j:g} J cannot be met: {cheapest.text}")
        self.cheapest = cheapest


class EngineOverloaded(RuntimeError):
    """The queue is full; try again later."""


class DeadlineUnmeetable(EngineOverloaded):
    """Refused at once, since its picture would come too late. `earliest_slo_ms`: the SLO that could be met now."""

    def __init__(self, slo_ms: float, earliest_slo_ms: float) -> None:
        super().__init__(f"slo_ms: {slo_ms:g} cannot be met now, the earliest that can is {earliest_slo_ms:g}")
        self.earliest_slo_ms = earliest_slo_ms


class GenerationError(RuntimeError):
    """An accepted request could not be served (worker lost, out of memory, ...)."""


class QueueTimeout(GenerationError):
    """The request has waited for a state slot as long as `EngineConfig.queue_timeout_s` allows."""


class Displaced(GenerationError):
    """The queue was full, and the request's place there went to one of a tenant that had fewer."""


class EngineEnded(GenerationError):
    """The engine gave itself up: it could not serve, and did not expect to any more. The message says why."""


class RequestCancelled(Exception):
    """The request was cancelled before its picture was finished."""
