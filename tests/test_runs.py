"""A run's folder: one line an iteration, and always a whole checkpoint."""

import errno
import fcntl
import json
import logging
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
from ray.rllib.callbacks.callbacks import RLlibCallback
from ray.rllib.core import DEFAULT_MODULE_ID

from rllib_arpo import ARPO
from rllib_arpo.cli_config import find_checkpoint
from rllib_arpo.data.tree_files import read_trees
from rllib_arpo.errors import CheckpointError, ConfigError, EngineError
from rllib_arpo.runs import Run, train
from rllib_arpo.stop_signals import SIGNALS, Stopped, stop_signals
from rllib_arpo.sweeps import run_sweep
from tests.locked_runs import is_locked, locked_by_another
from tests.tiny_runs import arpo_config, learner_weights, running, same, token_ids

pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.fixture(scope="module")
def algorithm(almanac_model):
    with running(arpo_config(almanac_model)) as algorithm:
        yield algorithm


def lines(run: Run) -> list[dict]:
    text = (run.folder / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_every_iteration_is_one_line_and_the_last_is_saved(
    almanac_model, tmp_path
) -> None:
    run = Run(tmp_path / "run")
    seen = []
    with running(arpo_config(almanac_model)) as algorithm:
        train(
            algorithm,
            run,
            num_iterations=3,
            stage="ARPO",
            on_iteration=seen.append,
            checkpoint_interval=3,
        )
        weights = learner_weights(algorithm)
    assert [line["iteration"] for line in lines(run)] == [1, 2, 3]
    assert [record["iteration"] for record in seen] == [1, 2, 3]
    for line in lines(run):
        assert line["stage"] == "ARPO"
        # Times are those of the iteration.
        assert 0 < line["time_learn_s"] < 30
        assert line["tokens_per_s"] > 0
    restored = ARPO.from_checkpoint(str(run.checkpoint))
    try:
        assert restored.iteration == 3
        assert same(weights, learner_weights(restored))
    finally:
        restored.stop()


@pytest.mark.parametrize(("wished", "kept"), [(0, 0), (2, 2), (None, 4)])
def test_as_many_trees_of_an_iteration_are_kept_as_wished(
    almanac_model, tmp_path, wished, kept
) -> None:
    run = Run(tmp_path / "run")
    config = arpo_config(almanac_model).reporting(num_saved_trees=wished)
    with running(config) as algorithm:
        train(
            algorithm,
            run,
            num_iterations=2,
            stage="ARPO",
            on_iteration=lambda record: None,
            checkpoint_interval=2,
        )
        last = algorithm.saved_trees
    assert len(last) == kept
    assert list(run.tree_files()) == ([1, 2] if kept else [])
    if kept:
        assert token_ids(list(read_trees(run.tree_files()[2]))) == token_ids(last)
        run.forget_after(1)
        assert list(run.tree_files()) == [1]


def names(run: Run) -> list[str]:
    return sorted(entry.name for entry in (run.folder / "checkpoints").iterdir())


def test_the_newest_two_checkpoints_are_kept(almanac_model, tmp_path) -> None:
    run = Run(tmp_path / "run")
    assert run.checkpoint is None
    leftover = run.folder / "checkpoints" / "iteration_000001.part"
    leftover.mkdir(parents=True)
    with running(arpo_config(almanac_model)) as algorithm:
        train(
            algorithm,
            run,
            num_iterations=3,
            stage="ARPO",
            on_iteration=lambda record: None,
            checkpoint_interval=1,
        )
    assert names(run) == ["iteration_000002", "iteration_000003"]
    assert run.checkpoint == run.folder / "checkpoints" / "iteration_000003"


def test_a_copy_that_broke_off_is_passed_over(algorithm, tmp_path) -> None:
    run = Run(tmp_path / "run")
    saved = run.save_checkpoint(algorithm)
    later = saved.with_name("iteration_999999")
    shutil.copytree(saved, later)
    assert run.checkpoint == later
    with (later / "algorithm_state.pkl").open("ab") as file:
        file.truncate(10)
    assert run.checkpoint == saved == find_checkpoint(run.folder)
    with pytest.raises(CheckpointError, match=r"algorithm_state\.pkl has 10 bytes of"):
        find_checkpoint(later)
    run.save_checkpoint(algorithm)
    assert names(run) == [saved.name]


def test_a_torn_last_line_is_dropped_and_no_iteration_is_told_twice(tmp_path) -> None:
    run = Run(tmp_path / "run")
    result = {"env_runners": {"num_tool_calls": 2.0}}
    for iteration in (1, 2, 3):
        run.log({"training_iteration": iteration, **result}, stage="ARPO")
    with (run.folder / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 4, "sta')
    resumed = Run(tmp_path / "run", resume=True)
    resumed.forget_after(2)
    resumed.log({"training_iteration": 3, **result}, stage="ARPO")
    assert [line["iteration"] for line in lines(run)] == [1, 2, 3]
    assert [line["num_tool_calls_lifetime"] for line in lines(run)] == [2, 4, 6]
    assert {entry.name for entry in run.folder.iterdir()} == {"metrics.jsonl"}


def test_alarms_of_iterations_that_are_made_again_are_forgotten(tmp_path) -> None:
    run = Run(tmp_path / "run")
    result = {"alarms": [{"name": "truncation", "message": "30 %", "advice": "less"}]}
    told = [
        len(run.log_alarms({"training_iteration": iteration, **alarms}))
        for iteration, alarms in enumerate(
            [{"alarms": []}, result, result, {"alarms": []}, result], start=1
        )
    ]
    assert told == [0, 1, 0, 0, 1]  # once each time that it begins
    resumed = Run(tmp_path / "run", resume=True)
    resumed.forget_after(3)
    assert resumed.log_alarms({"training_iteration": 4, **result}) == []
    written = (run.folder / "alarms.jsonl").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in written] == [2, 3, 4]
    assert json.loads(written[0]) == {"iteration": 2, **result["alarms"][0]}


class SignalWhileSampling(RLlibCallback):
    """Sends this process a signal in the middle of each iteration."""

    number = signal.SIGINT

    def on_sample_end(self, **kwargs) -> None:
        signal.raise_signal(self.number)


class TermWhileSampling(SignalWhileSampling):
    number = signal.SIGTERM


class FailingSampler(SignalWhileSampling):
    """As if the signal had reached another process, too."""

    error = RuntimeError

    def on_sample_end(self, **kwargs) -> None:
        super().on_sample_end()
        raise self.error("it is gone")


class FailingEngine(FailingSampler):
    error = EngineError


def train_on(algorithm, run: Run, **options) -> None:
    train(
        algorithm,
        run,
        num_iterations=algorithm.iteration + 5,
        stage="ARPO",
        **{"on_iteration": lambda record: None, **options},
    )


@pytest.mark.parametrize(
    ("callback", "exit_code"), [(SignalWhileSampling, 130), (TermWhileSampling, 143)]
)
def test_a_signal_ends_training_after_its_iteration_which_is_saved(
    almanac_model, tmp_path, capfd, callback, exit_code
) -> None:
    run = Run(tmp_path / "run")
    with running(arpo_config(almanac_model).callbacks(callback)) as algorithm:
        before = [signal.getsignal(one) for one in SIGNALS]
        with pytest.raises(Stopped) as stopped:
            train_on(algorithm, run)
        assert [signal.getsignal(one) for one in SIGNALS] == before
    assert stopped.value.exit_code == exit_code
    assert [line["iteration"] for line in lines(run)] == [1]
    assert names(run) == ["iteration_000001"]
    said = capfd.readouterr().err
    assert "Ends after this iteration" in said
    assert "A second Ctrl-C or SIGTERM ends at once" in said


@pytest.mark.parametrize(
    ("second", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)]
)
def test_a_second_signal_ends_training_at_once_and_saves_nothing(
    algorithm, tmp_path, second, exit_code
) -> None:
    run = Run(tmp_path / "run")
    first = f"iteration_{algorithm.iteration + 1:06d}"

    def interrupt(record) -> None:
        if len(lines(run)) == 2:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(second)

    with pytest.raises(Stopped) as stopped:
        train_on(algorithm, run, on_iteration=interrupt, checkpoint_interval=1)
    assert stopped.value.exit_code == exit_code
    assert names(run) == [first]


@pytest.mark.parametrize(
    ("callback", "saved"),
    # Without an engine nothing can be learned, so that no update is half done.
    [(FailingSampler, None), (FailingEngine, "iteration_000000")],
)
def test_an_iteration_that_fails_after_a_signal_ends_training_as_the_signal_does(
    almanac_model, tmp_path, callback, saved
) -> None:
    run = Run(tmp_path / "run")
    with (
        running(arpo_config(almanac_model).callbacks(callback)) as algorithm,
        pytest.raises(Stopped) as stopped,
    ):
        train_on(algorithm, run)
    assert "it is gone" in str(stopped.value.__cause__)
    assert (run.checkpoint and run.checkpoint.name) == saved


def test_signals_are_left_alone_where_they_are_ignored_or_go_to_another_thread() -> (
    None
):
    def handlers() -> list:
        with stop_signals():
            return [signal.getsignal(one) for one in SIGNALS]

    before = [signal.getsignal(one) for one in SIGNALS]
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(handlers).result() == before
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        interrupt, terminate = handlers()
    finally:
        signal.signal(signal.SIGINT, before[0])
    assert interrupt == signal.SIG_IGN
    assert terminate not in before


def test_training_keeps_other_processes_out_of_the_folder(algorithm, tmp_path) -> None:
    run = Run(tmp_path / "run")
    seen = []
    with run.held():
        train(
            algorithm,
            run,
            num_iterations=algorithm.iteration + 1,
            stage="ARPO",
            on_iteration=lambda record: seen.append(is_locked(run.folder)),
        )
        assert is_locked(run.folder)
    assert seen == [True]
    assert not is_locked(run.folder)
    with (
        locked_by_another(run.folder),
        pytest.raises(ConfigError, match=r"another process trains in .*run \("),
    ):
        train_on(algorithm, run)
    assert len(lines(run)) == 1


def test_a_sweep_that_another_process_runs_is_left_alone(tmp_path) -> None:
    file, out = tmp_path / "sweep.py", tmp_path / "swept"
    file.write_text("raise AssertionError('it was begun')\n")
    for resume in (False, True):
        with (
            locked_by_another(out),
            pytest.raises(ConfigError, match=r"another process sweeps in .*wait for"),
        ):
            run_sweep(file, out, resume=resume)


# Holds a run, and has a child that was forked.
HOLDER = """
import os, sys
from rllib_arpo.runs import Run

with Run(sys.argv[1]).held():
    if os.fork() == 0:
        print(os.getpid(), flush=True)
    sys.stdin.read()
"""


def test_a_killed_process_lets_others_in_though_its_children_live(
    tmp_path: Path,
) -> None:
    run = Run(tmp_path / "run")
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(run.folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        child = int(process.stdout.readline())
        with (
            pytest.raises(ConfigError, match=rf"\(process {process.pid} on .*wait for"),
            run.held(),
        ):
            pass
        process.kill()
        process.wait()
        assert psutil.Process(child).is_running()
        with run.held():
            assert is_locked(run.folder)
        process.stdin.close()


def test_a_file_system_without_locks_stops_no_training(
    tmp_path, monkeypatch, caplog
) -> None:
    def refuse(*_) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    # MLflow's migrations, in another test, disable the loggers that they find.
    monkeypatch.setattr(logging.getLogger("rllib_arpo.run_lock"), "disabled", False)
    run = Run(tmp_path / "run")
    with run.held():
        run.log({"training_iteration": 1}, stage="ARPO")
    assert len(lines(run)) == 1
    assert "cannot be locked (No locks available)" in caplog.text


def test_a_run_is_never_overwritten(algorithm, tmp_path) -> None:
    run = Run(tmp_path / "run")
    run.log(algorithm.train(), stage="ARPO")
    with pytest.raises(ConfigError, match=r"holds a run already.*--resume"):
        Run(tmp_path / "run")
    again = Run(tmp_path / "run", resume=True)
    again.log(algorithm.train(), stage="ARPO")
    assert len(lines(run)) == 2


def test_only_settings_that_differ_are_written(almanac_model, tmp_path) -> None:
    run = Run(tmp_path / "run")
    run.write_config(arpo_config(almanac_model))
    written = json.loads((run.folder / "config.json").read_text())
    assert written["group_size"] == 4
    assert "clip_param" not in written


def test_the_settings_of_a_built_algorithm_are_those_before(
    algorithm, almanac_model, tmp_path
) -> None:
    run = Run(tmp_path / "run")
    run.write_config(arpo_config(almanac_model))
    before = json.loads((run.folder / "config.json").read_text())
    run.write_config(algorithm.config)
    after = json.loads((run.folder / "config.json").read_text())
    assert after.keys() == before.keys()
    assert after["group_size"] == before["group_size"] == 4


def test_a_number_that_json_does_not_know_is_left_out(tmp_path) -> None:
    run = Run(tmp_path / "run")
    learned = {"total_loss": 0.5, "ratio_max": np.float64("inf"), "mean": float("nan")}
    run.log(
        {"training_iteration": 1, "learners": {DEFAULT_MODULE_ID: learned}},
        stage="ARPO",
    )
    text = (run.folder / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    (line,) = lines(run)
    assert line["total_loss"] == 0.5
    assert line.keys().isdisjoint({"ratio_max", "mean"})


def test_the_time_of_sampling_is_parted_as_the_engines_were_busy(tmp_path) -> None:
    # Two runners sampled for 4 s each; their engines took steps for 2 and 4 s of
    # them: 4 s * (2 + 4) / (4 + 4) = 3 s.
    result = {
        "training_iteration": 1,
        "timers": {"env_runner_sampling_timer": 4.0},
        "env_runners": {"engine": {"step_time_s": 6.0, "sample_time_s": 8.0}},
    }
    record = Run(tmp_path / "run").log(result, stage="ARPO")
    assert record["time_generate_s"] == 3.0
    assert record["time_tools_s"] == 1.0


@pytest.mark.parametrize(
    ("lag", "tokens_per_s"),
    [
        ({}, 600 / 2.0),  # only while the driver waits for trees
        ({"policy_lag_mean": 0.5}, 600 / (2.0 + 3.0 + 1.0)),  # all the time
    ],
)
def test_tokens_are_counted_over_the_time_of_sampling(
    lag, tokens_per_s, tmp_path
) -> None:
    result = {
        "training_iteration": 1,
        "env_runners": {"num_tokens_sampled": 600.0, **lag},
        "timers": {
            "env_runner_sampling_timer": 2.0,
            "learner_update_timer": 3.0,
            "synch_weights": 1.0,
        },
    }
    record = Run(tmp_path / "run").log(result, stage="ARPO")
    assert record["tokens_per_s"] == tokens_per_s
