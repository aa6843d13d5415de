"""A sweep in MLflow: a parent run, and a child run per trial.

    tune.Tuner(..., run_config=tune.RunConfig(callbacks=[TuneMLflowCallback()]))

It is Ray's `MLflowLoggerCallback` with what it writes replaced: named metrics instead
of all of RLlib's, the settings that the sweep varies instead of all, through a buffer
on disk. It runs in the process of the Tuner; trials need no MLflow.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray.air.integrations.mlflow import MLflowLoggerCallback

from rllib_arpo.alarms import ALARMS
from rllib_arpo.runs import record_of
from rllib_arpo.tracking.mlflow import git_tags, log_record
from rllib_arpo.tracking.mlflow_buffer import Buffer, RunSpec
from rllib_arpo.tracking.mlflow_store import EXPERIMENT, tracking_uri


class TuneMLflowCallback(MLflowLoggerCallback):
    """Tracks a sweep.

    Args:
        folder: for the buffers; one that is there is gone on with, as after
            `Tuner.restore`.
        uri: of the store; None: as in `mlflow_store.tracking_uri`.
        experiment: name in MLflow.
        name: of the parent run; None: that of the folder.
        tags: of the parent run.
    """

    def __init__(
        self,
        folder: str | Path = "mlflow_sweep",
        *,
        uri: str | None = None,
        experiment: str = EXPERIMENT,
        name: str | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        uri = tracking_uri(uri)
        super().__init__(uri, experiment_name=experiment, tags=dict(tags or {}))
        self._folder = Path(folder).absolute()
        self._name = name or self._folder.name
        self._parent: Buffer | None = None
        self._trials: dict[str, Buffer] = {}

    def setup(self, *args: Any, **kwargs: Any) -> None:
        """Open the parent run."""
        self._parent = self._open(self._folder / "parent", self._name, None)
        self._parent.add("status", {"status": "RUNNING"})
        self._parent.tags({**(self.tags or {}), **git_tags()})

    def log_trial_start(self, trial: Any) -> None:
        """Open a trial's run; that of a restored or restarted one goes on."""
        if trial.trial_id in self._trials:
            return
        buffer = self._open(
            self._folder / trial.trial_id, str(trial), str(self._folder / "parent")
        )
        buffer.add("status", {"status": "RUNNING"})
        buffer.params({str(k): str(v) for k, v in trial.evaluated_params.items()})
        buffer.tags({"trial_id": trial.trial_id, "trial_folder": str(trial.path)})
        self._trials[trial.trial_id] = buffer

    def log_trial_result(self, iteration: int, trial: Any, result: dict) -> None:
        """Log an iteration of a trial."""
        record = record_of(result, stage=str(trial.trainable_name))
        log_record(self._trials[trial.trial_id], record, result.get(ALARMS, ()))

    def log_trial_save(self, trial: Any) -> None:
        """Note where the newest checkpoint is."""
        checkpoint = trial.checkpoint
        if checkpoint is not None and trial.trial_id in self._trials:
            self._trials[trial.trial_id].tags({"checkpoint": checkpoint.path})

    def log_trial_end(self, trial: Any, failed: bool = False) -> None:
        """End a trial's run."""
        buffer = self._trials.pop(trial.trial_id, None)
        if buffer is not None:
            buffer.add("status", {"status": "FAILED" if failed else "FINISHED"})
            buffer.close(timeout_s=5.0)

    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        """End the parent run."""
        if self._parent is not None:
            self._parent.add("status", {"status": "FINISHED"})
            self._parent.close()

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
