"""A run's folder, and the loop that fills it.

runs/NAME/
config.json      what was set (only what differs from the defaults)
metrics.jsonl    one flat JSON object per iteration
alarms.jsonl     one JSON object per alarm and iteration in which it rang
checkpoints/     iteration_000012/ and so on: the newest two, each of them whole
trees/           iteration_000012.parquet and so on: some trees of each iteration
model/           a Hugging Face folder, written at the end
curves.png .svg  the plots
lock             held by the process that trains here
"""

import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.utils.metrics import (
    ENV_RUNNER_RESULTS,
    ENV_RUNNER_SAMPLING_TIMER,
    EVALUATION_RESULTS,
    LEARNER_RESULTS,
    LEARNER_UPDATE_TIMER,
    SYNCH_WORKER_WEIGHTS_TIMER,
    TIMERS,
)

from rllib_arpo.alarms import ALARMS
from rllib_arpo.arpo import ARPO
from rllib_arpo.checkpoints import CHECKPOINTS, newest_checkpoint, tidy_checkpoints
from rllib_arpo.config import ARPOConfig
from rllib_arpo.data.tree_files import write_trees
from rllib_arpo.errors import ConfigError, EngineError
from rllib_arpo.metrics import (
    ENGINE_METRICS,
    ENGINE_SAMPLE_TIME_S,
    ENGINE_STEP_TIME_S,
    METRICS_FILE,
    NUM_TOKENS_SAMPLED,
    NUM_TOOL_CALLS,
    POLICY_LAG_MEAN,
)
from rllib_arpo.run_lock import only_here
from rllib_arpo.stop_signals import Stopped, StopRequest, stop_signals
from rllib_arpo.storage import storing, write_whole
from rllib_arpo.tree import RolloutTree

logger = logging.getLogger(__name__)

Record = dict[str, Any]

NUM_CHECKPOINTS_KEPT = 2
TREES = "trees"
ALARMS_FILE = "alarms.jsonl"

# Attributes of a config that are no settings of the user.
ADDED_BY_BUILDING = ("_is_frozen", "policies", "simple_optimizer", "class")


class Run:
    """The folder of one training run.

    Args:
        folder: made when it is not there.
        resume: go on in a folder that already holds a run.

    Raises:
        ConfigError: the folder holds a run already and `resume` is False.
    """

    def __init__(self, folder: str | Path, *, resume: bool = False) -> None:
        self.folder = Path(folder).absolute()
        if not resume and (self.folder / METRICS_FILE).exists():
            raise ConfigError(
                f"{self.folder} holds a run already: choose another --out, or go on "
                f"with --resume {self.folder}"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        self._is_held = False
        self._tool_calls = 0.0
        # Names of the alarms that rang in the last iteration.
        self._ringing: set[str] = set()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes from training in the folder meanwhile; may be nested.

        Raises:
            ConfigError: another process trains there.
            CheckpointError: the folder cannot be written to.
        """
        if self._is_held:
            yield
            return
        with only_here(self.folder):
            self._is_held = True
            try:
                yield
            finally:
                self._is_held = False

    @property
    def checkpoint(self) -> Path | None:
        """The newest whole checkpoint; None if there is none yet."""
        return newest_checkpoint(self.folder)

    @property
    def model(self) -> Path:
        """The trained model as a Hugging Face folder."""
        return self.folder / "model"

    def write_config(self, config: ARPOConfig) -> None:
        """Write the settings that differ from the defaults of the config's class.

        Args:
            config: before or after `build_algo`; what building adds is left out.
        """
        self.write_json("config.json", changed_settings(config))

    def write_json(self, name: str, values: Mapping[str, Any]) -> Path:
        """Write a JSON file into the folder, whole or not at all."""
        file = self.folder / name
        write_whole(file, _as_json(values, indent=2) + "\n")
        return file

    def log(self, result: Mapping[str, Any], *, stage: str) -> Record:
        """Append one training iteration to `metrics.jsonl` and return it."""
        record = self._record(result, stage)
        self._append(METRICS_FILE, record)
        return record

    def log_alarms(self, result: Mapping[str, Any]) -> list[Record]:
        """Append what rang in an iteration to `alarms.jsonl`.

        Returns:
            Those that did not ring in the iteration before.
        """
        iteration = result["training_iteration"]
        ringing = [{"iteration": iteration, **alarm} for alarm in result[ALARMS]]
        for alarm in ringing:
            self._append(ALARMS_FILE, alarm)
        new = [alarm for alarm in ringing if alarm["name"] not in self._ringing]
        self._ringing = {alarm["name"] for alarm in ringing}
        return new

    def _append(self, name: str, record: Record) -> None:
        path = self.folder / name
        with (
            storing(path, intact="The last checkpoint is intact."),
            path.open("a") as f,
        ):
            f.write(_as_json(record) + "\n")
            f.flush()
            # A checkpoint must not outlast a power cut that its records did not.
            os.fsync(f.fileno())

    def _record(self, result: Mapping[str, Any], stage: str) -> Record:
        record = record_of(result, stage=stage)
        self._tool_calls += record.get(NUM_TOOL_CALLS, 0.0)
        return {**record, "num_tool_calls_lifetime": self._tool_calls}

    def save_trees(self, iteration: int, trees: Sequence[RolloutTree]) -> None:
        """Keep trees of an iteration, see `data/tree_files.py`.

        Raises:
            CheckpointError: the file cannot be written.
        """
        if not trees:
            return
        folder = self.folder / TREES
        with storing(folder, intact="The last checkpoint is intact."):
            folder.mkdir(exist_ok=True)
            write_trees(folder / f"{_name_of(iteration)}.parquet", trees)

    def tree_files(self) -> dict[int, Path]:
        """The files of trees by their iteration, in order."""
        files = sorted((self.folder / TREES).glob("iteration_*.parquet"))
        return {int(file.stem.removeprefix("iteration_")): file for file in files}

    def forget_after(self, iteration: int) -> None:
        """Drop records and trees of iterations that a resumed run will make again.

        A last line without an end, left by a kill or a full disk, goes too.
        """
        for number, trees in self.tree_files().items():
            if number > iteration:
                trees.unlink()
        records = self._forget_lines(METRICS_FILE, iteration)
        if records:
            self._tool_calls = records[-1]["num_tool_calls_lifetime"]
        alarms = self._forget_lines(ALARMS_FILE, iteration)
        self._ringing = {a["name"] for a in alarms if a["iteration"] == iteration}

    def _forget_lines(self, name: str, iteration: int) -> list[Record]:
        """Keep the whole lines up to `iteration`, and return them."""
        file = self.folder / name
        if not file.exists():
            return []
        lines = file.read_text().splitlines(keepends=True)
        records = [json.loads(line) for line in lines if line.endswith("\n")]
        kept = [record for record in records if record["iteration"] <= iteration]
        write_whole(file, "".join(_as_json(record) + "\n" for record in kept))
        return kept

    def save_checkpoint(self, algorithm: Algorithm) -> Path:
        """Write a checkpoint under a name of its own; then older ones may go.

        Raises:
            CheckpointError: it cannot be written; those before it are intact.
        """
        name = _name_of(algorithm.iteration)
        # What a killed save left may be the space that this one needs.
        tidy_checkpoints(self.folder, kept=NUM_CHECKPOINTS_KEPT)
        path = Path(algorithm.save_to_path(str(self.folder / CHECKPOINTS / name)))
        tidy_checkpoints(self.folder, kept=NUM_CHECKPOINTS_KEPT)
        return path

    def plot(self) -> Path:
        """Draw `curves.png` and `curves.svg`."""
        from rllib_arpo.tracking.curves import plot_run

        return plot_run(self.folder)


def train(
    algorithm: ARPO,
    run: Run,
    *,
    num_iterations: int,
    stage: str,
    on_iteration: Callable[[Record], None],
    on_alarm: Callable[[Record], None] = lambda alarm: None,
    checkpoint_interval: int = 10,
) -> None:
    """Train until iteration `num_iterations`, with checkpoints on the way.

    `on_alarm` gets an alarm when it begins to ring, after its iteration's record.

    A first SIGINT (Ctrl-C) or SIGTERM ends it after the iteration, with a checkpoint. A
    second one ends it at once; then, as after an error of a step, the newest complete
    checkpoint is what is left.

    Raises:
        ConfigError: another process trains in the run's folder.
        Stopped: a signal ended it.
    """
    with run.held(), stop_signals() as stop:
        while algorithm.iteration < num_iterations:
            result = _iterate(algorithm, run, stop)
            record = run.log(result, stage=stage)
            new_alarms = run.log_alarms(result)
            run.save_trees(algorithm.iteration, algorithm.saved_trees)
            on_iteration(record)
            for alarm in new_alarms:
                on_alarm(alarm)
            is_due = algorithm.iteration % checkpoint_interval == 0
            if is_due or stop.number is not None:
                run.save_checkpoint(algorithm)
                if stop.number is not None:
                    raise Stopped(stop.number)


def _iterate(algorithm: ARPO, run: Run, stop: StopRequest) -> Mapping[str, Any]:
    """Train an iteration; one that fails once a signal came ends as the signal does.

    The signal may have reached what this process started, too: a job's end reaches
    vLLM. Without it no answer is whole, but what was learned before is.
    """
    try:
        return algorithm.train()
    except Exception as error:  # boundary: whatever the signal did to others
        if stop.number is None:
            raise
        logger.warning("the iteration did not come to its end: %s", error)
        newest = run.checkpoint
        is_saved = newest is not None and newest.stem == _name_of(algorithm.iteration)
        if isinstance(error, EngineError) and not is_saved:
            run.save_checkpoint(algorithm)
        raise Stopped(stop.number) from error


def _name_of(iteration: int) -> str:
    return f"iteration_{iteration:06d}"


def changed_settings(config: ARPOConfig) -> Record:
    """The settings that differ from the defaults of the config's class."""
    defaults = vars(type(config)())
    # Compared as written: not every value of a built config has an equality.
    return {
        name: value
        for name, value in vars(config).items()
        if not name.startswith("__")
        and name not in ADDED_BY_BUILDING
        and _as_json(value) != _as_json(defaults.get(name))
    }


def record_of(result: Mapping[str, Any], *, stage: str) -> Record:
    """The named metrics of one iteration's result, flat."""
    sampled = result.get(ENV_RUNNER_RESULTS, {})
    timers = result.get(TIMERS, {})
    engine = sampled.get(ENGINE_METRICS, {})
    learned = result.get(LEARNER_RESULTS, {}).get(DEFAULT_MODULE_ID, {})
    evaluated = result.get(EVALUATION_RESULTS, {}).get(ENV_RUNNER_RESULTS, {})
    sample_s = float(timers.get(ENV_RUNNER_SAMPLING_TIMER, 0.0))
    # Sums over the runners, which sample side by side.
    busy_s = float(engine.get(ENGINE_STEP_TIME_S, 0.0))
    open_s = float(engine.get(ENGINE_SAMPLE_TIME_S, 0.0))
    generate_s = sample_s * min(busy_s / open_s, 1.0) if open_s else 0.0
    record: Record = {
        "iteration": result["training_iteration"],
        "stage": stage,
        **_numbers(sampled),
        **_numbers(learned),
        **{f"eval_{name}": value for name, value in _numbers(evaluated).items()},
        "time_generate_s": generate_s,
        "time_tools_s": sample_s - generate_s,
        "time_learn_s": float(timers.get(LEARNER_UPDATE_TIMER, 0.0)),
        "time_sync_s": float(timers.get(SYNCH_WORKER_WEIGHTS_TIMER, 0.0)),
    }
    sampling_s = sample_s
    if POLICY_LAG_MEAN in sampled:  # asynchronous: EnvRunners never stop
        sampling_s += record["time_learn_s"] + record["time_sync_s"]
    if sampling_s:
        record["tokens_per_s"] = sampled.get(NUM_TOKENS_SAMPLED, 0.0) / sampling_s
    return record


def _numbers(values: Mapping[str, Any]) -> Record:
    """The numbers among `values`; JSON has no NaN and no infinity."""
    numbers = {
        name: float(value)
        for name, value in values.items()
        if isinstance(value, int | float) or getattr(value, "ndim", None) == 0
    }
    return {name: value for name, value in numbers.items() if math.isfinite(value)}


def _as_json(value: Any, **layout: Any) -> str:
    return json.dumps(value, default=str, allow_nan=False, **layout)
