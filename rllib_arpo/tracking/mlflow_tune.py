"""A sweep in MLflow: a parent run, and a child run per trial.

    config.callbacks(TrialTraces)  # trees as traces
    tune.Tuner(
        "ARPO",
        param_space=config,
        run_config=tune.RunConfig(callbacks=[TuneMLflowCallback()]),
    )

It is Ray's `MLflowLoggerCallback` with what it writes replaced: named metrics instead
of all of RLlib's, the settings that the user set instead of all, through a buffer on
disk, and at the end the model of the best trial, registered. It runs in the process of
the Tuner; trials need no MLflow. Their trees become traces where their config has the
callback `TrialTraces`, see `trial_traces.py`.

The alias `champion` moves to that model by the rule of `mlflow.py`: a champion with an
evaluation accuracy gives way only to a higher one, and one without, of another sweep
by the same metric, only to a better value of that. `registered_model` is to be a name
of its own for each task.
"""

import logging
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ray.air.integrations.mlflow import MLflowLoggerCallback
from ray.tune.experiment import Trial

from rllib_arpo.alarms import ALARMS
from rllib_arpo.arpo import ARPO
from rllib_arpo.errors import ARPOError
from rllib_arpo.runs import record_of
from rllib_arpo.sweep_table import at, is_number, one_line, varied_settings
from rllib_arpo.tracking.mlflow import EVAL_ACCURACY, log_record
from rllib_arpo.tracking.mlflow_buffer import SPEC_FILE, Buffer, RunSpec, send_later
from rllib_arpo.tracking.mlflow_facts import file_tags, git_tags, parameters
from rllib_arpo.tracking.mlflow_store import (
    EXPERIMENT,
    WAIT_FOR_MODEL_S,
    WAIT_FOR_NONE_S,
    seconds_to_wait,
    tracking_uri,
)
from rllib_arpo.tracking.mlflow_system import SystemMetrics
from rllib_arpo.tracking.registry import CHAMPION
from rllib_arpo.tracking.trial_traces import TRACES

logger = logging.getLogger(__name__)

PARENT, BEST = "parent", "best"


class TuneMLflowCallback(MLflowLoggerCallback):
    """Tracks a sweep.

    Args:
        folder: for the buffers; one that is there is gone on with, as after
            `Tuner.restore`.
        uri: of the store; None: as in `mlflow_store.tracking_uri`.
        experiment: name in MLflow.
        name: of the parent run; None: that of the folder.
        tags: of the parent run and of those of the trials.
        data_files: their hashes become tags.
        metric: of Tune, decides which trial is best; None: none is.
        mode: "max" or "min" of `metric`.
        registered_model: name under which the best trial's newest checkpoint is
            registered at the end, one for each task; None registers none.
    """

    def __init__(
        self,
        folder: str | Path = "mlflow_sweep",
        *,
        uri: str | None = None,
        experiment: str = EXPERIMENT,
        name: str | None = None,
        tags: Mapping[str, str] | None = None,
        data_files: tuple[str, ...] = (),
        metric: str | None = "env_runners/accuracy",
        mode: str | None = "max",
        registered_model: str | None = "arpo-agent",
    ) -> None:
        uri = tracking_uri(uri)
        super().__init__(uri, experiment_name=experiment, tags=dict(tags or {}))
        self._folder = Path(folder).absolute()
        self._name = name or self._folder.name
        self._data_files = data_files
        self._metric, self._mode = metric, mode
        self._registered_model = registered_model
        self._parent: Buffer | None = None
        self._system: SystemMetrics | None = None
        self._trials: dict[str, Buffer] = {}
        self._settings: dict[str, dict[str, Any]] = {}

    def setup(self, *args: Any, **kwargs: Any) -> None:
        """Open the parent run."""
        self.tags = {**(self.tags or {}), **git_tags(), **file_tags(self._data_files)}
        self._parent = self._open(self._folder / PARENT, self._name, None)
        # Of a sweep that goes on, whatever the environment says by now.
        self.tracking_uri = self._parent.spec.uri
        self.experiment_name = self._parent.spec.experiment
        self._parent.add("status", {"status": "RUNNING"})
        self._parent.tags(self.tags)
        self._system = SystemMetrics(self._parent)

    def log_trial_start(self, trial: Trial) -> None:
        """Open a trial's run; that of a restored or restarted one goes on."""
        self._note_changes(trial)
        if trial.trial_id in self._trials:
            return
        buffer = self._buffer_of(trial)
        buffer.add("status", {"status": "RUNNING"})
        buffer.params(_parameters(trial))
        buffer.tags(
            {
                **(self.tags or {}),
                "algorithm": str(trial.trainable_name),
                "trial_id": trial.trial_id,
                "run_folder": str(trial.path),
            }
        )
        self._trials[trial.trial_id] = buffer

    def log_trial_result(self, iteration: int, trial: Trial, result: dict) -> None:
        """Log an iteration of a trial."""
        record = record_of(result, stage=str(trial.trainable_name))
        buffer = self._trials[trial.trial_id]
        log_record(buffer, record, result.get(ALARMS, ()))
        # Out of what Tune writes for the trial, too.
        for trace in result.pop(TRACES, ()):
            buffer.add("trace", {"trace": trace})

    def log_trial_save(self, trial: Trial) -> None:
        """Note where the newest checkpoint is."""
        checkpoint = trial.checkpoint
        saved = trial.latest_checkpoint_result
        if saved is not None and saved.metrics is not None:
            # Which Tune writes into its own state, again and again.
            saved.metrics.pop(TRACES, None)
        if checkpoint is not None and trial.trial_id in self._trials:
            self._trials[trial.trial_id].tags({"checkpoint": checkpoint.path})

    def log_trial_end(self, trial: Trial, failed: bool = False) -> None:
        """End a trial's run; one that could not start has one, too."""
        if failed:
            self.log_trial_start(trial)
        self._end(trial.trial_id, "FAILED" if failed else "FINISHED")

    def on_experiment_end(self, trials: list[Trial], **info: Any) -> None:
        """Register the best trial's model, and end the parent run."""
        # Those of an interrupt, though Tune calls some of them terminated.
        running = list(self._trials)
        for trial_id in running:
            self._end(trial_id, "KILLED")
        assert self._parent is not None
        if self._system is not None:
            self._system.stop()
        done = not running and all(trial.is_finished() for trial in trials)
        for trial in trials:
            if trial.status == Trial.ERROR:  # known only after the trial's end
                error = {"error": one_line(trial.get_error())}
                self._add(trial, "tags", {"values": error})
        best = self._best(trials)
        if done and best is not None:
            value = at(best.last_result, self._metric or "")
            self._parent.tags({"best_trial": best.trial_id})
            self._parent.metrics({"best": value}, step=0)
            self._register(best)
        self._parent.add("status", {"status": "FINISHED" if done else "KILLED"})
        if self._parent.close():
            self._send_rest()

    def _end(self, trial_id: str, status: str) -> None:
        buffer = self._trials.pop(trial_id, None)
        if buffer is not None:
            buffer.add("status", {"status": status})
            buffer.close(WAIT_FOR_NONE_S)

    def _note_changes(self, trial: Trial) -> None:
        """Population based training sets others; MLflow's parameters stay."""
        settings = varied_settings(trial)
        before = self._settings.setdefault(trial.trial_id, settings)
        buffer = self._trials.get(trial.trial_id)
        if settings == before or buffer is None:
            return
        self._settings[trial.trial_id] = settings
        since = (trial.last_result or {}).get("training_iteration", 0) + 1
        buffer.tags(
            {
                f"changed.{_name(key)}": f"{value} from iteration {since} on"
                for key, value in settings.items()
                if value != before.get(key)
            }
        )

    def _best(self, trials: Iterable[Trial]) -> Trial | None:
        if self._metric is None:
            return None
        sign = 1 if self._mode == "max" else -1
        values = {
            trial: sign * at(trial.last_result, self._metric)
            for trial in trials
            if trial.status == Trial.TERMINATED
            and is_number(at(trial.last_result, self._metric))
        }
        return max(values, key=values.__getitem__, default=None)

    def _register(self, trial: Trial) -> None:
        """Register a trial's newest checkpoint, with what it was measured at then."""
        from rllib_arpo.agent_weights import export_weights
        from rllib_arpo.agents import find_agent, save_agent

        if self._registered_model is None:
            return
        saved = trial.latest_checkpoint_result
        if trial.checkpoint is None or saved is None or saved.metrics is None:
            logger.warning(
                "the best trial, %s, has no checkpoint, so its model is not "
                "registered: set `checkpoint_at_end` of Tune's CheckpointConfig",
                trial,
            )
            return
        shutil.rmtree(self._folder / BEST, ignore_errors=True)
        folder = self._folder / BEST / trial.trial_id
        try:
            with trial.checkpoint.as_directory() as checkpoint:
                export_weights(checkpoint, folder)
                save_agent(find_agent(checkpoint).settings, folder)
        except (OSError, ARPOError) as error:
            logger.warning("the best trial's model is not registered: %s", error)
            return
        metric = _name(self._metric or "")
        record = record_of(saved.metrics, stage=str(trial.trainable_name))
        measured = {
            metric: at(saved.metrics, self._metric or ""),
            EVAL_ACCURACY: record.get(EVAL_ACCURACY),
        }
        self._add(
            trial,
            "model",
            {
                "folder": str(folder),
                "name": self._registered_model,
                "alias": CHAMPION,
                "measures": [(EVAL_ACCURACY, "max"), (metric, self._mode or "max")],
                "tags": {
                    "iteration": str(record["iteration"]),
                    "trial_id": trial.trial_id,
                    **{
                        name: f"{value:.4f}"
                        for name, value in measured.items()
                        if is_number(value)
                    },
                },
            },
        )

    def _add(self, trial: Trial, kind: str, content: Mapping[str, Any]) -> None:
        """Add a line to the run of a trial that has ended."""
        try:
            buffer = self._buffer_of(trial)
        except (OSError, ARPOError) as error:
            logger.warning("MLflow lacks the %s of trial %s: %s", kind, trial, error)
            return
        buffer.add(kind, content)
        buffer.close(seconds_to_wait(buffer.spec.uri))

    def _send_rest(self) -> None:
        """What could not be sent when a trial ended, as the store was away."""
        for file in sorted(self._folder.glob(f"*/{SPEC_FILE}")):
            try:
                if not send_later(file.parent, timeout_s=WAIT_FOR_MODEL_S):
                    return
            except (OSError, ARPOError) as error:
                logger.warning("what waits in %s is not sent: %s", file.parent, error)

    def _buffer_of(self, trial: Trial) -> Buffer:
        parent = str(self._folder / PARENT)
        return self._open(self._folder / trial.trial_id, str(trial), parent)

    def _open(self, folder: Path, name: str, parent: str | None) -> Buffer:
        assert self.tracking_uri is not None
        return Buffer(
            folder,
            RunSpec(
                uri=self.tracking_uri,
                experiment=self.experiment_name or EXPERIMENT,
                name=name,
                parent=parent,
            ),
        )


def _parameters(trial: Trial) -> dict[str, str]:
    """What the user set, and what the sweep chose."""
    chosen = {_name(k): str(v) for k, v in varied_settings(trial).items()}
    trainable = trial.get_trainable_cls()
    if not isinstance(trainable, type) or not issubclass(trainable, ARPO):
        return chosen
    config = trainable.get_default_config().update_from_dict(dict(trial.config))
    return {**parameters(config), **chosen}


def _name(key: str) -> str:
    return key.replace("/", ".")
