"""Sweeps with Ray Tune: from a file to a table of trials.

OUT/sweep/       Tune's own state and trials
OUT/trials.csv   one row per trial, best first
OUT/best.json    the best trial
"""

import csv
import json
import runpy
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from ray import tune

from rllib_arpo.errors import ConfigError
from rllib_arpo.storage import write_whole

Row = dict[str, Any]


def run_sweep(file: Path, out: Path, *, resume: bool = False) -> list[Row]:
    """Run or go on with the sweep of a file, and write its table.

    Args:
        file: Python that defines `tuner`, or `make_tuner(storage_path)`.
        out: where the sweep and its table go.
        resume: go on with the sweep in `out`: trials that had not ended start from
            their last checkpoint, those that failed start again.

    Returns:
        One row per trial, best first, those that failed last.

    Raises:
        ConfigError: the file defines no sweep, or there is none to go on with.
    """
    tuner = _restored(file, out) if resume else load_tuner(file, str(out.absolute()))
    results = tuner.fit()
    rows = table(results)
    write_table(out, rows)
    return rows


def load_tuner(file: Path, storage_path: str) -> tune.Tuner:
    """The sweep that a file defines.

    Raises:
        ConfigError: there is no such file, or it defines none.
    """
    if not file.is_file():
        raise ConfigError(f"{file}: no such file; give a Python file with a `tuner`")
    with _importing_beside(file):
        names = runpy.run_path(str(file))
        make = names.get("make_tuner")
        tuner = names.get("tuner") if make is None else make(storage_path)
    if not isinstance(tuner, tune.Tuner):
        raise ConfigError(
            f"{file} must define `tuner`, or `make_tuner(storage_path)`, a "
            f"`ray.tune.Tuner`; got {type(tuner).__name__}"
        )
    return tuner


def table(results: tune.ResultGrid) -> list[Row]:
    """One row per trial: what was varied, the metric, iterations, time, the error."""
    analysis = results._experiment_analysis
    metric, mode = analysis.default_metric, analysis.default_mode
    rows: list[Row] = []
    for result, trial in zip(cast(Any, results), analysis.trials, strict=True):
        measured: Mapping[str, Any] = result.metrics or {}
        row = {"trial": trial.trial_id, **trial.evaluated_params}
        if metric is not None:
            row[metric] = _at(measured, metric)
        row["training_iteration"] = measured.get("training_iteration", 0)
        row["seconds"] = round(measured.get("time_total_s", 0.0), 1)
        row["error"] = _one_line(result.error)
        rows.append(row)
    if metric is None:
        return rows
    sign = -1 if mode == "max" else 1

    def place(row: Row) -> tuple[bool, bool, float]:
        value = row[metric]
        return bool(row["error"]), value is None, sign * (value or 0.0)

    return sorted(rows, key=place)


def write_table(out: Path, rows: list[Row]) -> None:
    """Write `trials.csv` and `best.json` into `out`."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    out.mkdir(parents=True, exist_ok=True)
    with (out / "trials.csv").open("w", newline="") as f:
        writer = csv.DictWriter(f, keys)
        writer.writeheader()
        writer.writerows(rows)
    best = next((row for row in rows if not row["error"]), {})
    write_whole(out / "best.json", json.dumps(best, indent=2, default=str) + "\n")


def _restored(file: Path, out: Path) -> tune.Tuner:
    folder = out.absolute() / "sweep"
    if not tune.Tuner.can_restore(str(folder)):
        raise ConfigError(f"{folder} holds no sweep to go on with: leave out --resume")
    # Tune stores no objects of a search space: the file gives them anew.
    made: Any = load_tuner(file, str(out.absolute()))._local_tuner
    return tune.Tuner.restore(
        str(folder),
        made.trainable,
        param_space=made.param_space,
        resume_unfinished=True,
        restart_errored=True,
    )


@contextmanager
def _importing_beside(file: Path) -> Iterator[None]:
    folder = str(file.absolute().parent)
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def _at(values: Mapping[str, Any], key: str) -> Any:
    found: Any = values
    for part in key.split("/"):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def _one_line(error: Exception | None) -> str:
    lines = str(error).strip().splitlines() if error is not None else []
    return lines[-1] if lines else ""
