"""Errors as OpenAI's clients read them: `{"error": {"message", "type", "param", "code"}}` with a fitting status.

OpenAI's client retries 408, 409, 429 and 5xx twice unless told not to by `x-should-retry`. Never shows a traceback.
"""

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tetrion.engine.errors import CheapestPlan


class ErrorDetail(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """OpenAI's four fields. Beside them, only where a deadline was refused, `earliest_slo_ms`: one that can be met; and
    only where an energy budget was, `cheapest_plan`: what would have to be spent."""

    message: str
    type: str
    param: str | None
    code: str | None
    earliest_slo_ms: float | None = None
    cheapest_plan: CheapestPlan | None = None


class ErrorBody(msgspec.Struct, frozen=True, kw_only=True):
    error: ErrorDetail


class ApiError(Exception):
    """An answer that is an error. `retry_after_s` becomes `retry-after`; `should_retry=False` stops the client's own
    retries where they would only add load."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
        should_retry: bool | None = None,
        earliest_slo_ms: float | None = None,
        cheapest_plan: CheapestPlan | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.detail = ErrorDetail(
            message=message,
            type=_type_of(status),
            param=param,
            code=code,
            earliest_slo_ms=earliest_slo_ms,
            cheapest_plan=cheapest_plan,
        )
        self.headers: dict[str, str] = {}
        if retry_after_s is not None:
            self.headers["retry-after"] = str(retry_after_s)
        if should_retry is not None:
            self.headers["x-should-retry"] = "true" if should_retry else "false"


async def refuse(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer with `error`, for what stands in front of the routes."""
    note_refusal(scope, error)
    await error_response(error)(scope, receive, send)


def note_refusal(scope: Scope, error: ApiError) -> None:
    """Leave the reason where it is counted (`http/counters.py`)."""
    scope.setdefault("state", {})["refusal"] = error.detail.code or "other"


def error_response(error: ApiError) -> Response:
    body = msgspec.json.encode(ErrorBody(error=error.detail))
    return Response(body, status_code=error.status, headers=error.headers, media_type="application/json")


def _type_of(status: int) -> str:
    if status == 429:
        return "rate_limit_error"
    return "server_error" if status >= 500 else "invalid_request_error"
