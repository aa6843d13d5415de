"""Training in MLflow, with a real server that is killed and started again."""

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from mlflow import MlflowClient
from ray import tune

from rllib_arpo.tracking.attach import end_tracking
from rllib_arpo.tracking.mlflow import MLflowCallback
from rllib_arpo.tracking.mlflow_buffer import Buffer, RunSpec, send_later
from rllib_arpo.tracking.mlflow_traces import tree_trace
from rllib_arpo.tracking.mlflow_tune import TuneMLflowCallback
from rllib_arpo.tracking.trial_traces import TRACES, TrialTraces
from tests.browser import opened_chromium
from tests.learner.helpers import forked_tree
from tests.mlflow_server import MLFLOWS_WARNINGS, MLflowServer
from tests.tiny_runs import arpo_config, running, traces

LIMIT_S = 120
pytestmark = MLFLOWS_WARNINGS


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MLflowServer]:
    server = MLflowServer(tmp_path_factory.mktemp("mlflow_server"))
    server.start()
    yield server
    server.kill()


def local_uri(folder: Path) -> str:
    return f"sqlite:///{folder / 'mlruns.db'}"


def history(client: MlflowClient, run_id: str, name: str) -> list[tuple[int, float]]:
    return [(m.step, m.value) for m in client.get_metric_history(run_id, name)]


def test_a_server_that_is_killed_and_restarted_has_all_exactly_once(
    server, tmp_path
) -> None:
    buffer = Buffer(tmp_path / "buffer", RunSpec(uri=server.uri))
    for step in range(3):
        buffer.metrics({"reward": step / 2}, step=step)
    assert buffer.flush(LIMIT_S)
    run_id = buffer.run_id
    assert run_id is not None

    server.kill()
    for step in range(3, 6):
        buffer.metrics({"reward": step / 2}, step=step)
    assert not buffer.close(timeout_s=0.0)

    server.start()
    assert send_later(tmp_path / "buffer", timeout_s=LIMIT_S)
    # The whole outbox once more, as if no answer of the server had come back.
    (tmp_path / "buffer" / "sent").write_text("0")
    assert send_later(tmp_path / "buffer", timeout_s=LIMIT_S)
    client = MlflowClient(server.uri)
    assert history(client, run_id, "reward") == [(step, step / 2) for step in range(6)]


def test_a_run_that_began_without_a_server_appears_once_there_is_one(tmp_path) -> None:
    """And what a kill left of a last line is dropped."""
    server = MLflowServer(tmp_path)
    buffer = Buffer(tmp_path / "buffer", RunSpec(uri=server.uri, name="early"))
    buffer.params({"lr": "0.1"})
    assert not buffer.close(timeout_s=0.0)
    (outbox,) = (tmp_path / "buffer" / "outbox").iterdir()
    with outbox.open("a") as opened:
        opened.write('{"kind": "par')

    server.start()
    try:
        assert send_later(tmp_path / "buffer", timeout_s=LIMIT_S)
        client = MlflowClient(server.uri)
        (run,) = client.search_runs(["1"])
        assert (run.info.run_name, run.data.params) == ("early", {"lr": "0.1"})
    finally:
        server.kill()


def test_what_mlflow_refuses_does_not_hold_up_the_rest(tmp_path) -> None:
    uri = local_uri(tmp_path)
    buffer = Buffer(tmp_path / "buffer", RunSpec(uri=uri))
    buffer.tags({"": "no name"})
    buffer.metrics({"reward": 1.0}, step=7)
    assert buffer.close(LIMIT_S)
    assert buffer.run_id is not None
    assert history(MlflowClient(uri), buffer.run_id, "reward") == [(7, 1.0)]
    assert "no name" in (tmp_path / "buffer" / "refused.jsonl").read_text()


def test_training_is_tracked_and_goes_on_in_the_same_run(
    almanac_model, ray_session, tmp_path
) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("{}\n")
    uri = local_uri(tmp_path)
    config = arpo_config(almanac_model).evaluation(evaluation_interval=1)
    config.callbacks(
        partial(
            MLflowCallback,
            folder=tmp_path / "run",
            uri=uri,
            data_files=(str(data),),
            registered_model="tiny",
        )
    )
    with running(config) as algorithm:
        algorithm.train()
        checkpoint = algorithm.save_to_path(str(tmp_path / "checkpoint"))
        end_tracking(algorithm)
    algorithm = type(algorithm).from_checkpoint(checkpoint)
    algorithm.train()
    end_tracking(algorithm)
    algorithm.stop()

    client = MlflowClient(uri, registry_uri=uri)
    (run,) = client.search_runs(["1"])
    assert [step for step, _ in history(client, run.info.run_id, "reward_mean")] == [
        1,
        2,
    ]
    assert run.info.status == "FINISHED"
    assert run.data.params["lr"] == "0.001"
    assert run.data.params["env_config.max_response_tokens"] == "48"
    assert len(run.data.params) < 40
    # printf '{}\n' | sha256sum
    assert run.data.tags["data.rows.jsonl"].startswith(
        "sha256:ca3d163bab055381827226140"
    )
    load = history(client, run.info.run_id, "system/cpu_utilization_percentage")
    assert len(load) >= 2  # one of each process at least, and no step twice
    assert [step for step, _ in load] == list(range(len(load)))
    assert client.get_model_version_by_alias("tiny", "champion").run_id == (
        run.info.run_id
    )
    traces = client.search_traces(locations=["1"])
    assert sorted(trace.info.tags["iteration"] for trace in traces) == ["1", "2"]


def test_a_sweep_is_a_parent_run_with_a_child_per_trial(
    almanac_model, ray_session, tmp_path
) -> None:
    uri = local_uri(tmp_path)
    config = arpo_config(almanac_model).training(lr=tune.grid_search([1e-4, 1e-3]))
    config.callbacks(TrialTraces)
    results = tune.Tuner(
        "ARPO",
        param_space=config,
        run_config=tune.RunConfig(
            stop={"training_iteration": 1},
            storage_path=str(tmp_path / "ray"),
            verbose=0,
            checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=1),
            callbacks=[TuneMLflowCallback(tmp_path / "sweep", uri=uri)],
        ),
    ).fit()
    assert not results.errors
    client = MlflowClient(uri)
    runs = client.search_runs(["1"])
    (parent,) = [r for r in runs if "mlflow.parentRunId" not in r.data.tags]
    children = [r for r in runs if r is not parent]
    assert {r.data.tags["mlflow.parentRunId"] for r in children} == {parent.info.run_id}
    assert sorted(r.data.params["lr"] for r in children) == ["0.0001", "0.001"]
    assert all("reward_mean" in r.data.metrics for r in children)
    found = client.search_traces(locations=["1"])
    assert sorted(trace.info.trace_metadata["mlflow.sourceRun"] for trace in found) == (
        sorted(child.info.run_id for child in children)
    )
    assert {trace.info.tags["iteration"] for trace in found} == {"1"}
    written = [Path(result.path) / "result.json" for result in results]
    assert len(written) == 2
    states = list((tmp_path / "ray").glob("*/experiment_state-*.json"))
    assert states
    name = TRACES.encode().hex()  # Tune pickles results into its state
    for file in (*written, *states):
        assert TRACES not in file.read_text() and name not in file.read_text()


def test_the_web_page_shows_a_tree_with_its_turns_and_tools(
    server, almanac_model, tmp_path
) -> None:
    (tree,) = traces(almanac_model, 1)
    buffer = Buffer(tmp_path / "buffer", RunSpec(uri=server.uri, experiment="page"))
    buffer.add("trace", {"trace": tree_trace(tree, seconds_per_token=1e-3)})
    assert buffer.close(LIMIT_S)
    experiment = MlflowClient(server.uri).get_experiment_by_name("page")
    (trace,) = MlflowClient(server.uri).search_traces(
        locations=[experiment.experiment_id]
    )
    with opened_chromium() as browser:
        page = browser.new_page()
        page.set_default_timeout(LIMIT_S * 1000)
        page.goto(
            f"{server.uri}/#/experiments/{experiment.experiment_id}/traces"
            f"?selectedEvaluationId={trace.info.trace_id}"
        )
        question = tree.task.messages[-1].content
        page.get_by_text(question).first.wait_for()
        page.get_by_text("turn", exact=True).first.wait_for()
        page.get_by_text("search", exact=True).first.wait_for()


def test_a_trace_has_a_span_per_turn_and_per_tool_call(almanac_model) -> None:
    (tree,) = traces(almanac_model, 1)
    made = json.loads(json.dumps(tree_trace(tree, seconds_per_token=0.5)))
    spans = made["spans"]
    tools = [s for s in tree.segments if s.tool_call is not None]
    assert sum(span["span_type"] == "LLM" for span in spans) == len(tree)
    assert [s["outputs"]["result"] for s in spans if s["span_type"] == "TOOL"] == [
        tool.text for tool in tools
    ]
    turn = next(span for span in spans if span["span_type"] == "LLM")
    tokens = len(next(s for s in tree.segments if s.role == "model").token_ids)
    assert turn["end"] - turn["start"] == tokens * 500_000_000
    used = turn["attributes"]["mlflow.chat.tokenUsage"]
    assert used["input_tokens"] == len(tree.segments[0].token_ids)


def test_leaves_have_their_reward_with_its_parts_and_the_trace_their_means(
    server, tmp_path
) -> None:
    tree = forked_tree((1.1, -0.5))
    parts = ({"answer": 1.0, "format": 0.1}, {"answer": -0.5, "reward": 9.0})
    leaves = zip(tree.leaves, parts, strict=True)
    tree = replace(
        tree,
        segments=tuple(
            replace(segment, text=f"segment {index}")
            for index, segment in enumerate(tree.segments)
        ),
        leaves=tuple(replace(leaf, reward_parts=own) for leaf, own in leaves),
    )
    buffer = Buffer(tmp_path / "buffer", RunSpec(uri=server.uri, experiment="rewards"))
    buffer.add("trace", {"trace": tree_trace(tree)})
    assert buffer.close(LIMIT_S)
    client = MlflowClient(server.uri)
    experiment = client.get_experiment_by_name("rewards")
    (trace,) = client.search_traces(locations=[experiment.experiment_id])
    names = {span.span_id: span.outputs for span in trace.data.spans}
    given = trace.info.assessments
    assert {one.name: one.value for one in given if one.span_id is None} == {
        "reward_mean": pytest.approx(0.3),
        "answer_mean": 0.25,
        "format_mean": 0.05,
    }
    assert [
        (one.value, one.rationale, names[one.span_id]["text"])
        for one in given
        if one.span_id is not None
    ] == [
        (1.1, "answer 1, format 0.1", "segment 3"),
        (-0.5, "answer -0.5, reward 9", "segment 4"),
    ]
