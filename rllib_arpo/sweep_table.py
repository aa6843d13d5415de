"""What came of a sweep: one row per trial, best first."""

import csv
import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from ray import tune
from ray.tune.experiment import Trial

from rllib_arpo.storage import output_aside, write_output

Row = dict[str, Any]
# A trial that the scheduler ended has not met the sweep's criterion to stop.
Status = Literal["finished", "stopped early", "failed", "unfinished"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepTable:
    """The trials of a sweep.

    Attributes:
        rows: per trial `trial`, `status`, the varied settings with their last values,
            the metric, `training_iteration`, `seconds`, `checkpoint` (the newest) and
            `error`; best first, those that failed last.
        varied: names of the settings that the sweep varies.
        metric: name of what is compared; None: nothing is, and none is best.
    """

    rows: list[Row]
    varied: list[str]
    metric: str | None

    @property
    def best(self) -> Row | None:
        """The best trial that did not fail; None if there is none."""
        if not self.rows or self.metric is None:
            return None
        first = self.rows[0]
        good = not first["error"] and is_number(first[self.metric])
        return first if good else None


def sweep_table(
    results: tune.ResultGrid, *, interrupted: Collection[str] = ()
) -> SweepTable:
    """The table of a sweep.

    Args:
        results: of Tune.
        interrupted: ids of the trials that ran when the sweep was.
    """
    analysis = results._experiment_analysis
    metric, mode = analysis.default_metric, analysis.default_mode
    rows: list[Row] = []
    varied: dict[str, None] = {}
    for result, trial in zip(cast(Any, results), analysis.trials, strict=True):
        measured: Mapping[str, Any] = result.metrics or {}
        settings = varied_settings(trial)
        varied |= dict.fromkeys(settings)
        status = _status(trial, measured)
        if trial.trial_id in interrupted:
            status = "unfinished"
        row = {"trial": trial.trial_id, "status": status, **settings}
        if metric is not None:
            row[metric] = at(measured, metric)
        row["training_iteration"] = measured.get("training_iteration", 0)
        row["seconds"] = round(measured.get("time_total_s", 0.0), 1)
        row["checkpoint"] = result.checkpoint.path if result.checkpoint else ""
        row["error"] = one_line(result.error)
        rows.append(row)
    if metric is not None:
        rows.sort(key=lambda row: _place(row, metric, mode))
    return SweepTable(rows=rows, varied=list(varied), metric=metric)


def write_table(out: Path, table: SweepTable) -> None:
    """Write `trials.csv` and `best.json` into `out`.

    Raises:
        CheckpointError: one cannot be written.
    """
    keys = list(dict.fromkeys(key for row in table.rows for key in row))
    with (
        output_aside(out / "trials.csv") as aside,
        aside.open("w", newline="", encoding="utf-8") as f,
    ):
        writer = csv.DictWriter(f, keys)
        writer.writeheader()
        writer.writerows(table.rows)
    best = table.best or {}
    write_output(out / "best.json", json.dumps(best, indent=2, default=str) + "\n")


def varied_settings(trial: Trial) -> Row:
    """The settings that a sweep varies, as the trial has them last.

    Population based training changes them on the way.
    """
    return {name: at(trial.config, name) for name in trial.evaluated_params}


def with_settings(config: Mapping[str, Any], settings: Mapping[str, Any]) -> Row:
    """A copy of a config with other values under keys with slashes."""
    changed = dict(config)
    for name, value in settings.items():
        head, _, rest = name.partition("/")
        changed[head] = with_settings(changed[head], {rest: value}) if rest else value
    return changed


def at(values: Mapping[str, Any], key: str) -> Any:
    """The value under a key with slashes; None if there is none."""
    found: Any = values
    for part in key.split("/"):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def is_number(value: Any) -> bool:
    """Whether a metric can be compared: RLlib gives NaN where nothing was measured."""
    return value is not None and not math.isnan(value)


def one_line(error: Exception | None) -> str:
    """The last line of an error from another process, which says what was wrong."""
    lines = str(error).strip().splitlines() if error is not None else []
    return lines[-1] if lines else ""


def _status(trial: Trial, measured: Mapping[str, Any]) -> Status:
    if trial.status == Trial.ERROR:
        return "failed"
    if trial.status != Trial.TERMINATED:
        return "unfinished"
    criteria = trial.stopping_criterion
    met = [(at(measured, name) or 0) >= least for name, least in criteria.items()]
    return "finished" if any(met) or not criteria else "stopped early"


def _place(row: Row, metric: str, mode: str | None) -> tuple[bool, bool, float]:
    sign = -1 if mode == "max" else 1
    measured = is_number(row[metric])
    return bool(row["error"]), not measured, sign * row[metric] if measured else 0.0
