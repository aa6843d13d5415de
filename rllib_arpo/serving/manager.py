"""`Manager`: the one replica that gives engines other weights and gathers numbers.

Other weights reach the engines in two steps, see `engine_deployment`:

1. All replicas load them beside the old ones. If one cannot, nothing has changed.
2. Serve's controller is told of a new `user_config`, with all else of the application
   as it holds it. Since the code's version is the same it restarts nothing, but calls
   `reconfigure`; and a replica that starts later begins with the new weights. While
   `reconfigure` runs, the controller takes a replica off its routers, which step 1
   makes a matter of a moment.

A model whose source is an alias of a registry follows it. The last act wins: weights of
an explicit reload stay until the alias moves again, and also if this replica starts
anew, since `user_config` says which version the alias meant. An application that is
started anew begins with what the alias means by then.
"""

import asyncio
import contextvars
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, Gauge
from prometheus_client.exposition import generate_latest
from ray import serve
from ray.exceptions import RayTaskError

from rllib_arpo.agent_weights import (
    REGISTERED,
    Weights,
    find_weights,
    vocabulary_of,
)
from rllib_arpo.errors import ARPOError, ConfigError, EngineError
from rllib_arpo.serving.engine_client import EngineLostError
from rllib_arpo.serving.serve_engine import LOST, ServeEngine
from rllib_arpo.serving.user_configs import set_user_config, user_configs
from rllib_arpo.tracking.mlflow_store import import_mlflow

logger = logging.getLogger(__name__)

AGENT = "agent"
MANAGER = "manager"
# Key of `user_config`: what the alias of the model's source meant, such as "3".
ALIAS = "alias"
# Longest time until weights that could not be loaded are tried again.
MAX_DELAY_S = 600.0
# Between two looks whether the engines follow the controller.
LOOK_S = 0.05
TAKE_OVER_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ManagedModel:
    """A model, whatever weights it has.

    Attributes:
        source: what a reload without a checkpoint looks at.
        version: of the weights that it starts with.
        deployment: name of its engine's.
    """

    source: str
    version: str
    deployment: str


@dataclass(slots=True, kw_only=True)
class Tries:
    """When weights that could not be loaded are tried again: ever more rarely.

    Attributes:
        first_s: seconds to the second try; the later ones take twice as long each, and
            at most `MAX_DELAY_S`.
        version: that could not be loaded; another one is tried at once.
        delay_s: between the last try and the next.
        again_s: time of the next.
    """

    first_s: float
    version: str = ""
    delay_s: float = 0.0
    again_s: float = 0.0

    def may_try(self, version: str, now_s: float) -> bool:
        """Whether it is time."""
        return version != self.version or now_s >= self.again_s

    def failed(self, version: str, now_s: float) -> None:
        """It could not be loaded, again."""
        again = version == self.version
        self.delay_s = min(2 * self.delay_s, MAX_DELAY_S) if again else self.first_s
        self.version, self.again_s = version, now_s + self.delay_s


class Manager:
    """Body of the deployment `manager`.

    Args:
        models: model name -> the model.
        engines: model name -> handle of its engine deployment.
        poll_s: seconds between two looks at aliases of a registry.
    """

    def __init__(
        self,
        models: Mapping[str, ManagedModel],
        engines: Mapping[str, Any],
        *,
        poll_s: float,
    ) -> None:
        self._models = models
        self._engines = engines
        self._lock = asyncio.Lock()
        self._app = serve.get_replica_context().app_name
        if any(model.source.startswith(REGISTERED) for model in models.values()):
            import_mlflow()
        # Looked at from the start: the weights' files may be gone at a reload.
        self._vocabularies = {
            name: asyncio.ensure_future(self._vocabulary(name)) for name in models
        }
        # Kept, for the event loop holds tasks weakly.
        self._reloads: set[asyncio.Task[dict[str, str]]] = set()
        self._following = [
            asyncio.ensure_future(self._follow(name, poll_s))
            for name, model in models.items()
            if model.source.startswith(REGISTERED)
        ]

    async def reload(
        self, model: str | None = None, checkpoint: str | None = None
    ) -> dict[str, str]:
        """Give engines other weights; returns when all their replicas have them.

        It goes on to its end if whoever asked hangs up. Tools, limits and sampling stay
        those that the application was started with.

        Args:
            model: None for all.
            checkpoint: a source, see `find_weights`, of one model; None for the model's
                own, which leads to newer weights than before if it is a run or an
                alias.

        Returns:
            Model -> version.

        Raises:
            ConfigError, CheckpointError: there are no such weights, they belong to
                another tokenizer, or to which of several models is not said; nothing
                changed.
            EngineError: an engine does not start with them; nothing changed.
            EngineLostError: a replica is gone; ask again.
        """
        names = list(self._models) if model is None else [model]
        if checkpoint is not None and len(names) > 1:
            raise ConfigError(f"`model` must say for which of {names} it is")
        # Serve cancels a request and what was asked in its context.
        task = asyncio.create_task(
            self._reload(names, checkpoint), context=contextvars.Context()
        )
        self._reloads.add(task)
        task.add_done_callback(self._reloads.discard)
        return await asyncio.shield(task)

    async def _reload(
        self, names: Sequence[str], checkpoint: str | None
    ) -> dict[str, str]:
        async with self._lock:
            configs = {name: await self._prepare(name, checkpoint) for name in names}
            return await self._take(configs)

    async def _take(self, configs: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
        """Let models take weights that their engines have loaded."""
        deployments = {
            self._models[name].deployment: config for name, config in configs.items()
        }
        await asyncio.to_thread(set_user_config, self._app, deployments)
        versions = {name: config["version"] for name, config in configs.items()}
        for name, version in versions.items():
            await self._taken_over(name, version)
            logger.info("model %s has version %s of the weights", name, version)
        return versions

    async def expositions(self) -> dict[str, str]:
        """Replica -> its numbers, in Prometheus' text format, of agents and engines."""
        agents = serve.get_deployment_handle(AGENT, app_name=self._app)
        texts = dict(await of_all(agents, "exposition"))
        for name, engine in self._engines.items():
            for number, numbers in enumerate(await of_all(engine, "metrics")):
                texts[f"{name}/{number}"] = engine_exposition(name, numbers)
        return texts

    async def _prepare(self, name: str, checkpoint: str | None) -> dict[str, str]:
        """What `user_config` becomes; all replicas have loaded the weights."""
        model = self._models[name]
        # Before the weights: if the alias moves meanwhile, the next look loads again.
        alias = (
            {ALIAS: await self._alias_version(name)}
            if model.source.startswith(REGISTERED)
            else {}
        )
        weights = await asyncio.to_thread(find_weights, checkpoint or model.source)
        await self._refuse_other_vocabulary(name, weights)
        engine = ServeEngine(self._engines[name])
        version = await engine.prepare(weights.source, weights.version)
        return {"source": weights.source, "version": version, **alias}

    async def _user_config(self, name: str) -> Mapping[str, str]:
        deployment = self._models[name].deployment
        configs = await asyncio.to_thread(user_configs, self._app)
        return configs[deployment]

    async def _vocabulary(self, name: str) -> str | None:
        """Of the weights that engines have; None if their files cannot be read."""
        try:
            source = (await self._user_config(name))["source"]
            return await asyncio.to_thread(lambda: vocabulary_of(find_weights(source)))
        except Exception as error:  # boundary: a check less, and nothing else
            logger.warning("the vocabulary of %s is not known: %s", name, error)
            return None

    async def _refuse_other_vocabulary(self, name: str, weights: Weights) -> None:
        served = await self._vocabularies[name]
        if served is None:
            return
        if await asyncio.to_thread(vocabulary_of, weights) != served:
            raise ConfigError(
                f"{weights.source} has another vocabulary than the tokenizer that "
                f"{name} is served with: its text would be garbage; give weights that "
                "were trained from the same model, or start the server with these"
            )

    async def _alias_version(self, name: str) -> str:
        """What the source means; what it meant before if the registry is away."""
        from rllib_arpo.tracking.registry import model_version

        model = self._models[name]
        try:
            return await asyncio.to_thread(model_version, model.source)
        except ARPOError as error:
            logger.warning("%s cannot be looked up: %s", model.source, error)
            return await self._held_version(name)

    async def _held_version(self, name: str) -> str:
        """What the source meant when weights were last loaded."""
        started = self._models[name].version.rpartition("/")[2]
        return (await self._user_config(name)).get(ALIAS, started)

    async def _taken_over(self, name: str, version: str) -> None:
        """Return when all replicas begin answers with that version."""
        try:
            async with asyncio.timeout(TAKE_OVER_TIMEOUT_S):
                while True:
                    states = await of_all(self._engines[name], "state")
                    failed = [one.failure for one in states if one.failure]
                    if failed:
                        raise EngineError(f"{name} keeps its weights: {failed[0]}")
                    if states and all(one.newest == version for one in states):
                        return
                    await asyncio.sleep(LOOK_S)
        except TimeoutError as error:
            raise EngineLostError(
                f"not all engines of {name} have version {version} after "
                f"{TAKE_OVER_TIMEOUT_S:g} s"
            ) from error

    async def _follow(self, name: str, poll_s: float) -> None:
        """Reload whenever the source means another version of a registered model."""
        tries = Tries(first_s=poll_s)
        while True:
            await asyncio.sleep(poll_s)
            version = ""
            try:
                version = await self._alias_version(name)
                if tries.may_try(version, time.monotonic()):
                    await self._follow_to(name, version)
            except Exception as error:  # boundary: a later look may go well
                tries.failed(version, time.monotonic())
                logger.warning("%s keeps its weights: %s", name, error)

    async def _follow_to(self, name: str, version: str) -> None:
        # Asked under the lock: a reload that came meanwhile was the last act.
        async with self._lock:
            if version != await self._held_version(name):
                await self._take({name: await self._prepare(name, None)})


async def ask(response: Any) -> Any:
    """What a call of a deployment gives, with errors as the replica raised them.

    Raises:
        ARPOError: as in the replica.
        EngineLostError: the replica is gone.
    """
    try:
        return await response
    except RayTaskError as error:
        if isinstance(error.cause, ARPOError):
            raise error.cause from None
        raise
    except LOST as error:
        raise EngineLostError(f"a replica is gone: {error}") from error


async def of_all(handle: Any, method: str) -> list[Any]:
    """What all replicas of a deployment answer; none if one is gone meanwhile."""
    try:
        return await handle.broadcast(method).results_async()
    except LOST as error:
        logger.debug("a replica is gone", exc_info=error)
        return []


def engine_exposition(model: str, numbers: Mapping[str, float]) -> str:
    """Numbers of an engine's replica in Prometheus' text format."""
    registry = CollectorRegistry()
    for name, value in numbers.items():
        gauge = Gauge(
            f"rllib_arpo_engine_{name}",
            "See Engine.metrics.",
            ["model"],
            registry=registry,
        )
        gauge.labels(model).set(value)
    return generate_latest(registry).decode()
