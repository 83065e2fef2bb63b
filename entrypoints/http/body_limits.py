"""Reading bodies: within a time, within the bytes that all waiting requests may hold together.

Stands between the server and the routes. What is read is accounted to the request (`limits.Held`, in
`scope["state"]["held"]`) until it is answered.
"""

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tetrion.entrypoints.http.errors import ApiError, refuse
from tetrion.entrypoints.http.limits import Held, Waiting

BODY_TIMEOUT_S = 30.0
COPIES = 2
"""A body that is complete exists as the buffer that it was read into and as bytes."""


class Bodies:
    def __init__(self, app: ASGIApp, waiting: Waiting, timeout_s: float = BODY_TIMEOUT_S) -> None:
        self._app, self._waiting, self._timeout_s = app, waiting, timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if _has_two_lengths(scope):
            await refuse(
                _closing(ApiError(400, "Content-Length and Transfer-Encoding were both sent.")), scope, receive, send
            )
            return
        held = scope["state"]["held"] = self._waiting.enter(scope["state"]["tenant"])
        try:
            await self._app(scope, _Reader(receive, held, self._timeout_s), send)
        finally:
            held.release()


class _Reader:
    """`receive` with limits. Raises ApiError: 408 for a body that does not end, 503 where too much is held."""

    def __init__(self, receive: Receive, held: Held, timeout_s: float) -> None:
        self._receive, self._held, self._timeout_s = receive, held, timeout_s
        self._due_s = asyncio.get_running_loop().time() + timeout_s
        self._num_bytes = 0
        self._is_complete = False

    async def __call__(self) -> Message:
        if self._is_complete:
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._due_s):
                message = await self._receive()
        except TimeoutError:
            error = ApiError(408, f"The body did not arrive within {self._timeout_s:g} s.", code="body_timeout")
            raise _closing(error) from None
        if message["type"] == "http.request":
            self._num_bytes += len(message.get("body", b""))
            self._held.hold(COPIES * self._num_bytes)
            self._is_complete = not message.get("more_body", False)
            if self._is_complete:
                self._held.count()
        return message


def _has_two_lengths(scope: Scope) -> bool:
    """Where a proxy in front goes by one and this server by the other, a request may hide in the body of another."""
    names = {name for name, _ in scope["headers"]}
    return {b"content-length", b"transfer-encoding"} <= names


def _closing(error: ApiError) -> ApiError:
    error.headers["connection"] = "close"
    return error
