"""Who a request comes from: sockets of several loopback addresses, and proxies among them."""

import asyncio
import ipaddress
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.entrypoints.http.live import GENERATIONS, Live, live
from tetrion.entrypoints.errors import InputError
from tetrion.entrypoints.http.request_ids import RequestIdFilter
from tetrion.entrypoints.http.tenants import Tenants, TrustedProxies, tenant_of

KEY = "sk-aaaaaaaaaaaaaaaa"
PROXY, OTHER = "127.0.0.2", "127.0.0.3"
PUBLIC = st.ip_addresses(network="192.0.2.0/24") | st.ip_addresses(network="2001:db8::/32")
TRUSTED = st.ip_addresses(network="10.0.0.0/8") | st.ip_addresses(network="fd00::/8")
NO_ADDRESS = st.sampled_from(("", "unknown", "_hidden", "10.0.0.256", "example.com", "[::1", "1.2.3.4.5", "::1::", "é"))


async def post(served: Live, peer: str, headers: dict[str, str] | None = None, **body: Any) -> httpx.Response:
    transport = httpx.AsyncHTTPTransport(local_address=peer)
    async with httpx.AsyncClient(transport=transport, base_url=f"http://127.0.0.1:{served.port}") as http:
        return await http.post(GENERATIONS, json={"prompt": "a star"} | body, headers=headers)


def tenant_of_last(served: Live) -> tuple[str, str]:
    request = served.engine.handles[-1].request
    return request.tenant, request.user


async def test_only_a_trusted_proxy_says_for_whom_it_asks() -> None:
    async with live(trusted_proxies=(PROXY, "10.0.0.0/8")) as served:
        for peer, stated, tenant in (
            (OTHER, None, f"ip:{OTHER}"),
            (OTHER, "192.0.2.7", f"ip:{OTHER}"),
            ("127.0.0.1", "192.0.2.7", "ip:127.0.0.1"),
            (PROXY, None, f"ip:{PROXY}"),
            (PROXY, "192.0.2.7", "ip:192.0.2.7"),
            (PROXY, "192.0.2.7, 198.51.100.1", "ip:198.51.100.1"),
            (PROXY, "192.0.2.7, 10.1.2.3", "ip:192.0.2.7"),
            (PROXY, "2001:db8:1:2:3:4:5:6", "ip:2001:db8:1:2::/64"),
            (PROXY, "unknown", f"ip:{PROXY}"),
            (PROXY, "192.0.2.7, unknown", f"ip:{PROXY}"),
        ):
            headers = {} if stated is None else {"x-forwarded-for": stated}
            answer = await post(served, peer, headers | {"forwarded": "for=192.0.2.99"}, user="ann")
            assert answer.status_code == 200
            assert tenant_of_last(served) == (tenant, "ann"), (peer, stated)


@pytest.mark.parametrize("proxies", [(), (PROXY,)])
async def test_only_a_trusted_proxy_says_which_scheme_clients_use(proxies: tuple[str, ...]) -> None:
    async with live(trusted_proxies=proxies) as served:
        for peer, stated, is_believed in (
            (PROXY, "https", bool(proxies)),
            (PROXY, "ftp", False),
            ("127.0.0.1", "https", False),
        ):
            answer = await post(served, peer, {"x-forwarded-proto": stated}, response_format="url")
            url = answer.json()["data"][0]["url"]
            assert url.startswith("https://" if is_believed else "http://"), (peer, stated)


async def test_a_named_key_is_the_tenant_from_wherever_it_is_used(caplog: pytest.LogCaptureFixture) -> None:
    caplog.handler.addFilter(RequestIdFilter())
    async with live(trusted_proxies=(PROXY,), api_keys=(f"team:{KEY}", f"{KEY}2")) as served:
        for key, tenant, label in (
            (KEY, "team", "team"),
            (f"{KEY}2", "ip:192.0.2.7", "ip-"),
        ):
            headers = {"authorization": f"Bearer {key}", "x-forwarded-for": "192.0.2.7", "x-request-id": "abc"}
            answer = await post(served, PROXY, headers, prompt="fail")
            assert answer.status_code == 500 and tenant_of_last(served) == (tenant, "")
            record = next(record for record in reversed(caplog.records) if record.name == "tetrion.http")
            assert record.request.startswith(f"[abc {label}"), "the log names request and tenant"  # type: ignore[attr-defined]
            assert "192.0.2.7" not in record.request and key not in record.request  # type: ignore[attr-defined]


@given(st.lists(st.one_of(PUBLIC, TRUSTED, NO_ADDRESS).map(str), max_size=6, unique=True), st.one_of(PUBLIC, TRUSTED))
def test_the_client_is_the_nearest_that_no_trusted_proxy_vouches_for(entries: list[str], peer: Any) -> None:
    assume(str(peer) not in entries)
    proxies = TrustedProxies(["10.0.0.0/8", "fd00::/8"])
    client = proxies.client(peer, ", ".join(entries))
    chain = [*entries, str(peer)]
    place = chain.index(str(client))
    for entry in chain[place + 1 :]:
        assert proxies.trusts(ipaddress.ip_address(entry))
    if proxies.trusts(client) and place > 0:
        with pytest.raises(ValueError):
            ipaddress.ip_address(entries[place - 1])


@given(st.text(st.sampled_from('0123456789abcdef:.,[]% "_'), max_size=40) | st.text(max_size=40))
def test_whatever_a_proxy_states_is_an_address_or_nothing(stated: str) -> None:
    client = TrustedProxies(["10.0.0.1"]).client(ipaddress.ip_address("10.0.0.1"), stated)
    assert tenant_of(client).startswith("ip:")


@pytest.mark.parametrize(
    ("stated", "client"),
    [
        ("192.0.2.7:4711", "192.0.2.7"),
        ("[2001:db8::1]:4711", "2001:db8::1"),
        ("[2001:db8::1]", "2001:db8::1"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        (" 192.0.2.7 ", "192.0.2.7"),
        (",".join(["10.0.0.1"] * 100), "10.0.0.1"),
    ],
)
def test_forms_of_addresses(stated: str, client: str) -> None:
    assert str(TrustedProxies(["10.0.0.1"]).client(ipaddress.ip_address("10.0.0.1"), stated)) == client


def test_an_ipv6_network_of_64_bits_is_one_tenant_and_so_are_unix_sockets() -> None:
    tenants = {tenant_of(ipaddress.ip_address(f"2001:db8:0:1:{i:x}::{i:x}")) for i in range(1, 9)}
    assert tenants == {"ip:2001:db8:0:1::/64"}
    assert tenant_of(ipaddress.ip_address("2001:db8:0:2::1")) not in tenants
    assert tenant_of(ipaddress.ip_address("fe80::1%eth0")) == "ip:fe80::/64"
    assert tenant_of(None) == "unix:"


@pytest.mark.parametrize(
    ("client", "tenant"),
    [(None, "unix:"), (("::ffff:192.0.2.7", 1), "ip:192.0.2.7"), (("2001:db8::7", 1), "ip:2001:db8::/64")],
)
async def test_peers_of_other_sockets(client: tuple[str, int] | None, tenant: str) -> None:
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope)

    scope = {"type": "http", "client": client, "headers": [(b"x-forwarded-for", b"192.0.2.99")]}
    await Tenants(app, TrustedProxies(["10.0.0.1"]))(scope, asyncio.sleep, asyncio.sleep)  # type: ignore[arg-type]
    assert seen[0]["state"]["tenant"] == tenant and seen[0]["client"] == client


def test_an_ipv4_network_may_be_written_in_ipv6() -> None:
    for text in ("::ffff:10.0.0.0/104", "10.0.0.0/8"):
        assert TrustedProxies([text]).trusts(ipaddress.ip_address("10.1.2.3"))


@pytest.mark.parametrize("text", ["", "proxy.example.com", "10.0.0.0/33", "10.0.0.1/8", "*", "127.0.0.1:80"])
def test_what_is_no_address_is_refused_at_the_start(text: str, tetrion: Callable[..., int], capsys: Any) -> None:
    with pytest.raises(InputError, match="trusted_proxy: expected an address or a network such as"):
        TrustedProxies(["10.0.0.1", text])
    assert (
        tetrion("serve", "--port", 0, "--devices", "cpu:1", "--trusted-proxy", "10.0.0.1", "--trusted-proxy", text) == 2
    )
    error = capsys.readouterr().err
    assert "trusted_proxy" in error and ("has host bits set" in error) == (text == "10.0.0.1/8")
