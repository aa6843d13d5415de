"""Routes for whoever runs the server: health, numbers, other weights."""

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from rllib_arpo.errors import CheckpointError, ConfigError, DataError, EngineError
from rllib_arpo.serving.api_errors import HttpError
from rllib_arpo.serving.engine_client import EngineLostError
from rllib_arpo.serving.http_server import OPEN_ERRORS, READ_ERRORS, HttpServer, errors
from rllib_arpo.serving.json_body import JsonRoute
from rllib_arpo.serving.openai_api import InvalidRequestError, UnknownModelError
from rllib_arpo.serving.serve_metrics import CONTENT_TYPE, merge_expositions


class ReloadRequest(BaseModel):
    """What to load; without a checkpoint the newest of the model's own source."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = Field(None, max_length=256, description="All without it.")
    checkpoint: str | None = Field(None, max_length=4096)


class ReloadReply(BaseModel):
    """Versions of the weights that answer new requests."""

    models: dict[str, str]


class ModelHealth(BaseModel):
    """Whether a model can be asked."""

    id: str
    ready: bool


class Health(BaseModel):
    """Whether all models can be asked."""

    ready: bool
    models: list[ModelHealth]


def operator_routes(server: HttpServer) -> APIRouter:
    """`/health`, `/metrics` and `/admin/reload`."""
    router = APIRouter(route_class=JsonRoute)

    @router.get(
        "/health",
        response_model=Health,
        responses=errors(*OPEN_ERRORS) | {503: {"model": Health}},
    )
    async def health() -> Response:
        """The models, and whether they can be asked; 503 while one cannot."""
        ready = dict.fromkeys(server.service.models(), True)
        if server.ready is not None:
            ready |= await server.ready()
        report = Health(
            ready=all(ready.values()),
            models=[ModelHealth(id=name, ready=one) for name, one in ready.items()],
        )
        return Response(
            report.model_dump_json(),
            status_code=200 if report.ready else 503,
            media_type="application/json",
        )

    @router.get(
        "/metrics",
        response_class=Response,
        responses=errors(*READ_ERRORS)
        | {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    )
    async def metrics() -> Response:
        """Numbers of all replicas, in Prometheus' text format."""
        if server.metrics_of_all is None:
            text = server.metrics.exposition()
        else:
            text = merge_expositions(await server.metrics_of_all())
        return Response(text, headers={"Content-Type": CONTENT_TYPE})

    @router.post(
        "/admin/reload",
        responses=errors(400, 401, 403, 404, 408, 413, 415, 500, 503),
    )
    async def reload(body: ReloadRequest) -> ReloadReply:
        """Load other weights; answers that have begun are finished with the old."""
        if server.reload is None:
            raise HttpError(403, "this server cannot load other weights")
        if body.model is not None and body.model not in server.service.models():
            raise UnknownModelError(
                f"there is no model {body.model!r}; there is {server.service.models()}",
                param="model",
            )
        if body.model is None and body.checkpoint and len(server.service.models()) > 1:
            raise InvalidRequestError(
                f"`model` must say for which of {server.service.models()} the "
                "checkpoint is",
                param="model",
            )
        try:
            versions = await server.reload(body.model, body.checkpoint)
        except (ConfigError, CheckpointError, DataError) as error:
            raise InvalidRequestError(str(error), param="checkpoint") from error
        except EngineLostError:
            raise
        except EngineError as error:
            raise HttpError(500, str(error), code="reload_failed") from error
        return ReloadReply(models=dict(versions))

    return router
