"""The image API's handlers: from a decoded body to requests that the engine has taken.

Routes and error handlers are in `app.py`, the bodies in `schema.py`; what becomes of the requests, up to an answer, is
in `drawing.py`.
"""

from __future__ import annotations

import asyncio
import math
import secrets
import time
from typing import TYPE_CHECKING, Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from tetrion.engine.errors import (
    DeadlineUnmeetable,
    EngineOverloaded,
    GenerationError,
    ModelNotFound,
    RequestError,
    one_line,
    shown,
)
from tetrion.engine.families.words import unknown_words
from tetrion.engine.request import ImageRequest
from tetrion.entrypoints.encoders import Encoders
from tetrion.entrypoints.http import schema
from tetrion.entrypoints.http.body import read_form_or_json, read_json
from tetrion.entrypoints.http.draining import draining
from tetrion.entrypoints.http.drawing import Desk, Drawing, max_encoded_bytes, overloaded
from tetrion.entrypoints.http.edits import EditBody, decode_form, decode_json
from tetrion.entrypoints.http.errors import ApiError
from tetrion.entrypoints.http.limits import RequestLimits, Waiting, text_bytes
from tetrion.entrypoints.http.metrics import MEDIA_TYPE, Metrics
from tetrion.entrypoints.http.request_ids import engine_ids
from tetrion.entrypoints.http.store import PictureStore, Reservation, StoreFull

if TYPE_CHECKING:
    from tetrion.engine.api import AsyncEngine, RequestHandle

MAX_WAITING_BYTES = 256 << 20
RANDOM_SEEDS = 2**32
DECODING_AT_ONCE = 2
"""Pictures of requests: each may take some hundred MB meanwhile."""
NO_WORKER_RETRY_AFTER_S = 5
LONG_WAIT_S = 60


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
        self._desk = Desk(engine=engine, metrics=self._metrics, encoders=Encoders(), store=store)
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
        return await self._drawn(request, body, requests, warnings, "image_generation")

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
        return await self._drawn(request, body, requests, warnings, "image_edit")

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
        kind: str,
    ) -> Response:
        """`kind`: what the names of a stream's events begin with."""
        handles = self._submit(requests, body)
        warnings += self._warn_of_words(handles[0].request) + _warn_of_previews(body)
        drawing = Drawing(self._desk, body, handles, warnings)
        try:
            self._limits.check(handles[0].request, len(handles))
            if body.stream:
                return drawing.events(kind)
            with self._reserve(body, handles) as reservation:
                return await drawing.whole(request, reservation, self._base_url(request))
        except BaseException as error:
            drawing.given_up(error)
            raise

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
        if stats.unserved:
            served = f"No device that serves {' or '.join(stats.unserved)} is alive and answers."
            raise ApiError(503, served, code="not_ready")
        counts = {name: getattr(stats, name) for name in ("num_devices", "num_alive", "num_queued", "num_admitted")}
        counts["num_overdue"] = len(stats.recovery.overdue)
        counts["num_returning"] = stats.num_devices - stats.num_alive
        models = list(self._engine.models.specs)
        return _json({"status": "ready", "models": models, "roles": stats.roles, **counts})

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
                    raise overloaded(error, has_deadline=body.slo_ms is not None) from None
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
        num_bytes = sum(max_encoded_bytes(handle.request) for handle in handles)
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

    def _base_url(self, request: Request) -> str:
        return self._public_url or str(request.base_url).rstrip("/")


async def _read_edit(request: Request) -> EditBody:
    """Forms and JSON are taken apart in a thread: they are large. Raises ApiError, ClientDisconnect."""
    data, is_form = await read_form_or_json(request, request.app.state.allowed_origins)
    if is_form:
        return await asyncio.to_thread(decode_form, request.headers["content-type"], data)
    return await asyncio.to_thread(decode_json, data)


def _text_bytes(body: schema.GenerationBody) -> int:
    return text_bytes(body.prompt, body.negative_prompt, body.user, body.model)


def _warn_of_previews(body: schema.GenerationBody) -> tuple[str, ...]:
    if not body.partial_images:
        return ()
    return ("partial_images: no previews are drawn; a stream has each finished picture",)


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


def _json(value: object) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
