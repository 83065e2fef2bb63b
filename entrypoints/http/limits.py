"""What the operator allows one request, and all that wait together.

`RequestLimits` bounds pictures, steps and pixels; a request beyond one is answered 400, naming field and bound.
`Waiting` counts what requests hold while they wait: bytes of their bodies and prompts, and their number.

What all hold together is shared by a dynamic threshold (Choudhury and Hahne 1998): a tenant may hold up to eight times
what is left. So one alone leaves a ninth to those that come, two leave a seventeenth.
"""

import sys
from collections import Counter

import msgspec

from tetrion.engine.request import ImageRequest
from tetrion.entrypoints.http.errors import ApiError

RETRY_AFTER_S = 1
TIMES_WHAT_IS_LEFT = 8


class RequestLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Most pictures a request, steps and pixels a picture; None: as many as the model draws."""

    max_n: int | None = None
    max_steps: int | None = None
    max_pixels: int | None = None

    def check(self, request: ImageRequest, n: int) -> None:
        """`request`: one of `n`, as the engine has settled it. Raises ApiError (400)."""
        width, height, num_steps = request.width or 0, request.height or 0, request.num_steps or 0
        if self.max_n is not None and n > self.max_n:
            raise _beyond("n", f"{self.max_n} pictures a request", n)
        if self.max_steps is not None and num_steps > self.max_steps:
            raise _beyond("num_inference_steps", f"{self.max_steps} steps", num_steps)
        if self.max_pixels is not None and width * height > self.max_pixels:
            raise _beyond("size", f"{self.max_pixels} pixels", f"{width}x{height}")


def _beyond(param: str, bound: str, got: object) -> ApiError:
    return ApiError(400, f"{param}: this server draws at most {bound}, got {got}", param=param, code="limit_exceeded")


class Shared:
    """Something that there is so much of, held by tenants. `at_most` None: any amount."""

    def __init__(self, at_most: int | None) -> None:
        self.at_most, self.held = at_most, 0
        self._held_by: Counter[str] = Counter()

    def has(self, more: int, tenant: str) -> bool:
        if self.at_most is None:
            return True
        return self.at_most - self.held - more >= self._held_by[tenant] // TIMES_WHAT_IS_LEFT

    def add(self, more: int, tenant: str) -> None:
        self.held += more
        self._held_by[tenant] += more
        if not self._held_by[tenant]:
            del self._held_by[tenant]


class Waiting:
    """All requests that are being read or wait for their pictures."""

    def __init__(self, max_bytes: int, max_requests: int | None = None) -> None:
        self.bytes, self.requests = Shared(max_bytes), Shared(max_requests)

    def enter(self, tenant: str = "") -> "Held":
        """To be left with `Held.release`."""
        return Held(self, tenant)


class Held:
    """What one request holds."""

    def __init__(self, waiting: Waiting, tenant: str) -> None:
        self._waiting, self._tenant = waiting, tenant
        self._num_bytes = 0
        self._is_counted = False

    def hold(self, num_bytes: int) -> None:
        """So many bytes instead of those before. Raises ApiError (503) if too many were held then."""
        all_bytes, more = self._waiting.bytes, num_bytes - self._num_bytes
        if more > 0 and not all_bytes.has(more, self._tenant):
            raise ApiError(
                503,
                f"Requests that wait hold {all_bytes.held} of {all_bytes.at_most} bytes, too many for this one.",
                code="too_many_bytes_waiting",
                retry_after_s=RETRY_AFTER_S,
            )
        all_bytes.add(more, self._tenant)
        self._num_bytes = num_bytes

    def count(self) -> None:
        """The request has been read and will wait. Raises ApiError (503) if too many do."""
        requests = self._waiting.requests
        if not requests.has(1, self._tenant):
            raise ApiError(
                503,
                f"{requests.held} of {requests.at_most} requests at once are being served, too many for one more of"
                " this client.",
                code="too_many_requests_at_once",
                retry_after_s=RETRY_AFTER_S,
            )
        requests.add(1, self._tenant)
        self._is_counted = True

    def release(self) -> None:
        self._waiting.bytes.add(-self._num_bytes, self._tenant)
        self._waiting.requests.add(-self._is_counted, self._tenant)
        self._num_bytes, self._is_counted = 0, False


def text_bytes(*texts: object) -> int:
    """Memory of those that are strings: one emoji makes every character of its string take four bytes."""
    return sum(sys.getsizeof(text) for text in texts if isinstance(text, str))
