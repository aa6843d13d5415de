"""Sweeps with Ray Tune: from a file to a table of trials.

OUT/sweep/       Tune's own state and trials
OUT/mlflow/      what waits for MLflow, if the sweep is tracked
OUT/trials.csv   one row per trial, best first
OUT/best.json    the best trial, with its checkpoint
OUT/lock         held by the process that sweeps here
"""

import runpy
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from ray import tune
from ray.tune.experiment import Trial

from rllib_arpo.cli_config import check_model
from rllib_arpo.errors import ARPOError, ConfigError
from rllib_arpo.progress import Console
from rllib_arpo.run_lock import only_here
from rllib_arpo.sweep_console import TrialLines
from rllib_arpo.sweep_table import (
    SweepTable,
    sweep_table,
    varied_settings,
    with_settings,
    write_table,
)

MLFLOW_FOLDER = "mlflow"


def run_sweep(
    file: Path,
    out: Path,
    *,
    resume: bool = False,
    mlflow: str | None = None,
    console: Console | None = None,
) -> SweepTable:
    """Run or go on with the sweep of a file, and write its table.

    Ctrl-C ends it too; then some trials are unfinished.

    Args:
        file: Python that defines `tuner`, or `make_tuner(storage_path)`.
        out: where the sweep and its table go.
        resume: go on with the sweep in `out`: trials that had not ended start from
            their last checkpoint, those that failed start again.
        mlflow: URI of the store to track it in, "default" for the usual one; a sweep
            that was tracked stays so.
        console: shows the trials as they go, in place of Tune's own output unless the
            file sets `verbose`. None: Tune's own.

    Returns:
        The trials, best first, those that failed last.

    Raises:
        ConfigError: the file defines no sweep, the model of its trials is not there,
            there is no sweep to go on with, `out` holds one already, or another
            process sweeps there.
    """
    with only_here(out, does="sweeps"):
        return _run_sweep(file, out, resume=resume, mlflow=mlflow, console=console)


def _run_sweep(
    file: Path, out: Path, *, resume: bool, mlflow: str | None, console: Console | None
) -> SweepTable:
    tuner = _restored(file, out) if resume else _new(file, out)
    settings: Any = tuner._local_tuner
    run_config = settings.get_run_config()
    running = _Running()
    callbacks = [
        *(run_config.callbacks or ()),
        *_tracking(settings, out, mlflow),
        running,
    ]
    if console is not None:
        callbacks.append(TrialLines(console, settings._tune_config.metric))
        if run_config._verbose is None:
            run_config.verbose = 0
    kept = _KeptSettings(tuner if resume else None)
    callbacks.append(kept)
    run_config.callbacks = callbacks
    results = tuner.fit()
    kept.give(results._experiment_analysis.trials)
    table = sweep_table(results, interrupted=running.trials)
    write_table(out, table)
    return table


def load_tuner(file: Path, storage_path: str) -> tune.Tuner:
    """The sweep that a file defines.

    Raises:
        ConfigError: there is no such file, it fails, or it defines no sweep.
    """
    if not file.is_file():
        raise ConfigError(f"{file}: no such file; give a Python file with a `tuner`")
    with _importing_beside(file):
        try:
            names = runpy.run_path(str(file))
            make = names.get("make_tuner")
            tuner = names.get("tuner") if make is None else make(storage_path)
        except ARPOError:
            raise
        except Exception as error:  # boundary: the file is a user's code
            reason = f"{type(error).__name__}: {error}"
            raise ConfigError(f"{file} cannot be run: {reason}") from error
    if not isinstance(tuner, tune.Tuner):
        raise ConfigError(
            f"{file} must define `tuner`, or `make_tuner(storage_path)`, a "
            f"`ray.tune.Tuner`; got {type(tuner).__name__}"
        )
    return tuner


class _Running(tune.Callback):
    """Which trials run; after an interrupt Tune calls them terminated."""

    def __init__(self) -> None:
        self.trials: set[str] = set()

    def on_trial_start(self, *args: Any, trial: Trial, **info: Any) -> None:
        self.trials.add(trial.trial_id)

    def on_trial_complete(self, *args: Any, trial: Trial, **info: Any) -> None:
        self.trials.discard(trial.trial_id)

    def on_trial_error(self, *args: Any, trial: Trial, **info: Any) -> None:
        self.trials.discard(trial.trial_id)


class _KeptSettings(tune.Callback):
    """Gives the trials of a restored sweep the settings that they had last.

    Tune gives them those that they began with, which population based training has
    changed.
    """

    def __init__(self, restored: tune.Tuner | None) -> None:
        before = restored.get_results()._experiment_analysis.trials if restored else ()
        self._kept = {trial.trial_id: varied_settings(trial) for trial in before}

    def on_step_begin(self, *args: Any, trials: list[Trial], **info: Any) -> None:
        self.give(trials)

    def give(self, trials: Iterable[Trial]) -> None:
        """Once to each; a sweep that had ended makes no step."""
        for trial in trials:
            kept = self._kept.pop(trial.trial_id, None)
            if kept is not None and kept != varied_settings(trial):
                trial.set_config(with_settings(trial.config, kept))


def _new(file: Path, out: Path) -> tune.Tuner:
    if _sweeps_in(out):
        raise ConfigError(
            f"{out} holds a sweep already: choose another --out, or go on with --resume"
        )
    tuner = load_tuner(file, str(out.absolute()))
    # In every trial it would be found missing again.
    space: Any = cast(Any, tuner._local_tuner).param_space or {}
    model = space.get("_model_config", {}).get("model")
    if isinstance(model, str):
        check_model(model)
    return tuner


def _restored(file: Path, out: Path) -> tune.Tuner:
    folders = _sweeps_in(out)
    if len(folders) != 1:
        found = "no sweep" if not folders else f"{len(folders)} sweeps"
        raise ConfigError(f"{out} holds {found} to go on with: leave out --resume")
    # Tune stores no objects of a search space: the file gives them anew.
    made: Any = load_tuner(file, str(out.absolute()))._local_tuner
    return tune.Tuner.restore(
        str(folders[0]),
        made.trainable,
        param_space=made.param_space,
        resume_unfinished=True,
        restart_errored=True,
    )


def _sweeps_in(out: Path) -> list[Path]:
    """Folders of sweeps that have begun; a `Tuner` that is only made has a file."""
    begun = {file.parent for file in out.absolute().glob("*/experiment_state-*.json")}
    return sorted(folder for folder in begun if tune.Tuner.can_restore(str(folder)))


def _tracking(settings: Any, out: Path, mlflow: str | None) -> list[tune.Callback]:
    """The callback of MLflow, if the sweep is to be tracked or was."""
    folder = out.absolute() / MLFLOW_FOLDER
    if mlflow is None and not folder.is_dir():
        return []
    from rllib_arpo.tracking.attach import files_of, store_uri
    from rllib_arpo.tracking.mlflow_store import USUAL_STORE
    from rllib_arpo.tracking.mlflow_tune import TuneMLflowCallback
    from rllib_arpo.tracking.trial_traces import with_traces

    space = settings.param_space = with_traces(settings.param_space or {})
    chosen = settings._tune_config
    return [
        TuneMLflowCallback(
            folder,
            uri=store_uri(mlflow or USUAL_STORE),
            name=out.absolute().name,
            data_files=files_of(space),
            metric=chosen.metric,
            mode=chosen.mode,
        )
    ]


@contextmanager
def _importing_beside(file: Path) -> Iterator[None]:
    folder = str(file.absolute().parent)
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)
