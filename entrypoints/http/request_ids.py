"""Request ids: on every response, in every line that is logged on behalf of a request (with its tenant), in the ids
of the engine.

A client's `x-request-id` is kept if it is short and plain; other requests get a new one. The engine's request ids begin
with it, so that what the engine logs can be found by it, too.
"""

import logging
import re
import secrets
from contextvars import ContextVar

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,100}")
_current: ContextVar[str] = ContextVar("request_id", default="")
_tenant: ContextVar[str] = ContextVar("tenant", default="")


class RequestIds:
    """Puts `x-request-id` on every response."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        request_id = given if REQUEST_ID.fullmatch(given) else f"req_{secrets.token_hex(12)}"
        _current.set(request_id)  # not reset: what the server logs after the answer is about it as well

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        await self._app(scope, receive, send_with_id)


def engine_ids(num_pictures: int) -> list[str]:
    """Ids for the pictures of the request that is being handled. A client may use its id more than once, so they are
    made different."""
    base = f"{_current.get() or 'req'}.{secrets.token_hex(4)}"
    return [f"{base}.{i}" for i in range(num_pictures)]


def name_tenant(label: str) -> None:
    """What log lines call the tenant of the request that is being handled: never a key, nor an address."""
    _tenant.set(label)


class RequestIdFilter(logging.Filter):
    """Gives records `request_id` and `tenant` of the request that is being handled, "" where there is none, and
    `request`: "[id tenant] ", or ""."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.request_id, record.tenant = _current.get(), _tenant.get()
        named = " ".join(filter(None, (_current.get(), _tenant.get())))
        record.request = f"[{named}] " if named else ""
        return True
