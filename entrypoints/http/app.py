"""The ASGI app around `ImageService`: routes, what stands in front of them, errors in OpenAI's form."""

from collections.abc import Sequence
from urllib.parse import urlsplit

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from tetrion.engine.errors import shown
from tetrion.entrypoints.errors import InputError
from tetrion.entrypoints.http.body_limits import BODY_TIMEOUT_S, Bodies
from tetrion.entrypoints.http.counters import Counted
from tetrion.entrypoints.http.draining import CutOffs
from tetrion.entrypoints.http.errors import ApiError, error_response, note_refusal
from tetrion.entrypoints.http.hosts import AllowedHosts, HostCheck
from tetrion.entrypoints.http.keys import ApiKeys, KeyCheck
from tetrion.entrypoints.http.request_ids import RequestIds
from tetrion.entrypoints.http.service import ImageService
from tetrion.entrypoints.http.tenants import Tenants, TrustedProxies

DEFAULT_PORTS = {"http": 80, "https": 443}
CLIENT_CLOSED_REQUEST = 499
EXPOSED_HEADERS = ("x-request-id", "retry-after", "x-should-retry")
"""Of a response, what pages of other origins may read."""


class Guards(msgspec.Struct, frozen=True, kw_only=True):
    """What a request must pass before it comes to a route. `hosts` None: any; no keys: anybody. `proxies`: who may say
    for whom it asks."""

    hosts: AllowedHosts | None = None
    keys: ApiKeys = msgspec.field(default_factory=ApiKeys)
    proxies: TrustedProxies = msgspec.field(default_factory=TrustedProxies)
    body_timeout_s: float = BODY_TIMEOUT_S


def create_app(service: ImageService, allowed_origins: Sequence[str] = (), guards: Guards | None = None) -> ASGIApp:
    """The ASGI app around `service`. `allowed_origins`: see `parse_origin`; pages of other ones get no answer. (A
    browser asks without a key whether it may ask, so that comes before keys.)"""
    guards = guards or Guards()
    app: ASGIApp = Bodies(_routed(service, allowed_origins), service.waiting, guards.body_timeout_s)
    if guards.keys:
        app = KeyCheck(app, guards.keys)
    if guards.hosts is not None:
        app = HostCheck(app, guards.hosts)
    app = CutOffs(app, service)
    if allowed_origins:
        app = _answering_pages(app, allowed_origins)
    return RequestIds(Tenants(Counted(app, service.counters), guards.proxies))


def _routed(service: ImageService, allowed_origins: Sequence[str]) -> Starlette:
    app = Starlette(
        routes=[
            Route("/v1/images/generations", service.generations, methods=["POST"]),
            Route("/v1/images/edits", service.edits, methods=["POST"]),
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
    app.state.allowed_origins = tuple(allowed_origins)
    app.router.redirect_slashes = False
    return app


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


async def _on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    note_refusal(request.scope, error)
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
    note_refusal(request.scope, api_error)
    return error_response(api_error)


async def _on_disconnect(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)  # nobody reads it; access logs do


async def _on_defect(request: Request, error: Exception) -> Response:
    """What no handler foresaw. The traceback goes to the server's log (the framework raises it again), not out."""
    api_error = ApiError(500, "The server had an error while processing the request.", code="internal_error")
    note_refusal(request.scope, api_error)
    return error_response(api_error)
