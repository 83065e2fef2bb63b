"""Answers as server-sent events: each picture as it is done, comments in between so that no proxy takes the connection
for dead. A client that goes away cancels what it has not got.

OpenAI's events have no index, so theirs is added; what goes wrong after the first byte is an event, too.
"""

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Protocol

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tetrion.entrypoints.http.errors import ApiError, ErrorBody

KEEP_AWAKE_S = 10.0
FIRST, AWAKE = b": drawing\n\n", b": drawing still\n\n"
HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}
"""nginx would keep events back until it has many."""

Parts = list[bytes]
"""An event's JSON, on one line, in parts."""


class Source(Protocol):
    """Where an event comes from."""

    @property
    def name(self) -> str: ...

    def draw(self) -> Coroutine[Any, Any, Parts]:
        """Raises ApiError."""

    def sent(self, sent_s: float) -> None:
        """All of it has left, `sent_s` after its first byte."""


class EventsAnswer(Response):
    """Sends an event for each source, in the order in which they are done; the first that fails is the last event.
    `on_end` is told what ended it: None where every event has left."""

    media_type = "text/event-stream"

    def __init__(self, sources: Sequence[Source], on_end: Callable[[BaseException | None], None]) -> None:
        super().__init__(None, headers=HEADERS)
        del self.headers["content-length"]
        self._sources, self._on_end = sources, on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        sending = _Sending(scope, send, asyncio.create_task(disconnected(receive)))
        drawing = {asyncio.create_task(source.draw()): source for source in self._sources}
        ended: BaseException | None = None
        try:
            await sending.send(FIRST)
            while drawing:
                done = await sending.until(drawing)
                for task in [task for task in drawing if task in done]:
                    source = drawing.pop(task)
                    sent_s = await sending.picture(source.name, task.result())
                    source.sent(sent_s)
        except asyncio.CancelledError as error:
            ended = error
            await sending.send(error_event(ApiError(503, "The server is shutting down.", code="cancelled")))
            raise
        except (ApiError, Gone) as error:
            ended = error
            if isinstance(error, ApiError):
                await sending.send(error_event(error))
        except Exception as error:  # what nobody foresaw: the traceback is for the log
            ended = error
            message = "The server had an error while processing the request."
            await sending.send(error_event(ApiError(500, message, code="internal_error")))
            raise
        finally:
            await end_all(sending.gone, *drawing)
            self._on_end(ended)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class Gone(ConnectionError):
    """The client has gone away."""


class _Sending:
    """`gone` is done once the client has gone away."""

    def __init__(self, scope: Scope, send: Send, gone: asyncio.Task[None]) -> None:
        self._is_lost: Callable[[], bool] = scope.get("state", {}).get("is_lost", lambda: False)
        self._send, self.gone = send, gone

    async def send(self, data: bytes) -> None:
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def until(self, tasks: dict[asyncio.Task[Parts], Source]) -> set[asyncio.Task[Any]]:
        """Those that are done, at least one. Raises Gone."""
        while True:
            done, _ = await asyncio.wait({*tasks, self.gone}, timeout=KEEP_AWAKE_S, return_when=asyncio.FIRST_COMPLETED)
            if self.gone in done:
                raise Gone
            if done:
                return done
            await self.send(AWAKE)

    async def picture(self, name: str, parts: Parts) -> float:
        """Send an event and wait until it has left; how long that took. Raises Gone."""
        begun_s = time.monotonic()
        await self.send(f"event: {name}\ndata: ".encode())
        while parts:  # what was sent is kept no longer
            await self.send(parts.pop(0))
        await self.send(b"\n\n")
        await self.send(b"")  # waits until nothing is unsent (see answer.py)
        if self._is_lost() or self.gone.done():
            raise Gone
        return time.monotonic() - begun_s


def error_event(error: ApiError) -> bytes:
    data = {"type": "error"} | msgspec.to_builtins(ErrorBody(error=error.detail))
    return b"event: error\ndata: " + msgspec.json.encode(data) + b"\n\n"


async def disconnected(receive: Receive) -> None:
    """Returns once the client has gone away."""
    while (await receive())["type"] != "http.disconnect":
        continue


async def end_all(*tasks: asyncio.Task[Any]) -> None:
    """Cancels those that are not done, and waits for all."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
