"""On whose behalf a request comes: the tenants among whom the engine shares its slots and its queue.

A tenant is the name of the API key (`keys.py`), else the peer's address. That is the socket's, or what a proxy that the
operator trusts states in `X-Forwarded-For`; what anybody else states there counts for nothing. Only that header is
read: a proxy passes on what it does not write itself, so whoever believes in a second one (`Forwarded`) believes
clients. The same proxies may state the scheme, in `X-Forwarded-Proto`.

An IPv6 tenant is a /64, since one machine has all of its addresses. All peers of a Unix socket are one tenant. Names
of tenants with addresses hold a colon, which names of keys do not.
"""

import hashlib
import ipaddress
import re
import secrets
from collections.abc import Iterable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from tetrion.engine.errors import shown
from tetrion.entrypoints.errors import InputError
from tetrion.entrypoints.http.request_ids import name_tenant

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

IPV6_TENANT_BITS = 64
MAPPED_BITS = 96
"""::ffff:192.0.2.1 is an address of IPv4: so a socket of both families calls its peer."""
MAX_PROXIES = 32
"""So many entries of one header are looked at."""
UNIX_TENANT = "unix:"
WITH_PORT = re.compile(r"\[([^]]*)\](?::\d{1,5})?|([^:]*)(?::\d{1,5})?")
_SALT = secrets.token_bytes(16)


class TrustedProxies:
    """Peers that may state an address."""

    def __init__(self, texts: Iterable[str] = ()) -> None:
        """`texts`: addresses and networks. Raises InputError."""
        self._networks = [_network(text.strip()) for text in texts]

    def __bool__(self) -> bool:
        return bool(self._networks)

    def trusts(self, address: Address) -> bool:
        return any(address in network for network in self._networks)

    def client(self, peer: Address, forwarded_for: str) -> Address:
        """Whom `peer` speaks for: the address nearest to us that is not of a trusted proxy. `forwarded_for`: the
        header, whose last entry was written by the peer. Where a proxy states no address, it is the proxy itself."""
        address = peer
        for entry in reversed(forwarded_for.rsplit(",", MAX_PROXIES)):
            stated = _address(entry) if self.trusts(address) else None
            if stated is None:
                break
            address = stated
        return address


class Tenants:
    """Puts the client's address into `scope["client"]`, as far as a trusted proxy knows it better, and the tenant into
    `scope["state"]["tenant"]`."""

    def __init__(self, app: ASGIApp, proxies: TrustedProxies) -> None:
        self._app, self._proxies = app, proxies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            self._settle(scope)
        await self._app(scope, receive, send)

    def _settle(self, scope: Scope) -> None:
        peer = _address(scope["client"][0]) if scope.get("client") else None
        client = peer
        if peer is not None and self._proxies.trusts(peer):
            headers = Headers(scope=scope)
            client = self._proxies.client(peer, ",".join(headers.getlist("x-forwarded-for")))
            if client != peer:
                scope["client"] = (str(client), 0)
            scheme = headers.get("x-forwarded-proto", "").rpartition(",")[2].strip().lower()
            if scheme in ("http", "https"):
                scope["scheme"] = scheme
        tenant = tenant_of(client)
        scope.setdefault("state", {})["tenant"] = tenant
        name_tenant(f"ip-{_hash(tenant)}" if client else "unix")


def tenant_of(address: Address | None) -> str:
    """None: the peer has none, as with a Unix socket."""
    if address is None:
        return UNIX_TENANT
    if address.version == 4:
        return f"ip:{address}"
    return f"ip:{ipaddress.IPv6Network((int(address), IPV6_TENANT_BITS), strict=False)}"


def public_name(tenant: str) -> str:
    """What metrics call it: the name of a key, or what log lines call an address, behind a colon as in its own name."""
    kind, colon, rest = tenant.partition(":")
    return f"{kind}:{_hash(tenant)}" if rest else kind + colon


def _hash(tenant: str) -> str:
    """The same for the same address as long as the process lives, so that error logs hold none."""
    return hashlib.blake2b(tenant.encode(), digest_size=4, key=_SALT).hexdigest()


def _address(text: str) -> Address | None:
    """`192.0.2.1`, `2001:db8::1`, either with a port as well; None for what is no address."""
    text = text.strip()
    found = WITH_PORT.fullmatch(text)
    try:
        address = ipaddress.ip_address((found[1] or found[2]) if found else text)
    except ValueError:
        return None
    return (address.version == 6 and address.ipv4_mapped) or address


def _network(text: str) -> Network:
    try:
        network = ipaddress.ip_network(text)
    except ValueError as error:
        reason = f" ({error})" if "host bits" in str(error) else ""
        raise InputError(
            "trusted_proxy: expected an address or a network such as 10.0.0.7, 10.0.0.0/8 or 2001:db8::/32,"
            f" got {shown(text)}{reason}"
        ) from None
    mapped = network.network_address.ipv4_mapped if network.version == 6 else None
    if mapped is not None and network.prefixlen >= MAPPED_BITS:
        return ipaddress.ip_network((mapped, network.prefixlen - MAPPED_BITS))
    return network
