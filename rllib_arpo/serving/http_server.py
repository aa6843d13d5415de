"""What the routes of the HTTP server work with, and the errors that they declare."""

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from rllib_arpo.serving.http_settings import HttpSettings
from rllib_arpo.serving.openai_api import (
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionRequest,
    ErrorBody,
)
from rllib_arpo.serving.serve_metrics import ServeMetrics

ERRORS = {
    400: "The request is wrong; `param` names the field.",
    401: "No key, or a wrong one.",
    403: "The server has no keys and answers only its own machine.",
    404: "There is no such model.",
    408: "The answer took too long.",
    413: "The body is too long.",
    415: "The body is not declared as JSON.",
    429: "Too many requests at once.",
    500: "The server failed.",
    503: "The engine is gone, or not there yet; ask again.",
}
CHAT_ERRORS = (400, 401, 403, 404, 408, 413, 415, 429, 500, 503)
READ_ERRORS = (401, 403, 413, 500)
OPEN_ERRORS = (413, 500)


class Service(Protocol):
    """What answers: `ChatService`."""

    def models(self) -> list[str]:
        """Names of the models."""
        ...

    async def complete(self, request: ChatCompletionRequest) -> ChatCompletion:
        """Answer in one piece."""
        ...

    def stream(
        self, request: ChatCompletionRequest
    ) -> AsyncIterator[ChatCompletionChunk]:
        """Answer piece by piece; a generator."""
        ...


Reload = Callable[[str | None, str | None], Awaitable[Mapping[str, str]]]
MetricsOfAll = Callable[[], Awaitable[Mapping[str, str]]]
ReadyModels = Callable[[], Awaitable[Mapping[str, bool]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpServer:
    """What the routes work with; `make_http_app` says what the parts are."""

    service: Service
    settings: HttpSettings
    metrics: ServeMetrics
    reload: Reload | None
    metrics_of_all: MetricsOfAll | None
    ready: ReadyModels | None
    started: int


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Declares answers that are error objects."""
    return {one: {"model": ErrorBody, "description": ERRORS[one]} for one in statuses}
