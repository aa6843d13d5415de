"""Turns of a model from the replicas of a Ray Serve deployment."""

from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, contextmanager
from typing import Any

from ray.exceptions import (
    ObjectLostError,
    RayActorError,
    RayTaskError,
    TaskCancelledError,
    WorkerCrashedError,
)
from ray.serve.exceptions import BackPressureError, RayServeException

from rllib_arpo.engines.engine import GenerationRequest
from rllib_arpo.errors import ARPOError
from rllib_arpo.serving.engine_client import (
    EngineBusyError,
    EngineChunk,
    EngineLostError,
    VersionGoneError,
)
from rllib_arpo.serving.turn_places import Connection, Places

# What a call of a replica ends with when the replica did not answer.
LOST = (
    *(RayActorError, WorkerCrashedError, ObjectLostError),
    *(TaskCancelledError, RayServeException),
)


class ServeEngine:
    """Replicas of a Ray Serve deployment of `EngineReplica`.

    Serve asks another replica by itself when one dies before it took the request;
    after that a turn is lost.

    Args:
        handle: a `DeploymentHandle` of the deployment.
    """

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self._places = Places(handle.options(method_name="hold", stream=True))

    async def generate(
        self, request: GenerationRequest, *, version: str | None = None
    ) -> AsyncIterator[EngineChunk]:
        """As `TurnEngine.generate`.

        A replica that started after new weights came has no older ones: then another
        replica is asked, over the connection that there is.
        """
        with _replica_errors():
            async with self._places.taken() as first:
                connection: Connection | None = first
                tried: list[Connection] = []
                while connection is not None:
                    tried.append(connection)
                    turn = connection.generate(request, version=version)
                    try:
                        async with aclosing(turn) as chunks:
                            async for chunk in chunks:
                                yield chunk
                        return
                    except VersionGoneError:
                        connection = self._places.another(tried)
                        if version is None or connection is None:
                            raise

    async def prepare(self, source: str, version: str | None = None) -> str:
        """Load weights into every replica, as `EngineReplica.prepare`.

        Returns:
            Their version.

        Raises:
            ConfigError: the weights are not there or cannot be loaded.
            CheckpointError: the checkpoint is not whole.
            EngineError: an engine does not start, or a replica is gone.
        """
        config = {"source": source, "version": version}
        with _replica_errors():
            versions = await self._handle.broadcast("prepare", config).results_async()
        if not versions:
            raise EngineLostError("there is no replica of the engine")
        return versions[0]


@contextmanager
def _replica_errors() -> Iterator[None]:
    """Errors of this package as the replica raised them, and of Ray as a loss."""
    try:
        yield
    except RayTaskError as error:
        # Ray's own has the traceback in its message.
        if isinstance(error.cause, ARPOError):
            raise error.cause from None
        raise
    except BackPressureError as error:
        raise EngineBusyError(
            "too many turns wait for the engine: ask again"
        ) from error
    except LOST as error:
        raise EngineLostError(f"the engine's replica is gone: {error}") from error
