"""The pictures of one HTTP request, from the engine's handles to an answer: all in one body, or each as an event.

Encoding runs in threads, so that the loop that drives the engine is not held up, and begins with each picture as it is
drawn. Whatever ends a request before its pictures have left cancels what is left of it.
"""

from __future__ import annotations

import asyncio
import binascii
import logging
import time
from collections.abc import Coroutine, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request

from tetrion.engine.errors import Displaced, EngineOverloaded, GenerationError, QueueTimeout, RequestCancelled
from tetrion.engine.request import ImageRequest, ImageResult
from tetrion.entrypoints import pictures
from tetrion.entrypoints.encoders import Encoders
from tetrion.entrypoints.http import logs, schema
from tetrion.entrypoints.http.answer import NO_PICTURE, Courier, PicturesAnswer, body_parts
from tetrion.entrypoints.http.errors import ApiError
from tetrion.entrypoints.http.events import EventsAnswer, Gone, disconnected, end_all
from tetrion.entrypoints.http.metrics import Metrics, Outcome
from tetrion.entrypoints.http.store import PictureStore, Reservation
from tetrion.entrypoints.png import Each

if TYPE_CHECKING:
    from tetrion.engine.api import AsyncEngine, RequestHandle

OVERLOAD_RETRY_AFTER_S = 1
QUALITY: schema.ResponseQuality = "high"

T = TypeVar("T")
P = TypeVar("P", bound=schema.Picture)

log = logging.getLogger("tetrion.http")


class Encoded(msgspec.Struct, frozen=True, kw_only=True):
    """A picture that is ready to be sent. `result` is without the image. `drawn_s`: when it was drawn, on the clock of
    `time.monotonic`; `made_s`: what encoding took. `base64` or `url`, whichever was asked for."""

    result: ImageResult
    drawn_s: float
    made_s: float
    base64: bytes | None = None
    url: str | None = None


class Desk(msgspec.Struct, frozen=True, kw_only=True):
    """What the drawings of a server share."""

    engine: AsyncEngine
    metrics: Metrics
    encoders: Encoders
    store: PictureStore


class Drawing:
    """The pictures of one request; `handles` are theirs. `warnings` go with the answer."""

    def __init__(
        self, desk: Desk, body: schema.GenerationBody, handles: Sequence[RequestHandle], warnings: tuple[str, ...]
    ) -> None:
        self._desk, self._body, self._handles, self._warnings = desk, body, handles, warnings
        self._format = body.output_format or "png"
        self._sizes = desk.engine.models.specs[handles[0].request.model or ""].sizes

    # All in one ----------------------------------------------------------------------------------------------------

    async def whole(self, request: Request, reservation: Reservation, base_url: str) -> PicturesAnswer:
        """`reservation`, `base_url`: of pictures that are to be fetched. Raises ApiError, ClientDisconnect."""
        encoded = await _unless_disconnected(request, self._all(reservation, base_url))
        self.count("drawn", len(encoded))
        base64s = [picture.base64 for picture in encoded if picture.base64 is not None]
        return PicturesAnswer(body_parts(self._response(encoded), base64s), self._delivery(encoded))

    async def _all(self, reservation: Reservation, base_url: str) -> list[Encoded]:
        """In order. The first failure is raised at once; the caller cancels the rest."""
        tasks = [asyncio.create_task(self._picture(handle, reservation, base_url)) for handle in self._handles]
        try:
            return await asyncio.gather(*tasks)
        finally:
            await end_all(*tasks)

    def _response(self, encoded: Sequence[Encoded]) -> schema.GenerationResponse:
        """Without the pictures themselves."""
        first = encoded[0].result
        return schema.GenerationResponse(
            created=int(time.time()),
            background="opaque",
            output_format=self._format,
            quality=QUALITY,
            size=f"{first.width}x{first.height}",
            model=first.model,
            data=[self._described(picture, schema.Picture) for picture in encoded],
            usage=self._usage(first, len(encoded)),
            warnings=self._warnings,
        )

    # Each as an event ----------------------------------------------------------------------------------------------

    def events(self, kind: str) -> EventsAnswer:
        """`kind`: what the events' names begin with."""
        sources = [_Source(self, index, f"{kind}.completed") for index in range(len(self._handles))]

        def on_end(error: BaseException | None) -> None:
            num_sent = sum(source.is_sent for source in sources)
            self.count("drawn", num_sent)
            if error is not None:
                self.given_up(error, len(sources) - num_sent)

        return EventsAnswer(sources, on_end)

    async def event(self, index: int, name: str) -> tuple[list[bytes], Courier]:
        """The data of the event of one picture, and who is told that it has left. Raises ApiError."""
        picture = await self._picture(self._handles[index])
        result = picture.result
        event = self._described(
            picture,
            schema.CompletedEvent,
            type=name,
            created_at=int(time.time()),
            background="opaque",
            output_format=self._format,
            quality=QUALITY,
            size=f"{result.width}x{result.height}",
            model=result.model,
            index=index,
            usage=self._usage(result, 1, counts_input=index == 0),
            warnings=self._warnings,
        )
        assert picture.base64 is not None
        return body_parts(event, [picture.base64]), self._delivery([picture])

    # Both ----------------------------------------------------------------------------------------------------------

    async def _picture(
        self, handle: RequestHandle, reservation: Reservation | None = None, base_url: str = ""
    ) -> Encoded:
        """Raises ApiError."""
        result = await self._result(handle)
        drawn_s = time.monotonic()
        self._desk.metrics.observe(result)
        slo_ms, is_url = handle.request.slo_ms, self._body.response_format == "url"
        due_s = None if slo_ms is None else drawn_s - result.latency_s + slo_ms / 1e3
        image, result = result.image, msgspec.structs.replace(result, image=None)

        def encode(each: Each) -> bytes:
            text = pictures.metadata(result)
            encoded = pictures.encode(image, self._format, self._body.output_compression, text, each)
            return encoded if is_url else binascii.b2a_base64(encoded, newline=False)

        data = await self._desk.encoders.run(encode, due_s)
        made_s = time.monotonic() - drawn_s
        if not is_url:
            return Encoded(result=result, drawn_s=drawn_s, made_s=made_s, base64=data)
        assert reservation is not None
        name = self._desk.store.put(reservation, data, pictures.MEDIA_TYPES[self._format], self._format)
        url = f"{base_url}/v1/images/files/{name}"
        return Encoded(result=result, drawn_s=drawn_s, made_s=made_s, url=url)

    async def _result(self, handle: RequestHandle) -> ImageResult:
        """Raises ApiError."""
        try:
            return await handle.result()
        except Displaced as error:
            raise overloaded(error, has_deadline=self._body.slo_ms is not None) from None
        except QueueTimeout as error:
            message, code = f"The server is overloaded: {error}", "queue_timeout"
            raise ApiError(503, message, code=code, retry_after_s=OVERLOAD_RETRY_AFTER_S) from None
        except GenerationError as error:
            log.error("generation failed: %s", error)
            raise ApiError(500, f"Generation failed: {error}", code="generation_failed") from None
        except RequestCancelled:
            raise ApiError(503, "The request was cancelled by the server.", code="cancelled") from None

    def _described(self, picture: Encoded, kind: type[P], **more: Any) -> P:
        return schema.describe_picture(
            picture.result,
            self._handles[0].request.slo_ms,
            time.monotonic() - picture.drawn_s,
            kind,
            b64_json=None if picture.base64 is None else NO_PICTURE,
            url=picture.url,
            **more,
        )

    def _usage(self, result: ImageResult, num_pictures: int, counts_input: bool = True) -> schema.Usage:
        num_image_tokens = self._sizes.num_rows(result.width, result.height) * num_pictures
        if not counts_input:
            return schema.usage(0, num_image_tokens)
        brought = self._handles[0].request.pictures
        num_picture_tokens = sum(self._sizes.num_rows(*picture.size) for picture in brought)
        return schema.usage(result.num_text_tokens, num_image_tokens, num_picture_tokens)

    def _delivery(self, encoded: Sequence[Encoded]) -> Courier:
        made = [(picture.result, picture.made_s) for picture in encoded]
        return _Delivery(self._desk, self._format, made)

    def count(self, outcome: Outcome, number: int) -> None:
        if number:
            self._desk.metrics.asked(self._handles[0].request.model or "", outcome, number)

    def given_up(self, error: BaseException, number: int | None = None) -> None:
        """Nothing more is sent, because of `error`, which `number` pictures (None: all) have not left before."""
        self.count(_outcome(error), len(self._handles) if number is None else number)
        for handle in self._handles:
            handle.cancel()
            self._desk.engine.not_delivered(handle.request_id)


class _Source:
    """One picture of a stream (see events.py)."""

    def __init__(self, drawing: Drawing, index: int, name: str) -> None:
        self._drawing, self._index, self.name = drawing, index, name
        self._courier: Courier | None = None
        self.is_sent = False

    async def draw(self) -> list[bytes]:
        parts, self._courier = await self._drawing.event(self._index, self.name)
        return parts

    def sent(self, sent_s: float) -> None:
        assert self._courier is not None
        self.is_sent = True
        self._courier.delivered(sent_s)


class _Delivery:
    """Says to the engine what came of an answer's pictures, counts and logs them. It keeps no picture: a client may
    take long to read."""

    def __init__(
        self, desk: Desk, picture_format: pictures.PictureFormat, made: Sequence[tuple[ImageResult, float]]
    ) -> None:
        """`made`: each picture's result, without the image, and what encoding it has taken."""
        self._desk, self._format, self._made = desk, picture_format, made

    def delivered(self, sent_s: float) -> None:
        """Sending counts as much as making at most: the rest is the client's."""
        for result, made_s in self._made:
            own_s = made_s + min(made_s, sent_s / len(self._made))
            delivered = self._desk.engine.delivered(result.request_id, own_s)
            if delivered is not None:
                self._desk.metrics.delivered(result, delivered, self._format)
                logs.drawn(result, delivered)

    def dropped(self) -> None:
        for result, _ in self._made:
            self._desk.engine.not_delivered(result.request_id)


def _outcome(error: BaseException) -> Outcome:
    """Of pictures that were not sent."""
    if isinstance(error, ClientDisconnect | Gone | asyncio.CancelledError):
        return "cancelled"
    if isinstance(error, ApiError) and error.status != 500:
        return "cancelled" if error.detail.code == "cancelled" else "refused"
    return "failed"


def overloaded(error: EngineOverloaded | Displaced, has_deadline: bool) -> ApiError:
    """Without a deadline the client may try again; with one, its retries would only amplify the overload."""
    message = f"The server is overloaded: {error}"
    if has_deadline:
        return ApiError(429, message, code="engine_overloaded", should_retry=False)
    return ApiError(429, message, code="engine_overloaded", retry_after_s=OVERLOAD_RETRY_AFTER_S)


def max_encoded_bytes(request: ImageRequest) -> int:
    """More than a picture of this request can take in any format: noise in a PNG takes its raw size and a little."""
    raw_bytes = 3 * (request.width or 0) * (request.height or 0)
    return raw_bytes * 5 // 4 + 4 * len(request.prompt) + 16_384


async def _unless_disconnected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled if the client goes away first. Raises ClientDisconnect then."""
    working = asyncio.create_task(work)
    watching = asyncio.create_task(disconnected(request.receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        await end_all(working, watching)
