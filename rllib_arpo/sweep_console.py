"""A sweep in the terminal: lines while it goes on, and the table at its end."""

from collections.abc import Mapping
from typing import Any

from ray import tune
from ray.tune.experiment import Trial
from rich.markup import escape
from rich.table import Table

from rllib_arpo.progress import Console
from rllib_arpo.sweep_table import Row, SweepTable, at, varied_settings


class TrialLines(tune.Callback):
    """A line when a trial starts or its settings change, per iteration, at its end.

    Args:
        console: to print on.
        metric: name of what is compared; None: nothing is.
    """

    def __init__(self, console: Console, metric: str | None) -> None:
        self._console = console
        self._metric = metric
        self._num_trials = 0
        self._settings: dict[str, Row] = {}

    def setup(self, *args: Any, total_num_samples: int = 0, **info: Any) -> None:
        """Note how many trials there will be."""
        self._num_trials = total_num_samples

    def on_trial_start(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        """A trial starts, or goes on after a pause, with other settings perhaps."""
        known = trial.trial_id in self._settings
        if varied_settings(trial) != self._settings.get(trial.trial_id):
            self._say_settings(trial, "goes on" if known else "starts")

    def on_trial_result(
        self,
        iteration: int,
        trials: list[Trial],
        trial: Trial,
        result: dict[str, Any],
        **info: Any,
    ) -> None:
        """An iteration."""
        value = "" if self._metric is None else _metric_text(result, self._metric)
        self._console.say(
            f"{trial.trial_id} {result['training_iteration']:>5}  {value}  "
            f"{result['time_total_s']:.0f} s"
        )

    def on_trial_complete(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        """A trial ended."""
        self._ended(trials, trial, "ends")

    def on_trial_error(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        """A trial failed, perhaps before it started."""
        if trial.trial_id not in self._settings:
            self._say_settings(trial, "cannot start")
        self._ended(trials, trial, "fails")

    def _say_settings(self, trial: Trial, word: str) -> None:
        self._settings[trial.trial_id] = settings = varied_settings(trial)
        values = ", ".join(f"{name} {text_of(v)}" for name, v in settings.items())
        self._console.say(f"{trial.trial_id} {word}: {values}")

    def _ended(self, trials: list[Trial], trial: Trial, word: str) -> None:
        ended = {t.trial_id for t in trials if t.is_finished()} | {trial.trial_id}
        total = max(self._num_trials, len(trials))
        self._console.say(f"{trial.trial_id} {word}; {len(ended)} of {total} trials")


def print_table(console: Console, table: SweepTable) -> None:
    """The trials, best first; under them the errors, and where the best one is."""
    metrics = [] if table.metric is None else [table.metric]
    columns = ("trial", "status", *table.varied, *metrics)
    columns = (*columns, "training_iteration", "seconds")
    shown = Table(title="Trials, best first" if metrics else "Trials")
    for name in columns:
        # Short enough for a heading, and it may break between words.
        heading = name.rpartition("/")[2].replace("_", " ")
        text = name in ("trial", "status")
        shown.add_column(
            escape(heading), justify="left" if text else "right", no_wrap=text
        )
    for row in table.rows:
        shown.add_row(*(escape(text_of(row.get(name))) for name in columns))
    console.rich.print(shown)
    for row in table.rows:
        if row["error"]:
            console.say(f"{row['trial']} failed: {row['error']}")
    if table.best is not None:
        checkpoint = table.best["checkpoint"]
        console.say(f"Best: {table.best['trial']}. Checkpoint: {checkpoint or 'none'}.")


def text_of(value: Any) -> str:
    """A setting or a number, short."""
    if isinstance(value, float):
        return f"{value:.3g}"
    return "" if value is None else str(value)


def _metric_text(result: Mapping[str, Any], metric: str) -> str:
    return f"{metric.rpartition('/')[2]} {text_of(at(result, metric))}"
