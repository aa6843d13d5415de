"""A sweep in MLflow: what the parent run, the trials' runs and the registry get."""

from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from ray import tune

from rllib_arpo.agents import find_agent
from rllib_arpo.tracking.mlflow_buffer import Buffer, RunSpec
from rllib_arpo.tracking.mlflow_tune import TuneMLflowCallback
from rllib_arpo.tracking.registry import fetch_model
from tests.locked_runs import locked_by_another
from tests.mlflow_server import MLFLOWS_WARNINGS, MLflowServer
from tests.tiny_runs import arpo_config

pytestmark = MLFLOWS_WARNINGS


def fit(
    model: str, folder: Path, callback: TuneMLflowCallback, rates: list[float]
) -> tune.ResultGrid:
    lr: Any = tune.grid_search(rates)
    config: Any = arpo_config(model).training(lr=lr)
    return tune.Tuner(
        "ARPO",
        param_space=config,
        tune_config=tune.TuneConfig(metric="env_runners/reward_mean", mode="max"),
        run_config=tune.RunConfig(
            stop={"training_iteration": 2},
            storage_path=str(folder / "ray"),
            verbose=0,
            callbacks=[callback],
        ),
    ).fit()


def test_the_best_trials_model_is_the_champion(
    almanac_model, ray_session, tmp_path, monkeypatch
) -> None:
    uri = f"sqlite:///{tmp_path / 'mlruns.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    data = tmp_path / "rows.jsonl"
    data.write_text("{}\n")
    callback = TuneMLflowCallback(
        tmp_path / "sweep",
        uri=uri,
        metric="env_runners/reward_mean",
        mode="max",
        registered_model="tiny",
        data_files=(str(data),),
    )
    # A learning rate below zero is refused when the trial is built.
    results = fit(almanac_model, tmp_path, callback, [1e-4, 1e-2, -1.0])
    assert len(results.errors) == 1
    best: Any = results.get_best_result()

    client = MlflowClient(uri, registry_uri=uri)
    runs = client.search_runs(["1"])
    (parent,) = [r for r in runs if "mlflow.parentRunId" not in r.data.tags]
    of_trial = {r.data.tags["trial_id"]: r for r in runs if r is not parent}
    best_id = best.metrics["trial_id"]
    assert parent.data.tags["best_trial"] == best_id
    assert parent.data.metrics["best"] == best.metrics["env_runners"]["reward_mean"]
    assert parent.info.status == "FINISHED"
    assert sorted(r.info.status for r in of_trial.values()) == [
        *("FAILED", "FINISHED", "FINISHED")
    ]
    (failed,) = [r for r in of_trial.values() if r.info.status == "FAILED"]
    assert failed.data.params["lr"] == "-1.0"
    assert "`lr` (-1.0) must be a number >= 0." in failed.data.tags["error"]
    params = of_trial[best_id].data.params
    assert float(params["lr"]) == best.config["lr"]
    assert params["env_config.max_response_tokens"] == "48"
    assert len(params) < 40
    tags = of_trial[best_id].data.tags
    assert tags["data.rows.jsonl"].startswith("sha256:")
    assert tags["checkpoint"] == best.checkpoint.path
    steps = client.get_metric_history(of_trial[best_id].info.run_id, "reward_mean")
    assert [metric.step for metric in steps] == [1, 2]

    champion = client.get_model_version_by_alias("tiny", "champion")
    assert champion.run_id == of_trial[best_id].info.run_id
    assert champion.tags["trial_id"] == best_id
    fetched = fetch_model("models:/tiny@champion")
    agent = find_agent(str(fetched.folder))
    assert agent.settings.env_config["max_response_tokens"] == 48


def test_a_sweep_without_a_server_is_sent_once_there_is_one(
    almanac_model, ray_session, tmp_path
) -> None:
    server = MLflowServer(tmp_path)
    folder = tmp_path / "sweep"
    settings: Any = {"metric": "env_runners/reward_mean", "registered_model": "tiny"}
    fit(
        almanac_model,
        tmp_path,
        TuneMLflowCallback(folder, uri=server.uri, **settings),
        [1e-3],
    )
    server.start()
    try:
        # As at the start and the end of a sweep that goes on.
        callback = TuneMLflowCallback(folder, uri=server.uri, **settings)
        callback.setup()
        callback.on_experiment_end([])
        client = MlflowClient(server.uri)
        runs = client.search_runs(["1"])
        assert [run.info.status for run in runs] == ["FINISHED", "FINISHED"]
        (trial,) = [r for r in runs if "mlflow.parentRunId" in r.data.tags]
        version = client.get_model_version_by_alias("tiny", "champion")
        assert version.run_id == trial.info.run_id
    finally:
        server.kill()


def test_a_sweep_ends_though_another_process_sends_what_a_trial_left(tmp_path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlruns.db'}"
    folder = tmp_path / "sweep"
    assert Buffer(folder / "trial", RunSpec(uri=uri)).close()
    callback = TuneMLflowCallback(folder, uri=uri)
    with locked_by_another(folder / "trial"):
        callback.setup()
        callback.on_experiment_end([])
    (parent,) = MlflowClient(uri).search_runs(["1"])
    assert parent.info.status == "FINISHED"


def test_a_sweep_takes_the_alias_only_from_a_worse_champion(
    almanac_model, ray_session, tmp_path
) -> None:
    uri = f"sqlite:///{tmp_path / 'mlruns.db'}"
    client = MlflowClient(uri)
    client.create_registered_model("tiny")
    client.create_model_version("tiny", "file:///x", tags={"eval_accuracy": "9"})
    client.set_registered_model_alias("tiny", "champion", "1")
    config = arpo_config(almanac_model).evaluation(evaluation_interval=1)
    callback = TuneMLflowCallback(
        tmp_path / "sweep",
        uri=uri,
        metric="env_runners/reward_mean",
        registered_model="tiny",
    )
    tune.Tuner(
        "ARPO",
        param_space=config,
        run_config=tune.RunConfig(
            stop={"training_iteration": 1},
            storage_path=str(tmp_path / "ray"),
            verbose=0,
            callbacks=[callback],
        ),
    ).fit()
    second = client.get_model_version("tiny", "2")
    assert float(second.tags["eval_accuracy"]) < 9
    assert "env_runners.reward_mean" in second.tags
    assert str(client.get_model_version_by_alias("tiny", "champion").version) == "1"
