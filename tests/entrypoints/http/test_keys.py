"""API keys, and what is kept from showing them."""

import logging
from collections.abc import Callable

import openai
import pytest

from tests.entrypoints.http.live import GENERATIONS, head, live
from tetrion.entrypoints.errors import InputError
from tetrion.entrypoints.http.keys import ApiKeys

KEY, TEAM_KEY = "sk-aaaaaaaaaaaaaaaa", "sk-bbbbbbbbbbbbbbbb"


async def test_everything_but_the_probes_needs_a_key(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with live(api_keys=(KEY, f"team:{TEAM_KEY}"), access_log=True) as served:
        for path in ("/health", "/ready"):
            assert (await served.http.get(path)).status_code == 200
        refused = [
            await served.http.get("/metrics"),
            await served.http.get("/v1/models"),
            await served.http.get("/v1/images/files/x.png"),
            await served.http.get("/nothing"),
            await served.http.get("/health/"),
            await served.http.get("//health"),
            await served.http.get("/v1/models", params={"api_key": KEY}),
            await served.http.get("/v1/models", headers={"x-api-key": KEY}),
            await served.http.get("/v1/models", headers={"authorization": f"Basic {KEY}"}),
            await served.http.get("/v1/models", headers={"authorization": KEY}),
            await served.http.get("/v1/models", headers={"authorization": "Bearer"}),
            await served.http.get("/v1/models", headers={"authorization": f"Bearer {KEY[:-1]}"}),
            await served.http.get("/v1/models", headers={"authorization": f"Bearer {KEY}x"}),
            await served.http.get("/v1/models", headers={"authorization": f"Bearer team:{TEAM_KEY}"}),
            await served.http.get(
                "/v1/models", headers=[("authorization", f"Bearer {KEY}"), ("authorization", "Bearer other")]
            ),
            await served.post(),
        ]
        for response in refused:
            error = response.json()["error"]
            assert (response.status_code, error["code"], error["type"]) == (
                401,
                "invalid_api_key",
                "invalid_request_error",
            )
            assert response.headers["www-authenticate"] == "Bearer" and KEY[:6] not in response.text
        assert not served.engine.handles
        for key in (KEY, TEAM_KEY):
            assert (await served.http.get("/metrics", headers={"authorization": f"bearer {key}"})).status_code == 200
        given = {"authorization": f"Bearer {TEAM_KEY}"}
        assert f'tetrion_http_refusals_total{{reason="invalid_api_key"}} {len(refused)}.0' in await served.metrics(
            given
        )
    assert TEAM_KEY not in caplog.text


async def test_the_name_of_a_key_is_the_tenant_and_its_users_are_below_it() -> None:
    async with live(api_keys=(KEY, f"team:{TEAM_KEY}")) as served:
        url = f"http://127.0.0.1:{served.port}/v1"
        for key, user, tenant in (
            (KEY, "ann", ("ip:127.0.0.1", "ann")),
            (TEAM_KEY, "ann", ("team", "ann")),
            (TEAM_KEY, openai.omit, ("team", "")),
        ):
            async with openai.AsyncOpenAI(base_url=url, api_key=key, max_retries=0) as client:
                await client.images.generate(prompt="a star", user=user)
            request = served.engine.handles[-1].request
            assert (request.tenant, request.user) == tenant
        async with openai.AsyncOpenAI(base_url=url, api_key="wrong", max_retries=0) as client:
            with pytest.raises(openai.AuthenticationError, match="Incorrect API key provided"):
                await client.images.generate(prompt="a star")


async def test_the_body_of_a_stranger_is_not_read() -> None:
    async with live(api_keys=(KEY,)) as served:
        answer = await served.raw(head("POST", GENERATIONS, "content-length: 100", "connection: close"))
        assert answer.startswith(b"HTTP/1.1 401 ")


@pytest.mark.parametrize("text", ["", "two words", "ключ", "a\n", f"{'n' * 65}:\n", "team:"])
def test_what_is_no_key_is_refused_without_being_shown(text: str) -> None:
    with pytest.raises(InputError, match="api_key: number 2 must be KEY or NAME:KEY") as refused:
        ApiKeys([KEY, text])
    assert not text or text not in str(refused.value)


def test_keys_come_from_the_environment_and_are_in_no_help(
    tetrion: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TETRION_API_KEY", f"{KEY} bad:")
    assert tetrion("serve", "--port", 0, "--devices", "cpu:1") == 2
    assert tetrion("serve", "--help") == 0
    shown = capsys.readouterr()
    assert "api_key: number 2" in shown.err and "--api-key" in shown.out
    assert KEY not in shown.out + shown.err and "bad:" not in shown.out + shown.err
