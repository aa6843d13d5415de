"""Training in MLflow: a callback for RLlib. That for Tune is in `mlflow_tune.py`.

    config.callbacks(functools.partial(MLflowCallback, folder="runs/x"))
    config.callbacks(MLflowCallback)       # in the algorithm's own log folder

What MLflow gets: the settings that differ from the defaults, the named metrics with the
iteration as step, the machine's load, alarms and the git commit as tags, where the
checkpoints and the model are (nothing is copied), some trees as traces, and the model
of the best evaluation, registered. All of it goes through a buffer on disk, see
`mlflow_buffer.py`: a server that is away never stops training.

Each run registers the model of its best evaluation so far. The alias `champion`, which
servers may follow, moves to it only if its accuracy is higher than the one that the
champion's tag `eval_accuracy` says, whichever run that came from, or if there is no
champion or none with such a tag. Accuracies on different tasks do not compare: give
each task a name of its own, `registered_model="almanac"`.

Iterations that a killed run makes again after its last checkpoint are logged again:
MLflow deletes no value of a metric, and shows both of a step.
"""

import atexit
import json
import logging
import shutil
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ray.rllib.callbacks.callbacks import RLlibCallback

from rllib_arpo.alarms import ALARMS
from rllib_arpo.errors import ARPOError
from rllib_arpo.metrics import NUM_TOKENS_SAMPLED
from rllib_arpo.runs import Record, record_of
from rllib_arpo.storage import write_whole
from rllib_arpo.tracking.mlflow_buffer import Buffer, RunSpec
from rllib_arpo.tracking.mlflow_facts import file_tags, git_tags, parameters
from rllib_arpo.tracking.mlflow_store import EXPERIMENT, tracking_uri
from rllib_arpo.tracking.mlflow_system import SystemMetrics
from rllib_arpo.tracking.mlflow_traces import tree_trace
from rllib_arpo.tracking.registry import CHAMPION
from rllib_arpo.tree import RolloutTree

logger = logging.getLogger(__name__)

BUFFER_FOLDER = "mlflow"
BEST_FILE = "best.json"
EVAL_ACCURACY = "eval_accuracy"


class MLflowCallback(RLlibCallback):
    """Tracks a training. RLlib makes one in every process; one with a run tracks.

    Args:
        folder: of the run; a run that is there is gone on with. None: the algorithm's
            log folder, which a restored algorithm does not share.
        uri: of the store; None: as in `mlflow_store.tracking_uri`.
        experiment: name in MLflow.
        name: of the MLflow run; None: that of the folder.
        tags: further ones.
        num_traced_trees: of the saved trees of an iteration, to become traces. It has
            no effect beyond `num_saved_trees` of the config.
        registered_model: name under which the best evaluation's model is registered,
            one for each task; None registers none.
        data_files: their hashes become tags.
        system_metrics: whether the machine's load is tracked.
    """

    def __init__(
        self,
        *,
        folder: str | Path | None = None,
        uri: str | None = None,
        experiment: str = EXPERIMENT,
        name: str | None = None,
        tags: Mapping[str, str] | None = None,
        num_traced_trees: int = 1,
        registered_model: str | None = "arpo-agent",
        data_files: tuple[str, ...] = (),
        system_metrics: bool = True,
    ) -> None:
        super().__init__()
        self._folder = folder
        self._uri = tracking_uri(uri)
        self._experiment = experiment
        self._name = name
        self._given_tags = dict(tags or {})
        self._num_traced_trees = num_traced_trees
        self._registered_model = registered_model
        self._data_files = data_files
        self._system_metrics = system_metrics
        self._system: SystemMetrics | None = None
        self._has_failed = False
        self.buffer: Buffer | None = None

    def open(self, folder: str | Path, config: Any, *, stage: str) -> None:
        """Open the run of a folder, or make it, and log what does not change.

        The first iteration does so: an algorithm that only evaluates is not tracked.

        Args:
            folder: of the run.
            config: of the algorithm.
            stage: name of the algorithm.

        Raises:
            ConfigError: another training tracks its run there.
            OSError: the folder cannot be written.
            CheckpointError: likewise.
        """
        folder = Path(folder).absolute()
        self.buffer = Buffer(
            folder / BUFFER_FOLDER,
            RunSpec(
                uri=self._uri,
                experiment=self._experiment,
                name=self._name or folder.name,
            ),
        )
        self.buffer.add("status", {"status": "RUNNING"})
        self.buffer.params(parameters(config))
        self.buffer.tags(
            {
                **self._given_tags,
                "algorithm": stage,
                **git_tags(),
                **file_tags(self._data_files),
                "run_folder": folder.as_uri(),
                "checkpoints": (folder / "checkpoints").as_uri(),
                "model_folder": (folder / "model").as_uri(),
            }
        )
        if self._system_metrics:
            self._system = SystemMetrics(self.buffer)
        atexit.register(self._close_at_exit)

    def on_train_result(
        self,
        *,
        algorithm: Any,
        metrics_logger: Any = None,
        result: dict[str, Any],
        **kwargs: Any,
    ) -> None:
        """Log an iteration."""
        stage = type(algorithm).__name__
        record = record_of(result, stage=stage)
        try:
            if self.buffer is None:
                folder = self._folder or algorithm.logdir
                self.open(folder, algorithm.config, stage=stage)
            self.log_iteration(record, result.get(ALARMS, ()))
            self._log_trees(record, getattr(algorithm, "saved_trees", ()))
            self._register_best(record, algorithm)
        except (OSError, ARPOError) as error:  # a full disk, for example
            log = logger.debug if self._has_failed else logger.warning
            self._has_failed = True
            log("iteration %d is not all in MLflow: %s", record["iteration"], error)

    def log_iteration(self, record: Record, alarms: Any = ()) -> None:
        """Log an iteration's record and what rang in it."""
        assert self.buffer is not None
        log_record(self.buffer, record, alarms)

    def close(self, timeout_s: float = 10.0, *, status: str = "FINISHED") -> bool:
        """End the run; whether MLflow has everything.

        What it lacks is sent by the next training in the folder.
        """
        atexit.unregister(self._close_at_exit)
        if self._system is not None:
            self._system.stop()
        buffer, self.buffer = self.buffer, None
        if buffer is None:
            return True
        buffer.add("status", {"status": status})
        return buffer.close(timeout_s)

    def _close_at_exit(self) -> None:
        self.close(status=status_at_exit())

    def _log_trees(self, record: Record, trees: Any) -> None:
        assert self.buffer is not None
        for trace in iteration_traces(trees[: self._num_traced_trees], record):
            self.buffer.add("trace", {"trace": trace})

    def _register_best(self, record: Record, algorithm: Any) -> None:
        accuracy = record.get(EVAL_ACCURACY)
        if accuracy is None or self._registered_model is None:
            return
        assert self.buffer is not None
        best = self.buffer.folder / BEST_FILE
        before = json.loads(best.read_text())["accuracy"] if best.exists() else None
        if before is not None and accuracy <= before:
            return
        folders = self.buffer.folder / "best"
        folder = folders / f"iteration_{record['iteration']:06d}"
        save_agent_of(algorithm, folder)
        self.buffer.add(
            "model",
            {
                "folder": str(folder),
                "name": self._registered_model,
                "alias": CHAMPION,
                "measures": [(EVAL_ACCURACY, "max")],
                "tags": {
                    "iteration": str(record["iteration"]),
                    EVAL_ACCURACY: f"{accuracy:.4f}",
                },
            },
            sync=True,
        )
        # After the line, which is on the disk by now: a kill between the two registers
        # nothing twice, and a power cut leaves no best model that nobody registers.
        write_whole(best, json.dumps({"accuracy": accuracy, "folder": str(folder)}))
        for older in folders.iterdir():
            if older != folder:
                shutil.rmtree(older, ignore_errors=True)


def status_at_exit() -> str:
    """How a process ends, for MLflow: by an exception that nobody caught, or well.

    `sys.exit` with any number counts as well.
    """
    # 3.12 adds `last_exc`, and sets `last_value` as before.
    error = getattr(sys, "last_exc", None) or getattr(sys, "last_value", None)
    if error is None:
        return "FINISHED"
    return "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"


def save_agent_of(algorithm: Any, folder: Path) -> None:
    """An algorithm's model with the rest of its agent, ready to be served.

    Raises:
        CheckpointError: it cannot be written.
    """
    from rllib_arpo.agents import agent_of_config, save_agent

    algorithm.save_pretrained(folder)
    save_agent(agent_of_config(algorithm.config), folder)


def iteration_traces(
    trees: Iterable[RolloutTree], record: Record
) -> list[dict[str, Any]]:
    """Traces of trees of one iteration.

    Args:
        trees: whole.
        record: of the iteration.
    """
    tokens = record.get(NUM_TOKENS_SAMPLED, 0.0)
    share_s = record["time_generate_s"] / tokens if tokens else 0.0
    tags = {"iteration": str(record["iteration"])}
    return [tree_trace(tree, seconds_per_token=share_s, tags=tags) for tree in trees]


def log_record(buffer: Buffer, record: Record, alarms: Any = ()) -> None:
    """Log an iteration's numbers, and a tag per alarm."""
    numbers = {
        name: float(value)
        for name, value in record.items()
        if isinstance(value, int | float) and name != "iteration"
    }
    step = int(record["iteration"])
    buffer.metrics(numbers, step=step)
    if alarms:
        buffer.tags(
            {
                f"alarm.{alarm['name']}": f"iteration {step}: {alarm['message']} "
                f"Try: {alarm['advice']}"
                for alarm in alarms
            }
        )
