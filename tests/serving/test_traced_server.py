"""Answers over HTTP become traces of a real `mlflow server`."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Trace

from rllib_arpo.tracking.mlflow_store import EXPERIMENT
from tests.mlflow_server import MLflowServer
from tests.serving.calling_agent import ANSWER, FOUND, SEARCH, make_calling_agent
from tests.serving.served import QUESTION, Served, serving, until

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def mlflow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MLflowServer]:
    server = MLflowServer(tmp_path_factory.mktemp("mlflow_server"))
    server.start()
    yield server
    server.kill()


@pytest.fixture(scope="module")
def traced(mlflow: MLflowServer, tmp_path_factory) -> Iterator[Served]:
    model: Path = make_calling_agent(tmp_path_factory.mktemp("agents") / "almanac")
    words = ("--mlflow", mlflow.uri, "--trace-share", 1)
    with serving(f"almanac={model}", *words) as running:
        yield running


def sent_traces(client: MlflowClient) -> list[Trace]:
    found = client.get_experiment_by_name(EXPERIMENT)
    if found is None:
        return []
    return client.search_traces(locations=[found.experiment_id])


def test_every_answer_is_a_trace_of_its_turns_and_tool_calls(
    mlflow: MLflowServer, traced: Served
) -> None:
    whole = traced.post().raise_for_status().json()
    streamed = traced.post(stream=True).raise_for_status().text
    until(lambda: traced.numbers("rllib_arpo_traces_total", outcome="sent") == [2.0])
    traces = sent_traces(MlflowClient(mlflow.uri))
    ids = {one.data.spans[0].attributes["request_id"] for one in traces}
    assert len(ids) == len(traces) == 2
    assert whole["id"] in ids
    assert all(one in streamed for one in ids - {whole["id"]})
    for trace in traces:
        assert trace.info.tags["model"] == "almanac"
        root, first, tool, second = trace.data.spans
        assert [span.span_type for span in trace.data.spans] == [
            *("AGENT", "LLM", "TOOL", "LLM")
        ]
        assert {one.parent_id for one in (first, tool, second)} == {root.span_id}
        assert root.inputs["messages"][0]["content"] == QUESTION
        assert root.outputs["answer"] == "44"
        assert first.outputs == {"text": SEARCH}
        assert (tool.name, tool.outputs) == ("search", {"result": FOUND})
        assert second.outputs == {"text": ANSWER}
        agent = whole["choices"][0]["message"]["agent"]
        assert root.attributes["weights"] == agent["version"]
