"""Sweeps of a file: the table, a trial that crashes, a sweep that was killed."""

import csv
import json
import os
import signal
import time
from pathlib import Path

import pytest

from rllib_arpo.errors import ConfigError
from rllib_arpo.sweeps import load_tuner
from tests.commands import LIMIT_S, finish, start

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


@pytest.mark.slow
def test_a_trial_that_crashes_does_not_end_the_sweep(
    cold_start, tests_importable, tmp_path
):
    file = sweep_file(tmp_path, cold_start.model, iterations=1)
    code, out, err = finish(start("tune", file, "--out", "swept", folder=tmp_path))
    assert code == 0, err
    rows = rows_of(tmp_path / "swept")
    assert [bool(row["error"]) for row in rows] == [False, False, True]
    assert {float(row["lr"]) for row in rows[:2]} == {1e-4, 1e-3}
    assert float(rows[2]["lr"]) == -1.0
    rewards = [float(row["env_runners/reward_mean"]) for row in rows[:2]]
    assert rewards == sorted(rewards, reverse=True)
    best = json.loads((tmp_path / "swept" / "best.json").read_text())
    assert best["trial"] == rows[0]["trial"]
    assert rows[0]["trial"] in out


@pytest.mark.slow
def test_a_killed_sweep_goes_on_where_it_was(cold_start, tests_importable, tmp_path):
    file = sweep_file(tmp_path, cold_start.model, iterations=6)
    # To a file: Tune would wait for a reader of a full pipe.
    process = start(
        "tune", file, "--out", "swept", folder=tmp_path, stdout=tmp_path / "out.txt"
    )
    deadline = time.monotonic() + LIMIT_S
    while not list((tmp_path / "swept").glob("sweep/*/checkpoint_000001")):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "no checkpoint"
        time.sleep(0.1)
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


@pytest.mark.slow
def test_a_sweep_that_is_not_there_cannot_go_on(tests_importable, tmp_path):
    file = sweep_file(tmp_path, "model", iterations=1)
    code, _, err = finish(
        start("tune", file, "--out", "none", "--resume", folder=tmp_path)
    )
    assert code == 2
    assert "holds no sweep to go on with" in err
