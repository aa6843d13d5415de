"""The Serve application: three kinds of deployments.

    HTTP -> Agent (1..n)  --turns-->   Engine of each model (1..n, GPUs)
                  +--reload, metrics-->  Manager (1)

1. Every model has an engine deployment of its own, as Serve recommends for language
   models: it scales, fails and is loaded without the others. (Serve's multiplexing of
   models swaps them within a replica, which suits many small models.)
2. An agent replica runs the loops of answers, tools included, for all models. It holds
   no weights, so it starts in seconds.
3. The manager gives engines other weights. Answers do not pass through it.

Engines are known to agents and the manager by handles; the manager looks up the agents
when it is asked for their numbers.
"""

import asyncio
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from fastapi import FastAPI
from ray import serve
from ray.serve import Application

from rllib_arpo.agent_weights import REGISTERED, find_weights
from rllib_arpo.agents import (
    AgentSource,
    find_agent,
    require_sandboxed,
    serving_env,
)
from rllib_arpo.errors import ConfigError
from rllib_arpo.serving.access import API_KEYS_VARIABLE
from rllib_arpo.serving.agent import Agent
from rllib_arpo.serving.engine_deployment import EngineReplica, EngineSettings
from rllib_arpo.serving.front import GRACE_S, behind_haproxy
from rllib_arpo.serving.http import make_http_app
from rllib_arpo.serving.http_settings import HttpSettings
from rllib_arpo.serving.manager import AGENT, MANAGER, ManagedModel, Manager, ask
from rllib_arpo.serving.serve_args import ServeArgs
from rllib_arpo.serving.serve_engine import ServeEngine
from rllib_arpo.serving.service import ChatService
from rllib_arpo.serving.trace_numbers import TraceNumbers
from rllib_arpo.tracking.mlflow_answers import AnswerTraces

# A replica takes what comes and lets the engine queue: it batches what it has.
MAX_ONGOING = 1024
# Between two looks whether a replica that stops still has answers to write.
SHUTDOWN_LOOK_S = 0.5
HEALTH_CHECK_PERIOD_S = 5.0
READY_TIMEOUT_S = 2.0


@serve.ingress()
class AgentServer:
    """Answers HTTP requests: body of the ingress deployment.

    Args:
        args: of the application.
        agents: model name -> all of it but the weights.
        engines: model name -> handle of its engine deployment.
        manager: handle of the manager.
        is_local: nobody but this machine reaches the server.

    Raises:
        ConfigError: there are no keys, and nothing else to know strangers by.
    """

    def __init__(
        self,
        args: ServeArgs,
        agents: Mapping[str, AgentSource],
        engines: Mapping[str, Any],
        manager: Any,
        is_local: bool = False,
    ) -> None:
        settings = args.http()
        refuse_unknown_clients(settings, is_local=is_local)
        self._args = args
        self._engines = engines
        self._manager = manager
        self._traces = answer_traces(args)
        self._service = ChatService(
            {
                name: (open_agent(source, args), ServeEngine(engines[name]))
                for name, source in agents.items()
            },
            sink=self._traces,
        )
        self._app = make_http_app(
            self._service,
            settings,
            reload=self._reload,
            metrics_of_all=self._metrics_of_all,
            ready=self._ready,
        )
        if self._traces is not None:
            registry = self._app.state.metrics.registry
            registry.register(TraceNumbers(self._traces.counts))

    def __del__(self) -> None:
        """Serve's last call: what waits goes to MLflow, if it answers."""
        # Not there if the start failed.
        traces: AnswerTraces | None = getattr(self, "_traces", None)
        if traces is not None:
            traces.close()

    def __serve_build_asgi_app__(self) -> FastAPI:
        """The app, which Serve feeds with requests."""
        return self._app

    async def exposition(self) -> tuple[str, str]:
        """Name of this replica, and its numbers in Prometheus' text format."""
        replica = serve.get_replica_context().replica_id.unique_id
        return replica, self._app.state.metrics.exposition()

    async def _reload(
        self, model: str | None, checkpoint: str | None
    ) -> Mapping[str, str]:
        return await ask(self._manager.reload.remote(model, checkpoint))

    async def _metrics_of_all(self) -> Mapping[str, str]:
        return await ask(self._manager.expositions.remote())

    async def _ready(self) -> Mapping[str, bool]:
        names = self._service.models()
        ready = await asyncio.gather(*(is_ready(self._engines[one]) for one in names))
        return dict(zip(names, ready, strict=True))


def refuse_unknown_clients(settings: HttpSettings, *, is_local: bool) -> None:
    """Behind HAProxy, whoever asks seems to be of this machine.

    Raises:
        ConfigError: there are no keys to know others by, and they reach the server.
    """
    if behind_haproxy() and not is_local and not settings.api_key_hashes:
        raise ConfigError(
            "behind HAProxy every client seems to be of this machine, and there are no "
            f"keys: set {API_KEYS_VARIABLE}"
        )


def answer_traces(args: ServeArgs) -> AnswerTraces | None:
    """Where answers become traces; None where they are not to."""
    uri = args.mlflow or os.environ.get("MLFLOW_TRACKING_URI")
    if not uri or not args.trace_share:
        return None
    return AnswerTraces(uri, share=args.trace_share)


async def is_ready(engine: Any) -> bool:
    """Whether a replica behind the handle holds weights, and says so in time."""
    try:
        async with asyncio.timeout(READY_TIMEOUT_S):
            state = await engine.state.remote()
    except Exception:  # boundary: whatever is wrong, it is not ready
        return False
    return state.newest is not None


def open_agent(source: AgentSource, args: ServeArgs) -> Agent:
    """What answers with the weights of a source.

    Raises:
        ConfigError: its environment cannot be made or served, or would run code of
            strangers without a sandbox.
    """
    tokenizer = source.tokenizer
    if source.source.startswith(REGISTERED):
        # This may be another machine than the one that looked the source up.
        tokenizer = str(find_weights(source.source).folder)
    env = serving_env(source.settings, tokenizer)
    require_sandboxed(env)
    return Agent(env=env, sampling=source.settings.sampling, limits=args.limits())


def find_agents(args: ServeArgs) -> dict[str, AgentSource]:
    """Model name -> the agent; reading a checkpoint runs code in it.

    Raises:
        ConfigError, CheckpointError, DataError: as `find_agent`.
    """
    if args.checkpoint is not None:
        source = find_agent(args.checkpoint, **args.flags())
        return {source.name: source}
    return {one.name: find_agent(one.checkpoint, **args.flags()) for one in args.models}


def build_app(args: ServeArgs) -> Application:
    """The application, for `serve run` and `serve deploy`, or `serve.run`.

    Sources are looked up here, so an engine that starts later gets the same weights.

    Raises:
        ConfigError, CheckpointError, DataError: as `find_agent`.
    """
    return bind_app(args, find_agents(args))


def bind_app(
    args: ServeArgs, agents: Mapping[str, AgentSource], *, is_local: bool = False
) -> Application:
    """As `build_app`, of agents that were found.

    Args:
        args: of the application.
        agents: model name -> where it comes from.
        is_local: nobody but this machine will reach the server.
    """
    asked = (
        {one.name: one.checkpoint for one in args.models}
        if args.checkpoint is None
        else dict.fromkeys(agents, args.checkpoint)
    )
    engines = {
        name: _engine(args, source, f"engine-{number}")
        for number, (name, source) in enumerate(agents.items())
    }
    models = {
        name: ManagedModel(
            source=lasting(asked[name]),
            version=source.version,
            deployment=f"engine-{number}",
        )
        for number, (name, source) in enumerate(agents.items())
    }
    manager = _deployment(
        Manager,
        name=MANAGER,
        num_replicas=1,
        graceful_shutdown_wait_loop_s=SHUTDOWN_LOOK_S,
        health_check_period_s=HEALTH_CHECK_PERIOD_S,
        max_ongoing_requests=MAX_ONGOING,
        ray_actor_options={"num_cpus": 0},
    ).bind(models, engines, poll_s=args.poll_s)
    return _deployment(
        AgentServer,
        name=AGENT,
        **_scaling(args, args.min_agents, args.max_agents),
        ray_actor_options={"num_cpus": 1},
    ).bind(args, dict(agents), engines, manager, is_local)


def lasting(source: str) -> str:
    """A source that means the same whatever folder a process works in."""
    return source if source.startswith(REGISTERED) else str(Path(source).absolute())


def _engine(args: ServeArgs, source: AgentSource, name: str) -> Application:
    settings = EngineSettings(
        engine=source.settings.engine,
        engine_kwargs=source.settings.engine_kwargs,
        dtype=source.settings.dtype,
    )
    return _deployment(
        EngineReplica,
        name=name,
        user_config={"source": source.source, "version": source.version},
        **_scaling(args, args.min_engines, args.max_engines),
        ray_actor_options={"num_cpus": 1, "num_gpus": args.num_gpus},
    ).bind(settings, max_request_s=args.max_request_s)


def _scaling(args: ServeArgs, least: int, most: int) -> dict[str, Any]:
    """Options of a deployment whose replicas hold answers."""
    options: dict[str, Any] = {
        "max_ongoing_requests": MAX_ONGOING,
        "max_queued_requests": args.max_queued_requests,
        "graceful_shutdown_timeout_s": args.max_request_s + GRACE_S,
        "graceful_shutdown_wait_loop_s": SHUTDOWN_LOOK_S,
        "health_check_period_s": HEALTH_CHECK_PERIOD_S,
    }
    if least == most:
        return options | {"num_replicas": least}
    return options | {
        "autoscaling_config": {
            "min_replicas": least,
            "max_replicas": most,
            "target_ongoing_requests": args.target_ongoing_requests,
            "upscale_delay_s": args.upscale_delay_s,
            "downscale_delay_s": args.downscale_delay_s,
        }
    }


def _deployment(body: type, **options: Any) -> Any:
    # Serve's own type says function where it gives a deployment.
    return cast(Any, serve.deployment)(body, **options)
