"""Traces of answers that MLflow does not take."""

import logging
from collections.abc import Iterator

import httpx2
import pytest
from mlflow import MlflowClient

from rllib_arpo.serving.answer_log import AnswerLog
from rllib_arpo.serving.events import TurnReport
from rllib_arpo.serving.openai_api import (
    AssistantMessage,
    ClientToolCall,
    FunctionCall,
    TextPart,
    UserMessage,
)
from rllib_arpo.tracking import mlflow_answers
from rllib_arpo.tracking.mlflow_answers import (
    MAX_TEXT_CHARS,
    AnswerTraces,
    answer_trace,
)
from tests.http_server import HttpServer, Reply, Request
from tests.mlflow_server import MLFLOWS_WARNINGS, MLflowServer

LIMIT_S = 120
MAX_BODY_BYTES = 10_000
EXPERIMENT = "large"
pytestmark = MLFLOWS_WARNINGS


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MLflowServer]:
    server = MLflowServer(tmp_path_factory.mktemp("mlflow_server"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def proxy(server: MLflowServer) -> Iterator[HttpServer]:
    """In front of MLflow; it takes no large bodies, as nginx does not."""
    with httpx2.Client(base_url=server.uri, timeout=LIMIT_S) as client:

        def answer(request: Request) -> Reply:
            if len(request.body) > MAX_BODY_BYTES:
                return Reply(status=413, body=b"<h1>Too large</h1>")
            kept = ("content-type", "x-mlflow-experiment-id")
            reply = client.request(
                request.method,
                request.path,
                params=dict(request.params),
                headers={name: request.headers.get(name, "") for name in kept},
                content=request.body,
            )
            return Reply(
                status=reply.status_code,
                headers={"Content-Type": reply.headers["Content-Type"]},
                body=reply.content,
            )

        with HttpServer(answer) as proxy:
            yield proxy


def log_of(*contents: str, request_id: str = "r") -> AnswerLog:
    messages = [UserMessage(role="user", content=content) for content in contents]
    return AnswerLog(request_id=request_id, choice=0, model="m", messages=messages)


def test_answers_too_large_for_a_proxy_are_given_up_with_one_warning(
    server, proxy, monkeypatch, caplog
) -> None:
    monkeypatch.setattr(mlflow_answers, "RETRY_S", (0.0,))
    traces = AnswerTraces(proxy.url("").rstrip("/"), experiment=EXPERIMENT)
    with caplog.at_level(logging.WARNING, logger=mlflow_answers.__name__):
        for number, size in enumerate([MAX_BODY_BYTES, 10, MAX_BODY_BYTES, 10]):
            traces.put(log_of("x" * size, request_id=str(number)))
        assert traces.flush(LIMIT_S)
    traces.close()
    assert traces.counts() == {"sent": 2, "dropped": 0, "refused": 2}
    name = mlflow_answers.__name__
    (said,) = (one for one in caplog.records if one.name == name)
    assert "413" in said.getMessage()
    client = MlflowClient(server.uri)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    assert experiment is not None
    found = client.search_traces(locations=[experiment.experiment_id])
    sent = {one.data.spans[0].attributes["request_id"] for one in found if one.data}
    assert {"1", "3"} <= sent


def test_every_text_of_an_answer_is_clipped_and_its_messages_are_there_once() -> None:
    long = "x" * (MAX_TEXT_CHARS + 1)
    call = ClientToolCall(id="c", function=FunctionCall(name="f", arguments=long))
    report = TurnReport(
        turn=0,
        text="t",
        prompt_tokens=1,
        completion_tokens=1,
        entropy=0.5,
        latency_s=0.1,
    )
    log = AnswerLog(
        request_id="r",
        choice=0,
        model="m",
        messages=[
            UserMessage(role="user", content=long),
            UserMessage(role="user", content=[TextPart(type="text", text=long)]),
            AssistantMessage(role="assistant", tool_calls=[call]),
        ],
        turns=[(report, 0.1)],
    )
    root, turn = answer_trace(log)["spans"]
    clipped = f"{'x' * MAX_TEXT_CHARS}... ({MAX_TEXT_CHARS + 1} characters)"
    text, parts, calls = root["inputs"]["messages"]
    assert text["content"] == clipped
    assert parts["content"] == [{"type": "text", "text": clipped}]
    assert calls["tool_calls"][0]["function"]["arguments"] == clipped
    assert turn["inputs"] is None
