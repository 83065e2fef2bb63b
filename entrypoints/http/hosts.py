"""Under which names the server answers: a guard against DNS rebinding, where a page's own name is made to mean this
machine so that its scripts may read what is answered.

A server that listens on a loopback address answers to loopback names only, unless it is told of others; one that
listens elsewhere to all, unless it is told of some.
"""

import ipaddress
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Receive, Scope, Send

from tetrion.engine.errors import shown
from tetrion.entrypoints.errors import InputError
from tetrion.entrypoints.http.errors import ApiError, refuse
from tetrion.entrypoints.http.keys import PROBES


class AllowedHosts:
    """`names`: host names without port; `*.example.com` is every name below it. `is_local`: loopback names, too."""

    def __init__(self, names: Collection[str] = (), is_local: bool = False) -> None:
        for name in names:
            if not name or any(c.isspace() or c in "/@" for c in name) or "*" in name.removeprefix("*."):
                raise InputError(
                    f"allowed_host: expected a name such as images.example.com or *.example.com, got {name!r}"
                )
        self._names = {_without_brackets(name.lower().rstrip(".")) for name in names if not name.startswith("*.")}
        self._endings = tuple(name.lower()[1:] for name in names if name.startswith("*."))
        self._is_local = is_local

    def allows(self, host: str) -> bool:
        """`host`: a Host header."""
        name = _name_of(host)
        if name is None:
            return False
        return name in self._names or name.endswith(self._endings) or (self._is_local and _is_loopback(name))


def hosts_for(bound: Collection[str], names: Collection[str], public_url: str | None) -> AllowedHosts | None:
    """What a server that is bound to these addresses answers to; None: all. That of `public_url` is always allowed."""
    is_local = all(map(_is_loopback, bound))
    if not (names or is_local) or "*" in names:
        return None
    public = urlsplit(public_url or "").hostname
    return AllowedHosts([*names, *([public] if public else [])], is_local=is_local)


class HostCheck:
    """Answers 421 to requests for another host."""

    def __init__(self, app: ASGIApp, hosts: AllowedHosts) -> None:
        self._app, self._hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in PROBES:
            host = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
            if not self._hosts.allows(host):
                message = f"This server does not answer to the host {shown(host)} (see --allowed-host)."
                await refuse(ApiError(421, message, code="host_not_allowed"), scope, receive, send)
                return
        await self._app(scope, receive, send)


def _name_of(host: str) -> str | None:
    """The host of `host[:port]`, None if it has not that form."""
    try:
        parts = urlsplit(f"//{host}")
        if parts.netloc != host or "@" in host or any(c.isspace() for c in host):
            return None
        parts.port  # noqa: B018 - raises if it is no number
        return (parts.hostname or "").rstrip(".") or None
    except ValueError:
        return None


def _without_brackets(name: str) -> str:
    return name[1:-1] if name.startswith("[") and name.endswith("]") else name


def _is_loopback(name: str) -> bool:
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
