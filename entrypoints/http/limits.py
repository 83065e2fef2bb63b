"""What the operator allows one request, and all that wait together.

`RequestLimits` bounds pictures, steps and pixels; a request beyond one is answered 400, naming field and bound.
`Waiting` counts what requests hold while they wait: bytes of their bodies and prompts, and their number.
"""

import sys

import msgspec

from tetrion.engine.request import ImageRequest
from tetrion.entrypoints.http.errors import ApiError

RETRY_AFTER_S = 1


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


class Waiting:
    """All requests that are being read or wait for their pictures."""

    def __init__(self, max_bytes: int, max_requests: int | None = None) -> None:
        self._max_bytes, self._max_requests = max_bytes, max_requests
        self.num_bytes = self.num_requests = 0

    def enter(self) -> "Held":
        """To be left with `Held.release`."""
        return Held(self)


class Held:
    """What one request holds."""

    def __init__(self, waiting: Waiting) -> None:
        self._waiting = waiting
        self._num_bytes = 0
        self._is_counted = False

    def hold(self, num_bytes: int) -> None:
        """So many bytes instead of those before. Raises ApiError (503) if all requests together would hold too many."""
        waiting = self._waiting
        more = num_bytes - self._num_bytes
        if more > 0 and waiting.num_bytes + more > waiting._max_bytes:
            raise ApiError(
                503,
                f"Requests that wait hold {waiting.num_bytes} of {waiting._max_bytes} bytes.",
                code="too_many_bytes_waiting",
                retry_after_s=RETRY_AFTER_S,
            )
        waiting.num_bytes += more
        self._num_bytes = num_bytes

    def count(self) -> None:
        """The request has been read and will wait. Raises ApiError (503) if too many do."""
        waiting = self._waiting
        if waiting._max_requests is not None and waiting.num_requests >= waiting._max_requests:
            raise ApiError(
                503,
                f"{waiting.num_requests} requests are being served, as many as this server takes at once.",
                code="too_many_requests_at_once",
                retry_after_s=RETRY_AFTER_S,
            )
        waiting.num_requests += 1
        self._is_counted = True

    def release(self) -> None:
        self._waiting.num_bytes -= self._num_bytes
        self._waiting.num_requests -= self._is_counted
        self._num_bytes, self._is_counted = 0, False


def text_bytes(*texts: object) -> int:
    """Memory of those that are strings: one emoji makes every character of its string take four bytes."""
    return sum(sys.getsizeof(text) for text in texts if isinstance(text, str))
