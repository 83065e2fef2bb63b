"""API keys: who may use the server, and as which tenant.

`Authorization: Bearer KEY`, as OpenAI's clients send it; a key anywhere else, in the query for example, counts for
nothing. `/health` and `/ready` are open. Keys are kept as digests and compared in constant time; neither a key nor a
part of one is in any message or log.
"""

import hashlib
import hmac
import re
from collections.abc import Iterable

from starlette.types import ASGIApp, Receive, Scope, Send

from tetrion.entrypoints.errors import InputError
from tetrion.entrypoints.http.errors import ApiError, refuse
from tetrion.entrypoints.http.request_ids import name_tenant

NAMED_KEY = re.compile(r"(?:([A-Za-z0-9._-]{1,64}):)?+([!-~]{1,512})")
PROBES = frozenset({"/health", "/ready"})
"""Paths that tell nothing but whether the server lives: open to balancers, under whatever name they call it."""


class ApiKeys:
    """Keys by their digests, each with the name of its tenant ("" if it has none: then the address is the tenant, see
    `tenants.py`). Without any all may pass."""

    def __init__(self, texts: Iterable[str] = ()) -> None:
        """`texts`: KEY or NAME:KEY each. Raises InputError, which does not show them."""
        self._names: list[tuple[bytes, str]] = []
        for number, text in enumerate(texts, start=1):
            match = NAMED_KEY.fullmatch(text)
            if match is None:
                raise InputError(
                    f"api_key: number {number} must be KEY or NAME:KEY, a key of up to 512 visible ASCII characters,"
                    " a name of up to 64 letters, digits, '.', '_' and '-'"
                )
            self._names.append((_digest(match[2].encode()), match[1] or ""))

    def __bool__(self) -> bool:
        return bool(self._names)

    def tenant(self, authorization: bytes) -> str | None:
        """The name of the key in this header, None if it holds none of the keys. Takes as long for any."""
        scheme, _, key = authorization.partition(b" ")
        digest, found = _digest(key.strip()), None
        for known, name in self._names:
            if hmac.compare_digest(known, digest):
                found = name
        return found if scheme.lower() == b"bearer" else None


class KeyCheck:
    """Answers 401 to what carries no key; others go on, with `scope["state"]["tenant"]` if the key has a name."""

    def __init__(self, app: ASGIApp, keys: ApiKeys) -> None:
        self._app, self._keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in PROBES:
            await self._app(scope, receive, send)
            return
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        tenant = self._keys.tenant(given[0]) if len(given) == 1 else None
        if tenant is None:
            await refuse(_unauthorized(has_one=bool(given)), scope, receive, send)
            return
        if tenant:
            scope.setdefault("state", {})["tenant"] = tenant
            name_tenant(tenant)
        await self._app(scope, receive, send)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _unauthorized(has_one: bool) -> ApiError:
    says = "Incorrect API key provided." if has_one else "You didn't provide an API key."
    error = ApiError(401, f"{says} Send it in the header 'Authorization: Bearer KEY'.", code="invalid_api_key")
    error.headers["www-authenticate"] = "Bearer"
    return error
