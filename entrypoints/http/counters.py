"""What the HTTP server counts: requests by path and status, refusals and connections that it closed by reason."""

from prometheus_client import CollectorRegistry, Counter, Gauge
from starlette.types import ASGIApp, Message, Receive, Scope, Send

PATHS = frozenset({"/v1/images/generations", "/v1/images/edits", "/v1/models", "/health", "/ready", "/metrics"})
FOLDERS = ("/v1/images/files/", "/v1/models/")


class HttpCounters:
    """Of one server."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        registry = registry or CollectorRegistry()
        self.requests = Counter(
            "tetrion_http_requests", "Answers by path and status.", ("path", "status"), registry=registry
        )
        self.refusals = Counter(
            "tetrion_http_refusals", "Requests that were answered with an error.", ("reason",), registry=registry
        )
        self.closed = Counter(
            "tetrion_http_connections_closed",
            "Connections that were closed for what they did or did not do.",
            ("reason",),
            registry=registry,
        )
        self.open = Gauge("tetrion_http_connections", "Connections that are open.", registry=registry)


class Counted:
    """Counts every answer."""

    def __init__(self, app: ASGIApp, counters: HttpCounters) -> None:
        self._app, self._counters = app, counters

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_and_count(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._counters.requests.labels(_path_of(scope["path"]), str(message["status"])).inc()
                if reason := scope.get("state", {}).get("refusal"):
                    self._counters.refusals.labels(reason).inc()
            await send(message)

        await self._app(scope, receive, send_and_count)


def _path_of(path: str) -> str:
    """A path that the server knows; strangers' paths are one, so that nobody can make up labels."""
    if path in PATHS:
        return path
    return next((f"{folder}…" for folder in FOLDERS if path.startswith(folder)), "other")
