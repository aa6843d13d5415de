"""Numbers of a server, in Prometheus' text format.

Every app has its own registry. An app's numbers are those of one replica; where there
are several, `merge_expositions` makes one document of theirs, each series with the
label `replica`.

What the model makes up must not make labels: a tool has its own series once it ran;
calls of anything else count as those of `unknown`.
"""

import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping
from contextlib import aclosing
from typing import Any, cast

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rllib_arpo.serving.access import route_path
from rllib_arpo.serving.openai_api import ChatCompletion, ChatCompletionChunk

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 600)
FIXED_ROUTES = (
    *("/", "/health", "/metrics", "/openapi.json", "/admin/reload"),
    *("/v1/chat/completions", "/v1/models"),
)
FOLDERS = {"/v1/models/": "/v1/models/{id}", "/playground/": "/playground/{file}"}
OTHER_ROUTE = "other"
UNKNOWN_TOOL = "unknown"


class ServeMetrics:
    """Counts what one replica of the server does."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self._requests = Counter(
            "rllib_arpo_requests",
            "Requests that were answered; 499: the client hung up.",
            ["route", "status"],
            registry=registry,
        )
        self._in_flight = Gauge(
            "rllib_arpo_requests_in_flight",
            "Requests that are being answered.",
            registry=registry,
        )
        self._latency = Histogram(
            "rllib_arpo_request_seconds",
            "Time until the end of the answer.",
            ["route"],
            buckets=SECONDS,
            registry=registry,
        )
        self._first_token = Histogram(
            "rllib_arpo_time_to_first_token_seconds",
            "Time until the model's first text, of streamed answers.",
            ["model"],
            buckets=SECONDS,
            registry=registry,
        )
        self._tokens = Counter(
            "rllib_arpo_generated_tokens",
            "Tokens that the model wrote in turns that came to an end.",
            ["model"],
            registry=registry,
        )
        self._tool_calls = Counter(
            "rllib_arpo_tool_calls",
            "Calls of the agent's tools; every status but ok is a failure.",
            ["tool", "status"],
            registry=registry,
        )
        self._known_tools: set[str] = set()

    def exposition(self) -> str:
        """All numbers in the text format, with `CONTENT_TYPE`."""
        return generate_latest(self.registry).decode()

    def answered(self, completion: ChatCompletion) -> None:
        """Count an answer's tokens and tool calls."""
        for choice in completion.choices:
            for turn in choice.message.agent.turns:
                self._tokens.labels(completion.model).inc(turn.completion_tokens)
                if turn.tool_call is not None:
                    self._called(turn.tool_call.name, turn.tool_call.status)

    async def watch(
        self, chunks: AsyncIterator[ChatCompletionChunk]
    ) -> AsyncIterator[ChatCompletionChunk]:
        """The same chunks, counted."""
        begin = time.perf_counter()
        waiting = True
        async with aclosing(
            cast(AsyncGenerator[ChatCompletionChunk], chunks)
        ) as source:
            async for chunk in source:
                for choice in chunk.choices:
                    event = choice.delta.agent or {}
                    if waiting and event.get("type") == "text":
                        waiting = False
                        passed = time.perf_counter() - begin
                        self._first_token.labels(chunk.model).observe(passed)
                    self._happened(chunk.model, event)
                yield chunk

    def _happened(self, model: str, event: Mapping[str, Any]) -> None:
        match event.get("type"):
            case "turn":
                self._tokens.labels(model).inc(event["completion_tokens"])
            case "tool_finished":
                self._called(event["name"], event["status"])

    def _called(self, tool: str, status: str) -> None:
        # A refused call may be of a tool that there is not.
        if status != "refused":
            self._known_tools.add(tool)
        name = tool if tool in self._known_tools else UNKNOWN_TOOL
        self._tool_calls.labels(name, status).inc()

    def begun(self) -> None:
        """A request came in."""
        self._in_flight.inc()

    def ended(self, route: str, status: int, seconds: float) -> None:
        """A request was answered, or its client is gone."""
        self._in_flight.dec()
        self._requests.labels(route, str(status)).inc()
        self._latency.labels(route).observe(seconds)


class Measured:
    """ASGI middleware: counts requests; outermost, so that it sees every status."""

    def __init__(self, app: ASGIApp, metrics: ServeMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, ended = 500, False

        async def watched(message: Message) -> None:
            nonlocal status, ended
            if message["type"] == "http.response.start":
                status = message["status"]
            elif not message.get("more_body", False):
                ended = True
            await send(message)

        begin = time.perf_counter()
        self._metrics.begun()
        try:
            await self._app(scope, receive, watched)
        finally:
            self._metrics.ended(
                route_of(scope),
                status if ended or status >= 400 else 499,
                time.perf_counter() - begin,
            )


def route_of(scope: Scope) -> str:
    """The path, as far as the app knows it: paths are the client's to make up."""
    path = route_path(scope)
    if path in FIXED_ROUTES:
        return path
    for folder, route in FOLDERS.items():
        if path.startswith(folder):
            return route
    return OTHER_ROUTE


def merge_expositions(expositions: Mapping[str, str]) -> str:
    """One document of those of several replicas.

    Args:
        expositions: replica -> its numbers, in Prometheus' text format.

    Returns:
        Each family once, its series with the further label `replica`.

    Raises:
        ValueError: a text is not of that format.
    """
    families: dict[tuple[str, str], Metric] = {}
    for replica, text in expositions.items():
        for family in text_string_to_metric_families(text):
            merged = families.setdefault(
                (family.name, family.type),
                Metric(family.name, family.documentation, family.type),
            )
            for sample in family.samples:
                merged.add_sample(
                    sample.name, {**sample.labels, "replica": replica}, sample.value
                )
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collected(families.values()))
    return generate_latest(registry).decode()


class _Collected(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families
