"""Exceptions, as the error objects that clients of OpenAI's API know.

    HttpError, InvalidRequestError ...   say themselves what to answer
    RequestValidationError               400, and the first field that is wrong
    RequestTimeoutError                  408
    EngineLostError, VersionGoneError    503, ask again
    anything else                        500 with a constant text; logged in full

`ErrorBoundary` turns what the layers below it raise into answers, so that none of them
writes an error by itself.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rllib_arpo.errors import ARPOError
from rllib_arpo.serving.engine_client import EngineLostError, VersionGoneError
from rllib_arpo.serving.openai_api import (
    ErrorBody,
    ErrorDetail,
    InvalidRequestError,
    UnknownModelError,
    field_of,
)
from rllib_arpo.serving.turn_sampling import RequestTimeoutError

logger = logging.getLogger(__name__)

INTERNAL = "the server failed; its log says why"
MAX_MESSAGE_CHARS = 1000
MAX_PARAM_CHARS = 200
RETRY_S = "1"
# OpenAI's clients ask again after a 408, which would only take as long again.
NO_RETRY = {"x-should-retry": "false"}

KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
}


class HttpError(ARPOError):
    """A request that a layer of the server refuses.

    Args:
        status: of HTTP, 4xx or 5xx.
        message: what is wrong and what to do.
        param: dotted field that is wrong, if one is.
        code: a word for programs, or None.
        headers: further headers of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = headers or {}


class ClientGoneError(HttpError):
    """The client hung up; nobody reads the answer, but the metrics count it."""

    def __init__(self) -> None:
        super().__init__(499, "the client hung up", code="client_gone")


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """An answer that is an error.

    Attributes:
        status: of HTTP.
        message: for people.
        param: dotted field that is wrong.
        code: for programs.
        headers: further headers.
    """

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def body(self) -> str:
        """The error object as JSON."""
        kind = KINDS.get(
            self.status,
            "invalid_request_error" if self.status < 500 else "server_error",
        )
        detail = ErrorDetail(
            message=self.message[:MAX_MESSAGE_CHARS],
            type=kind,
            param=self.param and self.param[:MAX_PARAM_CHARS],
            code=self.code,
        )
        return ErrorBody(error=detail).model_dump_json()

    def response(self) -> Response:
        """The whole answer."""
        return Response(
            self.body(),
            status_code=self.status,
            media_type="application/json",
            headers=self.headers,
        )


def failure_of(error: Exception) -> Failure:
    """What to answer when that was raised; what nobody foresaw is logged."""
    match error:
        case HttpError():
            return Failure(
                status=error.status,
                message=str(error),
                param=error.param,
                code=error.code,
                headers=error.headers,
            )
        case InvalidRequestError():
            unknown = isinstance(error, UnknownModelError)
            return Failure(
                status=404 if unknown else 400,
                message=str(error),
                param=error.param,
                code=error.code or ("model_not_found" if unknown else None),
            )
        case RequestValidationError():
            return _of_validation(error.errors())
        case EngineLostError() | VersionGoneError():
            lost = isinstance(error, EngineLostError)
            logger.warning("an answer was lost: %s", error)
            return Failure(
                status=503,
                message="the engine that wrote this answer is gone; ask again",
                code="engine_lost" if lost else "version_gone",
                headers={"Retry-After": RETRY_S},
            )
        case RequestTimeoutError():
            return Failure(
                status=408,
                message=str(error),
                code="answer_too_slow",
                headers=NO_RETRY,
            )
        case HTTPException():
            return _of_routing(error)
        case _:
            logger.error("a request failed", exc_info=error)
            return Failure(status=500, message=INTERNAL, code="internal_error")


def _of_validation(errors: Sequence[Mapping[str, Any]]) -> Failure:
    first = errors[0]
    if first["type"] == "json_invalid":
        problem = first.get("ctx", {}).get("error", first["msg"])
        return Failure(status=400, message=f"the body is not JSON: {problem}")
    place = field_of(first["loc"])
    message = f"`{place}`: {first['msg']}" if place else f"the body: {first['msg']}"
    if len(errors) > 1:
        message += f" (and {len(errors) - 1} more)"
    return Failure(status=400, message=message, param=place or None)


def _of_routing(error: HTTPException) -> Failure:
    if error.status_code == 404:
        message = "there is no such path; see /openapi.json"
    elif error.status_code == 405:
        message = "this path takes other methods; see the header `Allow`"
    else:
        message = str(error.detail)
    return Failure(
        status=error.status_code, message=message, headers=error.headers or {}
    )


class ErrorBoundary:
    """ASGI middleware: answers with an error object what the app raises."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def watched(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, watched)
        # Boundary: whatever a request runs into, the server goes on and the client
        # gets an error object. Half an answer can only be cut off.
        except Exception as error:
            if started:
                raise
            await failure_of(error).response()(scope, receive, send)
