"""Served answers in MLflow: a real `mlflow server`, and none at all."""

import asyncio
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import SpanStatusCode, Trace

from rllib_arpo.errors import ToolError
from rllib_arpo.serving.answer_log import AnswerLog
from rllib_arpo.serving.engine_client import EngineLostError, InProcessEngine
from rllib_arpo.serving.http import make_http_app
from rllib_arpo.serving.http_settings import HttpSettings
from rllib_arpo.serving.service import ChatService
from rllib_arpo.serving.trace_numbers import TraceNumbers
from rllib_arpo.tracking.mlflow_answers import AnswerTraces
from tests.envs.fake_tools import FakeTool
from tests.mlflow_server import MLFLOWS_WARNINGS, MLflowServer
from tests.serving.live_server import CHAT, LiveServer, ask
from tests.serving.scripted_agents import (
    USER,
    Agent,
    ByPlace,
    ScriptedEngine,
    Unreliable,
    call,
    final,
    make_env,
    request,
)

LIMIT_S = 120
pytestmark = MLFLOWS_WARNINGS
TURNS = [call("tags", "height of vifel", "look"), final("tags", "44", "read")]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MLflowServer]:
    server = MLflowServer(tmp_path_factory.mktemp("mlflow_server"))
    server.start()
    yield server
    server.kill()


def chat(sink: Any, *, tool: Any = None, failures: tuple[int, ...] = ()) -> ChatService:
    env = make_env(tool or FakeTool("vifel 44"))
    scripted = ScriptedEngine(ByPlace(env, TURNS))
    engine = Unreliable(scripted, failures) if failures else InProcessEngine(scripted)
    return ChatService({"m": (Agent(env=env), engine)}, sink=sink)


@contextmanager
def silent_server() -> Iterator[str]:
    """The address of one that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


def sent_traces(server: MLflowServer, experiment: str) -> list[Trace]:
    client = MlflowClient(server.uri)
    found = client.get_experiment_by_name(experiment)
    assert found is not None
    return client.search_traces(locations=[found.experiment_id])


def stream(service: ChatService, **fields: Any) -> None:
    async def read() -> None:
        async for _ in service.stream(request(**fields)):
            pass

    asyncio.run(read())


@pytest.mark.parametrize("streamed", [False, True])
def test_an_answer_becomes_a_trace_with_its_turns_and_tool_calls(
    server, streamed
) -> None:
    experiment = f"answers-{streamed}"
    traces = AnswerTraces(server.uri, experiment=experiment)
    service = chat(traces)
    if streamed:
        stream(service)
    else:
        asyncio.run(service.complete(request()))
    assert traces.flush(LIMIT_S)
    traces.close()
    (trace,) = sent_traces(server, experiment)
    assert trace.info.tags["model"] == "m"
    root, first, tool, second = trace.data.spans
    assert [(s.name, s.span_type) for s in trace.data.spans] == [
        ("answer", "AGENT"),
        ("turn", "LLM"),
        ("search", "TOOL"),
        ("turn", "LLM"),
    ]
    assert {s.parent_id for s in (first, tool, second)} == {root.span_id}
    assert root.inputs == {"messages": [USER]}
    assert root.outputs == {"answer": "44", "end": "answer", "finish_reason": "stop"}
    assert first.outputs == {"text": TURNS[0]}
    assert tool.inputs == {"arguments": "height of vifel"}
    assert tool.outputs == {"result": "vifel 44"}
    assert second.inputs == {"tool_result": "vifel 44"}
    assert second.attributes["entropy_mean_nats"] == 0.5
    assert first.end_time_ns <= tool.start_time_ns <= tool.end_time_ns
    assert tool.end_time_ns <= second.end_time_ns <= root.end_time_ns
    usage = trace.info.token_usage
    assert usage is not None
    assert usage["output_tokens"] == root.attributes["completion_tokens"]


def test_a_tool_that_fails_and_an_engine_that_is_lost_are_errors_in_a_trace(
    server,
) -> None:
    traces = AnswerTraces(server.uri, experiment="errors")
    broken = FakeTool(*[ToolError("away")] * 9)
    asyncio.run(chat(traces, tool=broken).complete(request()))
    assert traces.flush(LIMIT_S)
    (failed,) = [
        span
        for span in sent_traces(server, "errors")[0].data.spans
        if span.span_type == "TOOL"
    ]
    assert failed.status.status_code == SpanStatusCode.ERROR
    assert failed.attributes["status"] == "error"

    with pytest.raises(EngineLostError):
        asyncio.run(chat(traces, failures=(0,) * 9).complete(request()))
    assert traces.flush(LIMIT_S)
    traces.close()
    states = {one.info.state: one for one in sent_traces(server, "errors")}
    assert "EngineLostError" in states["ERROR"].data.spans[0].outputs["error"]


def test_without_a_server_answers_come_and_what_has_no_room_is_counted() -> None:
    with silent_server() as uri:
        traces = AnswerTraces(uri, max_waiting=2)
        service = chat(traces)
        for _ in range(5):
            answer = asyncio.run(service.complete(request()))
            assert answer.choices[0].message.content == "44"
        counts = traces.counts()
        # One may have left the queue for the thread's hands.
        assert counts["dropped"] in (2, 3)
        assert counts["sent"] == 0
        traces.close(0.0)


def test_a_server_that_comes_back_gets_what_waited(tmp_path) -> None:
    server = MLflowServer(tmp_path)
    traces = AnswerTraces(server.uri, experiment="late")
    asyncio.run(chat(traces).complete(request()))
    server.start()
    try:
        assert traces.flush(LIMIT_S)
        assert len(sent_traces(server, "late")) == 1
        assert traces.counts() == {"sent": 1, "dropped": 0, "refused": 0}
    finally:
        traces.close(0.0)
        server.kill()


def test_a_share_of_none_traces_none_and_the_share_is_kept() -> None:
    with silent_server() as uri:
        none, half = AnswerTraces(uri, share=0.0), AnswerTraces(uri, share=0.5)
        assert not any(none.wants() for _ in range(100))
        # Binomial(1000, 1/2) has a standard deviation of 16.
        assert 350 < sum(half.wants() for _ in range(1000)) < 650
        none.close(0.0)
        half.close(0.0)


def test_metrics_tell_how_many_answers_became_traces() -> None:
    sink = Kept()
    app = make_http_app(chat(sink), HttpSettings())
    app.state.metrics.registry.register(
        TraceNumbers(lambda: {"sent": len(sink.logs), "dropped": 3})
    )
    with LiveServer(app) as live:
        assert live.client.post(CHAT, json=ask()).status_code == 200
        text = live.client.get("/metrics").text
    assert 'rllib_arpo_traces_total{outcome="sent"} 1.0' in text
    assert 'rllib_arpo_traces_total{outcome="dropped"} 3.0' in text


def test_a_client_that_hangs_up_leaves_a_log_without_an_end() -> None:
    sink = Kept()

    async def hang_up() -> None:
        chunks = chat(sink).stream(request())
        await anext(chunks)
        await chunks.aclose()

    asyncio.run(hang_up())
    (log,) = sink.logs
    assert (log.finished, log.error) == (None, None)


class Kept:
    """A sink that keeps all."""

    def __init__(self) -> None:
        self.logs: list[AnswerLog] = []

    def wants(self) -> bool:
        return True

    def put(self, log: AnswerLog) -> None:
        self.logs.append(log)
