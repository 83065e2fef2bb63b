"""Stopping without a request lost.

The first SIGTERM makes `/ready` say 503 at once, while requests are taken for `drain_s` more, so that a balancer has
time to send them elsewhere; then the door is closed, and what runs gets `shutdown_timeout_s` to finish. SIGINT comes
from somebody at a terminal: the door is closed at once. A second signal cuts requests off. A request that is cut off is
answered 503, with when to come again. `drain_s` is 0 by default: how long a balancer needs only its owner knows, and
without one it would just make every stop longer.
"""

import asyncio
from typing import Protocol

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tetrion.entrypoints.http.errors import ApiError, refuse

RETRY_AFTER_S = 5
"""After this another server behind the balancer, or this one started anew, is worth asking."""


class Drained(Protocol):
    is_draining: bool


def draining() -> ApiError:
    return ApiError(503, "The server is stopping.", code="draining", retry_after_s=RETRY_AFTER_S)


class CutOffs:
    """Answers a request that the stopping server cancels. Of a response that has begun the rest is not sent, and the
    server closes the connection. While it stops, every answer is the last of its connection."""

    def __init__(self, app: ASGIApp, service: Drained) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        has_begun = False

        async def send_and_note(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            if message["type"] == "http.response.start" and self._service.is_draining:
                MutableHeaders(scope=message)["connection"] = "close"
            await send(message)

        try:
            await self._app(scope, receive, send_and_note)
        except asyncio.CancelledError:
            if not has_begun:
                error = ApiError(503, "The server is shutting down.", code="cancelled", retry_after_s=RETRY_AFTER_S)
                await refuse(error, scope, receive, send)
