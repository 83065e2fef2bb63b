"""A client's request id leads to everything that is logged of its request."""

import logging
import re

import pytest

from tests.entrypoints.http.live import live
from tetrion.entrypoints.http.request_ids import RequestIdFilter


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.handler.addFilter(RequestIdFilter())
    caplog.handler.setFormatter(logging.Formatter("%(name)s %(request)s%(message)s"))
    caplog.set_level(logging.INFO)
    return caplog


async def test_the_id_is_in_every_line_of_its_request(lines: pytest.LogCaptureFixture) -> None:
    async with live(access_log=True) as served:
        await served.post(prompt="fail", headers={"x-request-id": "mine.1"})
        await served.post(prompt="crash", headers={"x-request-id": "mine.2"})
        await served.http.get("/health", headers={"x-request-id": "mine.3"})
    text, tenant = lines.text, r"ip-[0-9a-f]{8}"
    for line in (
        rf"tetrion\.http \[mine\.1 {tenant}\] generation failed: worker 1 was lost",
        rf"uvicorn\.access \[mine\.1 {tenant}\] 127\.0\.0\.1",
        rf"\[mine\.3 {tenant}\] 127\.0\.0\.1",
        rf"\[mine\.2 {tenant}\] Exception in ASGI application",
    ):
        assert re.search(line, text), line
    assert not re.search(rf"\[mine\.2 {tenant}\] generation failed", text)


async def test_the_engines_ids_begin_with_it_and_differ() -> None:
    async with live() as served:
        submitted = []
        submit = served.engine.submit
        served.engine.submit = lambda request: submitted.append(request) or submit(request)  # type: ignore[method-assign]
        for _ in range(2):
            await served.post(n=2, headers={"x-request-id": "mine"})
        await served.post()
    ids = [request.request_id for request in submitted]
    assert len(set(ids)) == 5 and all(name.startswith("mine.") for name in ids[:4]) and ids[4].startswith("req_")
    assert ids[0][:-1] == ids[1][:-1] and max(map(len, ids)) <= 256


def test_a_line_of_no_request_has_no_id() -> None:
    record = logging.makeLogRecord({"msg": "x"})
    assert RequestIdFilter().filter(record) and record.request == ""  # type: ignore[attr-defined]
