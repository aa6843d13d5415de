"""The routes of OpenAI's API: chat completions and models."""

from fastapi import APIRouter, Request
from starlette.responses import Response

from rllib_arpo.serving.http_server import CHAT_ERRORS, READ_ERRORS, HttpServer, errors
from rllib_arpo.serving.json_body import JsonRoute
from rllib_arpo.serving.limits import (
    CHAT_PATH,
    count_answers,
    wall_time,
    within_limits,
)
from rllib_arpo.serving.openai_api import (
    ChatCompletion,
    ChatCompletionRequest,
    Model,
    ModelList,
    UnknownModelError,
)
from rllib_arpo.serving.sse import EventStream, Pace, unless_hung_up


def chat_routes(server: HttpServer) -> APIRouter:
    """`/v1/chat/completions`."""
    router = APIRouter(route_class=JsonRoute)
    settings, metrics, pace = server.settings, server.metrics, Pace()

    async def complete(request: ChatCompletionRequest) -> ChatCompletion:
        async with wall_time(settings.max_request_s):
            return await server.service.complete(request)

    @router.post(
        CHAT_PATH,
        response_model=ChatCompletion,
        responses=errors(*CHAT_ERRORS)
        | {200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}},
    )
    async def chat_completions(
        body: ChatCompletionRequest, request: Request
    ) -> Response:
        """Go on with a conversation; with `stream` as server-sent events."""
        body = within_limits(body, settings)
        count_answers(request.scope, body.n or 1)
        if body.stream:
            chunks = metrics.watch(server.service.stream(body))
            return EventStream(chunks, max_s=settings.max_request_s, pace=pace)
        completion = await unless_hung_up(request.receive, complete(body))
        metrics.answered(completion)
        return Response(completion.model_dump_json(), media_type="application/json")

    return router


def model_routes(server: HttpServer) -> APIRouter:
    """`/v1/models` and one of them."""
    router = APIRouter()

    @router.get("/v1/models", responses=errors(*READ_ERRORS))
    async def list_models() -> ModelList:
        """All models."""
        names = server.service.models()
        return ModelList(data=[Model(id=one, created=server.started) for one in names])

    @router.get("/v1/models/{model_id:path}", responses=errors(*READ_ERRORS, 404))
    async def retrieve_model(model_id: str) -> Model:
        """One model."""
        names = server.service.models()
        if model_id not in names:
            raise UnknownModelError(
                f"there is no model {model_id!r}; there is {names}", param="model"
            )
        return Model(id=model_id, created=server.started)

    return router
