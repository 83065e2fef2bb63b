"""Answers with pictures: their bytes as they were made, and whether the last of them has left.

The body is JSON whose pictures are put between its parts as they are sent, so nothing of their size is copied or looked
through again. A byte has left when the kernel has it: the server's own buffer is empty then, since its limit is 0
(`connections.py`). A client that goes away before has got nothing.
"""

import time
from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tetrion.entrypoints.http.schema import GenerationResponse, Picture

NO_PICTURE = ""
"""`b64_json` of a picture that is put there later."""
_PLACE = b'"b64_json":""'
"""Nowhere else: in a string of JSON its quotation marks would be escaped."""


class Courier(Protocol):
    """Is told once what came of an answer."""

    def delivered(self, sent_s: float) -> None:
        """The last byte has left, `sent_s` after the first."""

    def dropped(self) -> None:
        """The client went away, or was cut off."""


def body_parts(response: GenerationResponse | Picture, base64s: Sequence[bytes]) -> list[bytes]:
    """The body, or an event's data, as JSON in parts. `base64s`: in order, of the pictures whose `b64_json` is
    `NO_PICTURE`."""
    first, *others = msgspec.json.encode(response).split(_PLACE)
    assert len(others) == len(base64s)
    parts = [first]
    for base64, following in zip(base64s, others, strict=True):
        parts[-1] += b'"b64_json":"'
        parts += [base64, b'"' + following]
    return parts


class PicturesAnswer(Response):
    """Sends `parts` as JSON."""

    media_type = "application/json"

    def __init__(self, parts: list[bytes], courier: Courier) -> None:
        super().__init__(None)
        self._parts, self._courier = parts, courier
        self.headers["content-length"] = str(sum(map(len, parts)))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        has_left = False
        begun_s = time.monotonic()
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            while self._parts:  # what was sent is kept no longer
                await send({"type": "http.response.body", "body": self._parts.pop(0), "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": True})  # waits until nothing is unsent
            has_left = not await _is_lost(scope, receive)
        finally:
            if has_left:
                self._courier.delivered(time.monotonic() - begun_s)
            else:
                self._courier.dropped()
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _is_lost(scope: Scope, receive: Receive) -> bool:
    """Whether something unsent was lost. Other servers than ours only know whether the client is still there."""
    is_lost: Callable[[], bool] | None = scope.get("state", {}).get("is_lost")
    return is_lost() if is_lost is not None else await Request(scope, receive).is_disconnected()
