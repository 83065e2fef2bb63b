"""Under which names the server answers."""

import pytest

from tests.entrypoints.http.live import live
from tetrion.entrypoints.errors import InputError
from tetrion.entrypoints.http.hosts import AllowedHosts, hosts_for


async def test_a_server_on_loopback_answers_to_loopback_names_only() -> None:
    async with live(public_url="https://images.example.com/x") as served:
        for host, status in (
            ("localhost", 200),
            (f"LOCALHOST:{served.port}", 200),
            ("127.0.0.1", 200),
            ("127.1.2.3:80", 200),
            ("[::1]:8000", 200),
            ("images.example.com", 200),
            ("IMAGES.example.com.:443", 200),
            ("evil.example", 421),
            ("localhost.evil.example", 421),
            ("evil.example#localhost", 421),
            ("localhost@evil.example", 421),
            ("localhost/", 421),
            ("127.0.0.1.evil.example", 421),
            ("127.1", 421),
            ("2130706433", 421),
            ("localhost:port", 421),
            ("[::ffff:8.8.8.8]", 421),
            ("", 421),
        ):
            response = await served.http.get("/v1/models", headers={"host": host})
            assert response.status_code == status, host
            if status == 421:
                assert response.json()["error"]["code"] == "host_not_allowed"
        assert (await served.http.get("/health", headers={"host": "10.1.2.3:8000"})).status_code == 200, "a probe's"


async def test_two_hosts_are_no_http() -> None:
    async with live() as served:
        answer = await served.raw(b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\nhost: evil.example\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 400 ") and b"invalid_http" in answer


def test_names_that_are_allowed_and_those_below_one() -> None:
    hosts = AllowedHosts(["a.example", "*.b.example", "[2001:db8::1]"])
    for host in ("a.example", "A.EXAMPLE:1", "x.b.example", "x.y.b.example", "[2001:db8::1]:80"):
        assert hosts.allows(host), host
    for host in ("b.example", "xb.example", "localhost", "127.0.0.1", "a.example.c", "x.a.example"):
        assert not hosts.allows(host), host


def test_elsewhere_than_on_loopback_all_names_are_served_unless_some_are_named() -> None:
    assert hosts_for(["0.0.0.0"], (), None) is None
    assert hosts_for(["127.0.0.1"], ("*",), None) is None
    named = hosts_for(["0.0.0.0"], ("a.example",), None)
    assert named is not None and named.allows("a.example") and not named.allows("localhost")
    also = hosts_for(["::1"], ("a.example",), None)
    assert also is not None and also.allows("a.example") and also.allows("localhost")


@pytest.mark.parametrize("name", ["", "http://a", "a b", "*.*.a", "a*", "a@b"])
def test_what_is_no_name_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="allowed_host"):
        AllowedHosts([name])
