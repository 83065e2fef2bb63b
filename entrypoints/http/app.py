"""The ASGI app around `ImageService`: routes, a request id on every response, errors in OpenAI's form."""

import asyncio
import re
import secrets
from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tetrion.engine.errors import shown
from tetrion.entrypoints.errors import InputError
from tetrion.entrypoints.http.errors import ApiError, error_response
from tetrion.entrypoints.http.service import ImageService

DEFAULT_PORTS = {"http": 80, "https": 443}
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,100}")
CLIENT_CLOSED_REQUEST = 499


EXPOSED_HEADERS = ("x-request-id", "retry-after", "x-should-retry")
"""Of a response, what pages of other origins may read."""


def create_app(service: ImageService, allowed_origins: Sequence[str] = ()) -> ASGIApp:
    """The ASGI app around `service`. `allowed_origins`: see `parse_origin`; pages of other ones get no answer."""
    app = Starlette(
        routes=[
            Route("/v1/images/generations", service.generations, methods=["POST"]),
            Route("/v1/images/files/{name}", service.file),
            Route("/v1/models", service.models),
            Route("/v1/models/{model:path}", service.model),
            Route("/health", service.health),
            Route("/ready", service.ready),
            Route("/metrics", service.metrics),
        ],
        exception_handlers={
            ApiError: _on_api_error,
            HTTPException: _on_http_exception,
            ClientDisconnect: _on_disconnect,
            Exception: _on_defect,
        },
    )
    app.router.redirect_slashes = False
    return RequestIds(_answering_pages(CutOffs(app), allowed_origins) if allowed_origins else CutOffs(app))


def _answering_pages(app: ASGIApp, allowed_origins: Sequence[str]) -> ASGIApp:
    """With the headers by which browsers let pages of these origins ask and read. No cookies: there are none here."""
    return CORSMiddleware(
        app,
        allow_origins=allowed_origins,
        allow_methods=["GET", "POST"],
        allow_headers=["*"],
        expose_headers=EXPOSED_HEADERS,
    )


def parse_origin(text: str) -> str:
    """An origin as browsers write it, or `*` for any. Raises InputError."""
    if text in ("*", "null"):
        return text
    expected = f"allow_origin: expected an origin such as http://localhost:3000, or *, got {shown(text)}"
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        raise InputError(expected) from None
    has_more = (
        parts.path not in ("", "/") or parts.query or parts.fragment or "@" in parts.netloc or "*" in parts.netloc
    )
    if parts.scheme not in DEFAULT_PORTS or not parts.hostname or has_more or not text.isascii() or " " in text:
        raise InputError(expected)
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{parts.scheme}://{host}" + ("" if port in (None, DEFAULT_PORTS[parts.scheme]) else f":{port}")


class RequestIds:
    """Puts `x-request-id` on every response: the client's own if it is short and plain, else a new one."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        request_id = given if REQUEST_ID.fullmatch(given) else f"req_{secrets.token_hex(12)}"

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        await self._app(scope, receive, send_with_id)


class CutOffs:
    """Answers a request that the stopping server cancels. Of a response that has begun the rest is not sent, and the
    server closes the connection."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        has_begun = False

        async def send_and_note(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await self._app(scope, receive, send_and_note)
        except asyncio.CancelledError:
            if not has_begun:
                response = error_response(ApiError(503, "The server is shutting down.", code="cancelled"))
                await response(scope, receive, send)


async def _on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_response(error)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    status, where = error.status_code, f"{request.method} {request.url.path}"
    if status == 404:
        api_error = ApiError(404, f"Unknown request URL: {where}", code="unknown_url")
    elif status == 405:
        api_error = ApiError(405, f"Method not allowed: {where}", code="method_not_allowed")
    else:
        api_error = ApiError(status, str(error.detail))
    api_error.headers.update(error.headers or {})
    return error_response(api_error)


async def _on_disconnect(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)  # nobody reads it; access logs do


async def _on_defect(request: Request, error: Exception) -> Response:
    """What no handler foresaw. The traceback goes to the server's log (the framework raises it again), not out."""
    return error_response(ApiError(500, "The server had an error while processing the request.", code="internal_error"))
