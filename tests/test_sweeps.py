"""Sweeps of a file: the table, a trial that crashes, a sweep that was killed."""

import csv
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from ray import tune
from ray.tune.schedulers import FIFOScheduler, PopulationBasedTraining

from rllib_arpo.cli_config import find_checkpoint
from rllib_arpo.errors import ConfigError
from rllib_arpo.sweep_table import sweep_table
from rllib_arpo.sweeps import load_tuner, run_sweep
from tests.commands import LIMIT_S, finish, start
from tests.mlflow_server import MLFLOWS_WARNINGS

pytestmark = MLFLOWS_WARNINGS

EXAMPLES = Path(__file__).parents[1] / "tuned_examples"

SWEEP = """
from typing import Any

from ray import tune

from tests.tiny_runs import arpo_config


def make_tuner(storage_path: str) -> tune.Tuner:
    lr: Any = tune.grid_search([1e-4, 1e-3, -1.0])
    config: Any = arpo_config(MODEL).training(lr=lr)
    return tune.Tuner(
        "ARPO",
        param_space=config,
        tune_config=tune.TuneConfig(
            metric="env_runners/reward_mean", mode="max", max_concurrent_trials=2
        ),
        run_config=tune.RunConfig(
            name="sweep",
            storage_path=storage_path,
            stop={"training_iteration": ITERATIONS},
            checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=1),
        ),
    )
"""


def sweep_file(folder: Path, model: str, iterations: int) -> Path:
    file = folder / "sweep.py"
    file.write_text(f"MODEL = {model!r}\nITERATIONS = {iterations}\n{SWEEP}")
    return file


@pytest.fixture
def tests_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the command and in the processes that Ray starts."""
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES.parent))


def wait_for(process: subprocess.Popen, folder: Path, pattern: str) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not list(folder.glob(pattern)):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, f"no {pattern}"
        time.sleep(0.1)


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "trials.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("name", ["tune_arpo", "tune_arpo_pbt"])
def test_every_example_defines_a_sweep(name, tmp_path):
    tuner = load_tuner(EXAMPLES / f"{name}.py", str(tmp_path))
    assert tuner is not None
    assert f"`{name}.py`" in (EXAMPLES / "README.md").read_text()


@pytest.mark.parametrize(
    ("text", "words"),
    [(None, "no such file"), ("tuner = 3\n", "must define `tuner`")],
)
def test_a_file_without_a_sweep_is_refused(text, words, tmp_path):
    file = tmp_path / "sweep.py"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=words):
        load_tuner(file, str(tmp_path))


def test_a_model_that_is_missing_is_found_before_the_trials_start(
    tests_importable, tmp_path
):
    file = sweep_file(tmp_path, "nowhere", iterations=1)
    # A second time too: what was not begun is no sweep to go on with.
    for _ in range(2):
        with pytest.raises(ConfigError, match='no model "nowhere"'):
            run_sweep(file, tmp_path / "out")


@pytest.fixture(scope="module")
def swept(cold_start, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A sweep of which one trial crashes: its folder, and what it printed."""
    folder = tmp_path_factory.mktemp("swept")
    file = sweep_file(folder, cold_start.model, iterations=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(EXAMPLES.parent))
        code, out, err = finish(start("tune", file, "--out", "swept", folder=folder))
    assert code == 0, err
    return folder / "swept", out


@pytest.mark.slow
def test_a_trial_that_crashes_does_not_end_the_sweep(swept):
    rows = rows_of(swept[0])
    assert [row["status"] for row in rows] == ["finished", "finished", "failed"]
    assert [bool(row["error"]) for row in rows] == [False, False, True]
    assert {float(row["lr"]) for row in rows[:2]} == {1e-4, 1e-3}
    assert float(rows[2]["lr"]) == -1.0
    rewards = [float(row["env_runners/reward_mean"]) for row in rows[:2]]
    assert rewards == sorted(rewards, reverse=True)
    best = json.loads((swept[0] / "best.json").read_text())
    assert best["trial"] == rows[0]["trial"]
    find_checkpoint(Path(best["checkpoint"]))


@pytest.mark.slow
def test_the_terminal_shows_the_trials_and_which_is_best(swept):
    rows = rows_of(swept[0])
    out = swept[1]
    for row, word in zip(rows, ("starts", "starts", "cannot start"), strict=True):
        assert f"{row['trial']} {word}: lr {float(row['lr']):.3g}" in out
    assert f"{rows[2]['trial']} failed: {rows[2]['error']}" in " ".join(out.split())
    assert "`lr` (-1.0) must be a number >= 0." in rows[2]["error"]
    table = out[out.index("Trials, best first") :]
    assert [table.index(row["trial"]) for row in rows] == sorted(
        table.index(row["trial"]) for row in rows
    )
    assert f"Best: {rows[0]['trial']}. Checkpoint: " in table
    # Of RLlib's settings and of Tune's own output nothing.
    assert "env_runner_restore_timeout_s" not in out
    assert "Traceback" not in out


@pytest.mark.slow
def test_a_folder_with_a_sweep_is_refused(swept, tmp_path):
    file = sweep_file(tmp_path, "model", iterations=1)
    with pytest.raises(ConfigError, match="holds a sweep already"):
        run_sweep(file, swept[0])


class Climb(tune.Trainable):
    """Its score is its rate, times the iteration."""

    def setup(self, config: dict[str, Any]) -> None:
        self.score = 0.0

    def step(self) -> dict[str, float]:
        self.score += self.config["rate"]
        return {"score": self.score}

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, float]:
        return {"score": self.score}

    def load_checkpoint(self, checkpoint: dict[str, float]) -> None:  # type: ignore[override]
        self.score = checkpoint["score"]


class EndFlat(FIFOScheduler):
    """Ends a trial that does not climb, as ASHA does with the worst."""

    def on_trial_result(self, tune_controller, trial, result):
        return self.STOP if result["score"] == 0.0 else self.CONTINUE


class Place:
    """An object in a search space, which Tune does not store."""


def climb_tuner(
    folder: str, scheduler: FIFOScheduler, rates: list[float]
) -> tune.Tuner:
    return tune.Tuner(
        Climb,
        param_space={"rate": tune.grid_search(rates), "place": Place()},
        tune_config=tune.TuneConfig(metric="score", mode="max", scheduler=scheduler),
        run_config=tune.RunConfig(
            name="sweep",
            storage_path=folder,
            stop={"training_iteration": 4},
            verbose=0,
        ),
    )


def population() -> PopulationBasedTraining:
    """After 2 iterations the worse of two becomes the better one, with rate 3."""
    return PopulationBasedTraining(
        time_attr="training_iteration",
        perturbation_interval=2,
        quantile_fraction=0.5,
        resample_probability=0.0,
        custom_explore_fn=lambda config: {**config, "rate": 3.0},
        hyperparam_mutations={"rate": [1.0, 2.0]},
        synch=True,
    )


POPULATION = """
from tests.test_sweeps import climb_tuner, population

def make_tuner(storage_path):
    return climb_tuner(storage_path, population(), [1.0, 2.0])
"""


@pytest.mark.slow
def test_a_trial_that_the_scheduler_ends_counts_as_stopped_early(ray_session, tmp_path):
    tuner = climb_tuner(str(tmp_path), EndFlat(), [0.0, 1.0, 2.0])
    table = sweep_table(tuner.fit())
    assert [(row["rate"], row["status"], row["score"]) for row in table.rows] == [
        (2.0, "finished", 8.0),
        (1.0, "finished", 4.0),
        (0.0, "stopped early", 0.0),
    ]
    assert table.best == table.rows[0]


@pytest.mark.slow
def test_the_table_has_the_settings_that_a_population_ended_with(ray_session, tmp_path):
    """Also after a restart, where Tune knows those only that it began with."""
    file = tmp_path / "population.py"
    file.write_text(POPULATION)
    for resume in (False, True):
        table = run_sweep(file, tmp_path / "out", resume=resume)
        # Of the better one the score after 2 iterations, 2 * 2, and twice 3 more.
        assert [(row["rate"], row["score"]) for row in table.rows] == [
            (3.0, 10.0),
            (2.0, 8.0),
        ]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ctrl_c_writes_the_table_and_says_how_to_go_on(
    cold_start, tests_importable, tmp_path
):
    file = sweep_file(tmp_path, cold_start.model, iterations=100_000)
    process = start(
        "tune", file, "--out", "swept", folder=tmp_path, stdout=tmp_path / "out.txt"
    )
    wait_for(process, tmp_path / "swept", "sweep/*/checkpoint_000000")
    process.send_signal(signal.SIGINT)
    code, _, err = finish(process)
    assert code == 130, err
    said = " ".join((tmp_path / "out.txt").read_text().split())
    assert f"rllib-arpo tune {file} --out swept --resume" in said
    assert "unfinished" in [row["status"] for row in rows_of(tmp_path / "swept")]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_sweep_goes_on_where_it_was(cold_start, tests_importable, tmp_path):
    file = sweep_file(tmp_path, cold_start.model, iterations=6)
    uri = f"sqlite:///{tmp_path / 'tracked.db'}"
    process = start(
        *("tune", file, "--out", "swept", "--mlflow", uri),
        folder=tmp_path,
        stdout=tmp_path / "out.txt",
    )
    wait_for(process, tmp_path / "swept", "sweep/*/checkpoint_000001")
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    code, _, err = finish(
        start("tune", file, "--out", "swept", "--resume", folder=tmp_path)
    )
    assert code == 0, err
    rows = rows_of(tmp_path / "swept")
    assert [row["training_iteration"] for row in rows[:2]] == ["6", "6"]
    assert all(
        len(list(folder.glob("checkpoint_*"))) == 6
        for folder in (tmp_path / "swept" / "sweep").glob("ARPO_*")
        if (folder / "checkpoint_000000").is_dir()
    )
    # It is tracked on in the same runs, though nobody said so again.
    client = MlflowClient(uri, registry_uri=uri)
    runs = client.search_runs(["1"])
    assert sorted(found.info.status for found in runs) == [
        *("FAILED", "FINISHED", "FINISHED", "FINISHED")
    ]
    champion = client.get_model_version_by_alias("arpo-agent", "champion")
    assert champion.tags["trial_id"] == rows[0]["trial"]
    found = client.search_traces(
        locations=["1"], filter_string=f"attributes.run_id = '{champion.run_id}'"
    )
    iterations = {int(trace.info.tags["iteration"]) for trace in found}
    assert iterations == set(range(1, 7))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_sweep_may_be_tracked_from_its_end_on(cold_start, tests_importable, tmp_path):
    file = sweep_file(tmp_path, cold_start.model, iterations=2)
    out = tmp_path / "swept"
    code, _, err = finish(start("tune", file, "--out", "swept", folder=tmp_path))
    before = rows_of(out)
    uri = f"sqlite:///{tmp_path / 'tracked.db'}"
    words = ("tune", file, "--out", "swept", "--resume", "--mlflow", uri)
    code, _, err = finish(start(*words, folder=tmp_path))
    after = rows_of(out)
    names = ("trial", "training_iteration", "status")
    assert [[row[name] for name in names] for row in after[:2]] == [
        [row[name] for name in names] for row in before[:2]
    ], err
    client = MlflowClient(uri, registry_uri=uri)
    champion = client.get_model_version_by_alias("arpo-agent", "champion")
    assert champion.tags["trial_id"] == before[0]["trial"]
    tags = client.get_run(champion.run_id).data.tags
    parent = client.get_run(tags["mlflow.parentRunId"])
    assert parent.data.tags["best_trial"] == before[0]["trial"]
    # Without MLflow's folder it is as good.
    shutil.rmtree(out / "mlflow")
    code, _, err = finish(
        start("tune", file, "--out", "swept", "--resume", folder=tmp_path)
    )
    assert code == 0, err
    assert [row["trial"] for row in rows_of(out)[:2]] == [
        row["trial"] for row in before[:2]
    ], err


@pytest.mark.slow
def test_a_sweep_that_is_not_there_cannot_go_on(tests_importable, tmp_path):
    file = sweep_file(tmp_path, "model", iterations=1)
    code, _, err = finish(
        start("tune", file, "--out", "none", "--resume", folder=tmp_path)
    )
    assert code == 2
    assert "holds no sweep to go on with" in err
