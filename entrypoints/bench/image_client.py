"""One request to a server with OpenAI's image API, and when the bytes of its answer came. Any such server will do.

Times are seconds on CLOCK_MONOTONIC. Knows nothing of loads, tables and results. Needs httpx.
"""

import json
import mimetypes
import time
from collections.abc import Mapping, Sequence
from typing import Any, Self

import msgspec

from tetrion.entrypoints.errors import InputError

GENERATIONS, EDITS, MODELS = "/v1/images/generations", "/v1/images/edits", "/v1/models"
TOO_MANY_REQUESTS = 429
MAX_MESSAGE_CHARS = 200
_BODY_SENT, _HEAD_CAME = "send_request_body.complete", "receive_response_headers.complete"


class InputFile(msgspec.Struct, frozen=True):
    """A picture to send, read once."""

    name: str
    data: bytes

    @property
    def media_type(self) -> str:
        return mimetypes.guess_type(self.name)[0] or "application/octet-stream"


class Answer(msgspec.Struct, kw_only=True):
    """What came back. `begun_s`: before anything was sent; `sent_s`: the request's last byte; `first_byte_s`: the
    answer's head; `first_partial_s`: a stream's first preview; `last_byte_s`; None: that never came. `error`: what went
    wrong, None: pictures came. `pictures`: the entries of `data`, or a stream's last events, pictures left out."""

    begun_s: float
    sent_s: float | None = None
    first_byte_s: float | None = None
    first_partial_s: float | None = None
    last_byte_s: float | None = None
    status: int | None = None
    error: str | None = None
    num_bytes: int = 0
    pictures: list[dict[str, Any]] = []

    @property
    def is_refused(self) -> bool:
        return self.status == TOO_MANY_REQUESTS


def import_httpx() -> Any:
    try:
        import httpx
    except ImportError:
        raise InputError("url: needs httpx; install it with pip install httpx") from None
    return httpx


class ImageClient:
    """An asynchronous context manager. `url`: with or without /v1 at its end."""

    def __init__(self, url: str, api_key: str | None = None, timeout_s: float | None = None) -> None:
        """Raises InputError for what is no URL."""
        self._httpx = import_httpx()
        self.url = url.rstrip("/").removesuffix("/v1")
        try:
            parsed = self._httpx.URL(self.url)
        except self._httpx.InvalidURL as error:
            raise InputError(f"url: {url!r} is none: {error}") from None
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise InputError(f"url: expected http://HOST:PORT or https://…, got {url!r}")
        self._client = self._httpx.AsyncClient(
            limits=self._httpx.Limits(max_connections=None, max_keepalive_connections=64),
            timeout=timeout_s,
            headers={"authorization": f"Bearer {api_key}"} if api_key else {},
        )

    async def __aenter__(self) -> Self:
        await self._client.__aenter__()
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self._client.__aexit__(*exception)

    async def first_model(self) -> str | None:
        """The first id of `/v1/models`; None of a server without that page. Raises InputError if nobody answers."""
        try:
            response = await self._client.get(self.url + MODELS, timeout=10.0)
        except self._httpx.HTTPError as error:
            raise InputError(f"url: {self.url} does not answer: {_named(error)}") from None
        try:
            return str(response.raise_for_status().json()["data"][0]["id"])
        except (self._httpx.HTTPError, ValueError, LookupError, TypeError):
            return None

    async def draw(self, body: Mapping[str, Any], images: Sequence[InputFile] = ()) -> Answer:
        """Generate, or edit `images`. Whatever goes wrong is in the answer."""
        answer = Answer(begun_s=time.monotonic())

        async def trace(event: str, _: Mapping[str, Any]) -> None:
            if event.endswith(_BODY_SENT):
                answer.sent_s = time.monotonic()
            elif event.endswith(_HEAD_CAME):
                answer.first_byte_s = time.monotonic()

        content = _multipart(body, images) if images else {"json": dict(body)}
        path = EDITS if images else GENERATIONS
        try:
            async with self._client.stream("POST", self.url + path, extensions={"trace": trace}, **content) as response:
                answer.status = response.status_code
                if response.is_success and "event-stream" in response.headers.get("content-type", ""):
                    await _read_events(response, answer)
                else:
                    _read_whole(await response.aread(), response.is_success, answer)
        except self._httpx.HTTPError as error:
            answer.error = _named(error)
        return answer


def _multipart(body: Mapping[str, Any], images: Sequence[InputFile]) -> dict[str, Any]:
    """As OpenAI's own client sends it: one picture is `image`, several are `image[]`."""
    name = "image" if len(images) == 1 else "image[]"
    fields = {key: value if isinstance(value, str) else json.dumps(value) for key, value in body.items()}
    return {"data": fields, "files": [(name, (image.name, image.data, image.media_type)) for image in images]}


def _read_whole(data: bytes, is_success: bool, answer: Answer) -> None:
    answer.last_byte_s, answer.num_bytes = time.monotonic(), len(data)
    try:
        decoded = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError):
        decoded = None
    if not is_success:
        answer.error = _message(decoded) or f"HTTP {answer.status}"
        return
    pictures = decoded.get("data") if isinstance(decoded, dict) else None
    if not isinstance(pictures, list) or not pictures or not all(isinstance(picture, dict) for picture in pictures):
        answer.error = "the answer holds no pictures"
        return
    answer.pictures = [_without_picture(picture) for picture in pictures]


async def _read_events(response: Any, answer: Answer) -> None:
    """Server-sent events, of which only the data counts: its `type` says what each is."""
    async for line in response.aiter_lines():
        answer.num_bytes += len(line) + 1
        if not line.startswith("data:") or (text := line[5:].strip()) == "[DONE]":
            continue
        came_s = time.monotonic()
        try:
            event = msgspec.json.decode(text)
        except msgspec.DecodeError:
            answer.error = "an event is no JSON"
            return
        if not isinstance(event, dict):
            continue
        kind = str(event.get("type", ""))
        if kind.endswith(".partial_image"):
            answer.first_partial_s = answer.first_partial_s or came_s
        elif kind.endswith(".completed"):
            answer.pictures.append(_without_picture(event))
            answer.last_byte_s = came_s
        elif kind == "error" or "error" in event:
            answer.error = _message(event) or "error"
    if not answer.pictures and answer.error is None:
        answer.error = "the stream ended without a picture"


def _without_picture(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key not in ("b64_json", "url")}


def _message(decoded: Any) -> str | None:
    error = decoded.get("error", decoded) if isinstance(decoded, dict) else decoded
    message = error.get("message") or error.get("detail") if isinstance(error, dict) else error
    return None if message is None else str(message)[:MAX_MESSAGE_CHARS]


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:MAX_MESSAGE_CHARS].rstrip(": ")
