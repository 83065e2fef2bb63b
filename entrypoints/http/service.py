"""The image API's handlers: from a decoded body to pictures, on one engine.

Owns the way of a request through the engine and the picture store; routes and error handlers are in `app.py`, the
bodies in `schema.py`, how they are sent in `answer.py`. A closed connection cancels its requests. Encoding runs in
threads, so that the loop that drives the engine is not held up, and begins with each picture as it is drawn.
"""

from __future__ import annotations

import asyncio
import binascii
import logging
import math
import secrets
import time
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from tetrion.engine.errors import (
    DeadlineUnmeetable,
    Displaced,
    EngineOverloaded,
    GenerationError,
    ModelNotFound,
    QueueTimeout,
    RequestCancelled,
    RequestError,
    one_line,
    shown,
)
from tetrion.engine.families.words import unknown_words
from tetrion.engine.request import ImageRequest, ImageResult
from tetrion.entrypoints import pictures
from tetrion.entrypoints.encoders import Encoders
from tetrion.entrypoints.http import logs, schema
from tetrion.entrypoints.http.answer import NO_PICTURE, PicturesAnswer, body_parts
from tetrion.entrypoints.http.body import read_form_or_json, read_json
from tetrion.entrypoints.http.draining import draining
from tetrion.entrypoints.http.edits import EditBody, decode_form, decode_json
from tetrion.entrypoints.http.errors import ApiError
from tetrion.entrypoints.http.limits import RequestLimits, Waiting, text_bytes
from tetrion.entrypoints.http.metrics import MEDIA_TYPE, Metrics, Outcome
from tetrion.entrypoints.http.request_ids import engine_ids
from tetrion.entrypoints.http.store import PictureStore, Reservation, StoreFull
from tetrion.entrypoints.png import Each

if TYPE_CHECKING:
    from tetrion.engine.api import AsyncEngine, RequestHandle

MAX_WAITING_BYTES = 256 << 20
RANDOM_SEEDS = 2**32
OVERLOAD_RETRY_AFTER_S = 1
DECODING_AT_ONCE = 2
"""Pictures of requests: each may take some hundred MB meanwhile."""
NO_WORKER_RETRY_AFTER_S = 5
LONG_WAIT_S = 60

T = TypeVar("T")

log = logging.getLogger("tetrion.http")


class _Encoded(msgspec.Struct, frozen=True, kw_only=True):
    """A picture that is ready to be sent. `result` is without the image. `drawn_s`: when it was drawn, on the clock of
    `time.monotonic`; `made_s`: what encoding took. `base64` or `url`, whichever was asked for."""

    result: ImageResult
    drawn_s: float
    made_s: float
    base64: bytes | None = None
    url: str | None = None


class ImageService:
    """The handlers. `is_ready` is set by whoever starts the engine, and unset when it stops."""

    def __init__(
        self,
        engine: AsyncEngine,
        store: PictureStore,
        public_url: str | None = None,
        limits: RequestLimits | None = None,
        waiting: Waiting | None = None,
    ) -> None:
        self._engine = engine
        self._store = store
        self._public_url = public_url.rstrip("/") if public_url else None
        self._created = int(time.time())
        self._metrics = Metrics(engine)
        self._encoders = Encoders()
        self._decoding = asyncio.Semaphore(DECODING_AT_ONCE)
        self._limits = limits or RequestLimits()
        self.waiting = waiting or Waiting(MAX_WAITING_BYTES)
        self.counters = self._metrics.http
        self.is_ready = False
        self.is_draining = False
        """The server takes requests, but only for a while; `/ready` says so."""

    async def generations(self, request: Request) -> Response:
        """`POST /v1/images/generations`."""
        body = schema.decode_body(await read_json(request))
        request.state.held.hold(_text_bytes(body))
        self._check_ready()
        requests, warnings = self._requests(request, body)
        return await self._drawn(request, body, requests, warnings)

    async def edits(self, request: Request) -> Response:
        """`POST /v1/images/edits`."""
        body = await _read_edit(request)
        self._check_ready()
        pictures = {"pictures": body.images, "mask": body.mask, "strength": body.strength}
        requests, warnings = self._requests(request, body, **pictures)
        requests = await self._with_pictures(requests, body)
        num_bytes = sum(picture.num_bytes for picture in requests[0].pictures)
        request.state.held.hold(_text_bytes(body) + num_bytes)
        body, pictures = msgspec.structs.replace(body, images=(), mask=None), {}
        return await self._drawn(request, body, requests, warnings)

    def _requests(
        self, request: Request, body: schema.GenerationBody, **pictures: Any
    ) -> tuple[list[ImageRequest], tuple[str, ...]]:
        """One a picture, and what to warn of."""
        seed = secrets.randbelow(RANDOM_SEEDS - (body.n or 1)) if body.seed is None else body.seed
        model, warnings = self._model_of(body)
        tenant = request.state.tenant
        return schema.to_requests(body, model, seed, engine_ids(body.n or 1), tenant, **pictures), warnings

    async def _with_pictures(self, requests: list[ImageRequest], body: EditBody) -> list[ImageRequest]:
        """With what they bring decoded and resized, once for all: a few at a time, since each may take much memory."""
        try:
            async with self._decoding:
                first = await self._engine.prepared(requests[0])
        except RequestError as error:
            raise schema.invalid_request(error, body) from None
        assert isinstance(first, ImageRequest)
        decoded = {name: getattr(first, name) for name in ("pictures", "mask", "width", "height")}
        return [msgspec.structs.replace(request, **decoded) for request in requests]

    async def _drawn(
        self,
        request: Request,
        body: schema.GenerationBody,
        requests: list[ImageRequest],
        warnings: tuple[str, ...],
    ) -> Response:
        handles = self._submit(requests, body)
        try:
            self._limits.check(handles[0].request, len(handles))
            warnings += self._warn_of_words(handles[0].request)
            with self._reserve(body, handles) as reservation:
                drawing = self._draw(handles, body, reservation, self._base_url(request))
                encoded = await _unless_disconnected(request, drawing)
            self._count(handles, "drawn")
            return self._answer(encoded, self._response(body, handles[0].request, encoded, warnings))
        except BaseException as error:
            self._count(handles, _outcome(error))
            for handle in handles:
                handle.cancel()
                self._engine.not_delivered(handle.request_id)
            raise

    def _count(self, handles: list[RequestHandle], outcome: Outcome) -> None:
        self._metrics.asked(handles[0].request.model or "", outcome, len(handles))

    async def file(self, request: Request) -> Response:
        """`GET /v1/images/files/{name}`: a picture that `response_format: url` pointed to."""
        picture = self._store.get(request.path_params["name"])
        if picture is None:
            raise ApiError(404, "There is no such picture, or it is no longer kept.", code="not_found")
        headers = {"cache-control": "private, max-age=3600, immutable", "x-content-type-options": "nosniff"}
        return Response(picture.data, media_type=picture.media_type, headers=headers)

    async def models(self, request: Request) -> Response:
        """`GET /v1/models`."""
        return _json({"object": "list", "data": list(map(self._describe, self._engine.models.specs))})

    async def model(self, request: Request) -> Response:
        """`GET /v1/models/{id}`."""
        models, name = self._engine.models, request.path_params["model"]
        spec = models.find(name)
        if spec is None:
            raise schema.model_not_found(ModelNotFound(name, tuple(models.specs)))
        return _json(self._describe(spec.name))

    async def health(self, request: Request) -> Response:
        """`GET /health`: this process answers, and is not without any worker. (One that stays so ends by itself.)"""
        if self.is_ready and not self._num_alive():
            raise ApiError(
                503,
                "No worker is alive; they are being started.",
                code="no_worker",
                retry_after_s=NO_WORKER_RETRY_AFTER_S,
            )
        return _json({"status": "ok"})

    def _num_alive(self) -> int:
        """0 also of an engine that has ended."""
        try:
            return self._engine.stats().num_alive
        except GenerationError:
            return 0

    async def ready(self, request: Request) -> Response:
        """`GET /ready`: the engine takes requests."""
        self._check_ready()
        if self.is_draining:
            raise draining()
        try:
            stats = self._engine.stats()
        except GenerationError as error:
            raise ApiError(503, f"The engine is not ready: {error}", code="not_ready") from None
        if stats.num_alive == len(stats.recovery.overdue):
            raise ApiError(503, "No device is alive and answers.", code="not_ready")
        counts = {name: getattr(stats, name) for name in ("num_devices", "num_alive", "num_queued", "num_admitted")}
        counts["num_overdue"] = len(stats.recovery.overdue)
        counts["num_returning"] = stats.num_devices - stats.num_alive
        return _json({"status": "ready", "models": list(self._engine.models.specs), **counts})

    async def metrics(self, request: Request) -> Response:
        """`GET /metrics`, for Prometheus; answers while the engine loads, too."""
        return Response(self._metrics.text(), headers={"content-type": MEDIA_TYPE})

    def _describe(self, model: str) -> dict[str, object]:
        aliases = self._engine.models.aliases(model)
        return {"id": model, "object": "model", "created": self._created, "owned_by": "tetrion", "aliases": aliases}

    def _model_of(self, body: schema.GenerationBody) -> tuple[str | None, tuple[str, ...]]:
        """The model to draw with, and what to warn of. Where only one is served it draws under any name: clients have
        names of other services built in."""
        models = self._engine.models
        if body.model is None or models.find(body.model) is not None or len(models.specs) > 1:
            return body.model, ()
        only = models.default.name
        return only, (f"model: {shown(body.model)} is not served here; {only} drew, the only one that is",)

    def _warn_of_words(self, request: ImageRequest) -> tuple[str, ...]:
        spec = self._engine.models.specs[request.model or ""]
        words = unknown_words(spec, request.prompt)
        return (f"prompt: {spec.name} does not know: {one_line(', '.join(words))}",) if words else ()

    def _check_ready(self) -> None:
        if not self.is_ready:
            raise ApiError(503, "The engine is not ready.", code="not_ready", retry_after_s=1)

    def _submit(self, requests: list[ImageRequest], body: schema.GenerationBody) -> list[RequestHandle]:
        """All of `requests` or none."""
        handles: list[RequestHandle] = []
        try:
            for request in requests:
                handles.append(self._engine.submit(request))
        except (RequestError, EngineOverloaded, GenerationError) as error:
            for handle in handles:
                handle.cancel()
            if isinstance(error, RequestError):
                raise schema.invalid_request(error, body) from None
            self._metrics.asked(self._served_model(requests[0]), "refused", len(requests))
            match error:
                case DeadlineUnmeetable():
                    raise _deadline_unmeetable(error) from None
                case EngineOverloaded():
                    raise _overloaded(error, has_deadline=body.slo_ms is not None) from None
                case GenerationError():
                    raise ApiError(503, f"Not accepted: {error}", code="not_ready") from None
        return handles

    def _served_model(self, request: ImageRequest) -> str:
        models = self._engine.models
        return (models.default if request.model is None else models.find(request.model) or models.default).name

    def _reserve(self, body: schema.GenerationBody, handles: list[RequestHandle]) -> Reservation:
        """Room for the pictures if they are to be fetched by URL, else none."""
        if body.response_format != "url":
            return self._store.reserve(0)
        num_bytes = sum(_max_encoded_bytes(handle.request) for handle in handles)
        try:
            return self._store.reserve(num_bytes)
        except StoreFull as full:
            if full.retry_after_s is None:
                message = f"n: {full}; ask for fewer or smaller pictures, or response_format b64_json"
                raise ApiError(400, message, param="n", code="picture_store_too_small") from None
            wait_s = math.ceil(full.retry_after_s)
            raise ApiError(
                503,
                f"The picture store is full; ask for response_format b64_json, or again in {wait_s} s.",
                param="response_format",
                code="picture_store_full",
                retry_after_s=wait_s,
                should_retry=wait_s <= LONG_WAIT_S,
            ) from None

    async def _draw(
        self,
        handles: list[RequestHandle],
        body: schema.GenerationBody,
        reservation: Reservation,
        base_url: str,
    ) -> list[_Encoded]:
        """All pictures, in order. The first failure is raised at once; the caller cancels the rest."""
        tasks = [asyncio.create_task(self._picture(handle, body, reservation, base_url)) for handle in handles]
        try:
            return await asyncio.gather(*tasks)
        except Displaced as error:
            raise _overloaded(error, has_deadline=body.slo_ms is not None) from None
        except QueueTimeout as error:
            message, code = f"The server is overloaded: {error}", "queue_timeout"
            raise ApiError(503, message, code=code, retry_after_s=OVERLOAD_RETRY_AFTER_S) from None
        except GenerationError as error:
            log.error("generation failed: %s", error)
            raise ApiError(500, f"Generation failed: {error}", code="generation_failed") from None
        except RequestCancelled:
            raise ApiError(503, "The request was cancelled by the server.", code="cancelled") from None
        finally:
            await _end(*tasks)

    async def _picture(
        self, handle: RequestHandle, body: schema.GenerationBody, reservation: Reservation, base_url: str
    ) -> _Encoded:
        result = await handle.result()
        drawn_s = time.monotonic()
        self._metrics.observe(result)
        slo_ms, is_url = handle.request.slo_ms, body.response_format == "url"
        due_s = None if slo_ms is None else drawn_s - result.latency_s + slo_ms / 1e3
        image, result = result.image, msgspec.structs.replace(result, image=None)

        def encode(each: Each) -> bytes:
            text = pictures.metadata(result)
            encoded = pictures.encode(image, body.output_format or "png", body.output_compression, text, each)
            return encoded if is_url else binascii.b2a_base64(encoded, newline=False)

        data = await self._encoders.run(encode, due_s)
        made_s = time.monotonic() - drawn_s
        if not is_url:
            return _Encoded(result=result, drawn_s=drawn_s, made_s=made_s, base64=data)
        picture_format = body.output_format or "png"
        name = self._store.put(reservation, data, pictures.MEDIA_TYPES[picture_format], picture_format)
        url = f"{base_url}/v1/images/files/{name}"
        return _Encoded(result=result, drawn_s=drawn_s, made_s=made_s, url=url)

    def _answer(self, encoded: list[_Encoded], response: schema.GenerationResponse) -> PicturesAnswer:
        base64s = [picture.base64 for picture in encoded if picture.base64 is not None]
        made = [(picture.result, picture.made_s) for picture in encoded]
        delivery = _Delivery(self._engine, self._metrics, response.output_format, made)
        return PicturesAnswer(body_parts(response, base64s), delivery)

    def _response(
        self, body: schema.GenerationBody, asked: ImageRequest, encoded: list[_Encoded], warnings: tuple[str, ...]
    ) -> schema.GenerationResponse:
        """Without the pictures themselves. `asked`: one of the requests."""
        first, now_s = encoded[0].result, time.monotonic()
        sizes = self._engine.models.specs[first.model].sizes
        num_image_tokens = sizes.num_rows(first.width, first.height) * len(encoded)
        num_picture_tokens = sum(sizes.num_rows(*picture.size) for picture in asked.pictures)
        return schema.GenerationResponse(
            created=int(time.time()),
            background="opaque",
            output_format=body.output_format or "png",
            quality="high",
            size=f"{first.width}x{first.height}",
            model=first.model,
            data=[
                schema.describe_picture(
                    picture.result,
                    asked.slo_ms,
                    now_s - picture.drawn_s,
                    b64_json=None if picture.base64 is None else NO_PICTURE,
                    url=picture.url,
                )
                for picture in encoded
            ],
            usage=schema.usage(first.num_text_tokens, num_image_tokens, num_picture_tokens),
            warnings=warnings,
        )

    def _base_url(self, request: Request) -> str:
        return self._public_url or str(request.base_url).rstrip("/")


class _Delivery:
    """Says to the engine what came of an answer's pictures, counts and logs them. It keeps no picture: a client may
    take long to read."""

    def __init__(
        self,
        engine: AsyncEngine,
        metrics: Metrics,
        picture_format: pictures.PictureFormat,
        made: list[tuple[ImageResult, float]],
    ) -> None:
        """`made`: each picture's result, without the image, and what encoding it has taken."""
        self._engine, self._metrics, self._format, self._made = engine, metrics, picture_format, made

    def delivered(self, sent_s: float) -> None:
        """Sending counts as much as making at most: the rest is the client's."""
        for result, made_s in self._made:
            own_s = made_s + min(made_s, sent_s / len(self._made))
            delivered = self._engine.delivered(result.request_id, own_s)
            if delivered is not None:
                self._metrics.delivered(result, delivered, self._format)
                logs.drawn(result, delivered)

    def dropped(self) -> None:
        for result, _ in self._made:
            self._engine.not_delivered(result.request_id)


async def _read_edit(request: Request) -> EditBody:
    """Forms and JSON are taken apart in a thread: they are large. Raises ApiError, ClientDisconnect."""
    data, is_form = await read_form_or_json(request, request.app.state.allowed_origins)
    if is_form:
        return await asyncio.to_thread(decode_form, request.headers["content-type"], data)
    return await asyncio.to_thread(decode_json, data)


def _text_bytes(body: schema.GenerationBody) -> int:
    return text_bytes(body.prompt, body.negative_prompt, body.user, body.model)


async def _unless_disconnected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled if the client goes away first. Raises ClientDisconnect then."""
    working = asyncio.create_task(work)
    watching = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        await _end(working, watching)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        continue


async def _end(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _outcome(error: BaseException) -> Outcome:
    """Of pictures that were not sent."""
    if isinstance(error, ClientDisconnect | asyncio.CancelledError):
        return "cancelled"
    if isinstance(error, ApiError) and error.status != 500:
        return "cancelled" if error.detail.code == "cancelled" else "refused"
    return "failed"


def _max_encoded_bytes(request: ImageRequest) -> int:
    """More than a picture of this request can take in any format: noise in a PNG takes its raw size and a little."""
    raw_bytes = 3 * (request.width or 0) * (request.height or 0)
    return raw_bytes * 5 // 4 + 4 * len(request.prompt) + 16_384


def _deadline_unmeetable(error: DeadlineUnmeetable) -> ApiError:
    """The same deadline would be refused again: the client is told which one would not."""
    return ApiError(
        429,
        f"The deadline cannot be met: {error}",
        param="slo_ms",
        code="deadline_unmeetable",
        should_retry=False,
        earliest_slo_ms=error.earliest_slo_ms,
    )


def _overloaded(error: EngineOverloaded | Displaced, has_deadline: bool) -> ApiError:
    """Without a deadline the client may try again; with one, its retries would only amplify the overload."""
    message = f"The server is overloaded: {error}"
    if has_deadline:
        return ApiError(429, message, code="engine_overloaded", should_retry=False)
    return ApiError(429, message, code="engine_overloaded", retry_after_s=OVERLOAD_RETRY_AFTER_S)


def _json(value: object) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
