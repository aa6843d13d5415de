"""The HTTP server of agents: OpenAI's chat completions, and what an operator needs.

    /  /playground/{file}        the page to try an agent in a browser; open to all
    /v1/chat/completions         /v1/models  /v1/models/{id}
    /health  /metrics            /admin/reload  /openapi.json

A request passes, from the outside in: metrics, headers for browsers, errors to answers,
keys, requests at once, length of the body. All are plain ASGI, so a stream and its
cancellation pass through them. Nothing here knows Ray.
"""

import time
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.responses import Response

from rllib_arpo.serving.access import Guard
from rllib_arpo.serving.api_errors import ErrorBoundary, failure_of
from rllib_arpo.serving.chat_routes import chat_routes, model_routes
from rllib_arpo.serving.http_server import (
    HttpServer,
    MetricsOfAll,
    ReadyModels,
    Reload,
    Service,
)
from rllib_arpo.serving.http_settings import HttpSettings
from rllib_arpo.serving.limits import BodyLimit, ConcurrencyLimit
from rllib_arpo.serving.operator_routes import operator_routes
from rllib_arpo.serving.page_routes import SecurityHeaders, page_routes
from rllib_arpo.serving.serve_metrics import Measured, ServeMetrics

__all__ = ["HttpSettings", "make_http_app"]


def make_http_app(
    service: Service,
    settings: HttpSettings,
    *,
    reload: Reload | None = None,
    metrics_of_all: MetricsOfAll | None = None,
    ready: ReadyModels | None = None,
) -> FastAPI:
    """The app; its numbers are `app.state.metrics`, a `ServeMetrics`.

    Args:
        service: answers; it belongs to the caller.
        settings: keys and limits.
        reload: takes model and checkpoint as in `ReloadRequest`, returns model ->
            version; a `ConfigError`, `CheckpointError` or `DataError` is the client's
            fault. `POST /admin/reload` is off without it.
        metrics_of_all: replica -> its `ServeMetrics.exposition()`, for all replicas;
            `/metrics` gives those of this app alone without it.
        ready: model -> whether its engine answers; all do without it.
    """
    server = HttpServer(
        service=service,
        settings=settings,
        metrics=ServeMetrics(),
        reload=reload,
        metrics_of_all=metrics_of_all,
        ready=ready,
        started=int(time.time()),
    )
    app = FastAPI(
        title="rllib_arpo",
        summary="Agents that use tools, behind OpenAI's chat completions.",
        docs_url=None,  # its page loads scripts from elsewhere
        redoc_url=None,
        middleware=[
            Middleware(Measured, metrics=server.metrics),
            Middleware(SecurityHeaders),
            Middleware(ErrorBoundary),
            Middleware(Guard, settings=settings),
            Middleware(ConcurrencyLimit, settings=settings),
            Middleware(BodyLimit, settings=settings),
        ],
        exception_handlers={HTTPException: _answer, RequestValidationError: _answer},
    )
    app.state.metrics = server.metrics
    for routes in (chat_routes, model_routes, operator_routes):
        app.include_router(routes(server))
    app.include_router(page_routes())
    _leave_out_422(app)
    return app


async def _answer(request: Request, error: Exception) -> Response:
    return failure_of(error).response()


def _leave_out_422(app: FastAPI) -> None:
    """FastAPI declares its own answer to a wrong request, which is never given here."""
    for_app = app.openapi

    def openapi() -> dict[str, Any]:
        document = for_app()
        for path in document["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            document["components"]["schemas"].pop(name, None)
        return document

    app.openapi = openapi
