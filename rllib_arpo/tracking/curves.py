"""Learning curves of one run, or of one setting over several seeds.

A run writes `metrics.jsonl`: one JSON object per iteration with flat keys. From it
come `curves.png` and `curves.svg`, six panels that answer, left to right: does it
learn, does it use its tools, is it unsure after their results, does it branch there,
and where does the time go. Lines differ in dash and shade, so a print in grey reads
the same. A key that a run did not log is not drawn; NaN leaves a gap.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from rllib_arpo.errors import DataError
from rllib_arpo.metrics import METRICS_FILE

DASHES = ("-", "--", ":", "-.")
SHADES = ("#000000", "#0072B2", "#D55E00", "#777777")
FILLS = ("#2b5c8a", "#7fa8cc", "#e0a458", "#f3dcb8")
HATCHES = ("", "//", "..", "xx")

Row: TypeAlias = dict[str, Any]
Series: TypeAlias = Mapping[str, np.ndarray]


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One of the six plots.

    Attributes:
        title: what it shows.
        unit: label of the vertical axis.
        keys: metric key -> name in the legend.
        stacked: areas on top of each other instead of lines.
    """

    title: str
    unit: str
    keys: Mapping[str, str]
    stacked: bool = False


PANELS = (
    Panel(
        title="Reward and accuracy",
        unit="mean per trajectory",
        keys={"accuracy": "accuracy", "reward_mean": "reward"},
    ),
    Panel(
        title="Tool calls",
        unit="calls per trajectory",
        keys={"tool_calls_per_trajectory": "tool calls"},
    ),
    Panel(
        title="Entropy of the policy",
        unit="nats per token",
        keys={
            "entropy_after_tool": "after a tool result",
            "entropy_elsewhere": "elsewhere",
        },
    ),
    Panel(
        title="Branches",
        unit="branches per tree",
        keys={"branches_per_tree": "branches"},
    ),
    Panel(
        title="Time per iteration",
        unit="seconds",
        keys={
            "time_generate_s": "generate",
            "time_tools_s": "tools",
            "time_learn_s": "learn",
            "time_sync_s": "sync",
        },
        stacked=True,
    ),
    Panel(
        title="Throughput",
        unit="tokens per second",
        keys={"tokens_per_s": "tokens/s"},
    ),
)


def plot_run(folder: Path | str) -> Path:
    """Draw `curves.png` and `curves.svg` beside a run's `metrics.jsonl`.

    Args:
        folder: of the run.

    Returns:
        Path of the PNG.

    Raises:
        DataError: the metrics file is missing, empty or broken; names file and line.
    """
    return plot_runs([folder], Path(folder) / "curves.png")


def plot_runs(folders: Sequence[Path | str], out: Path | str) -> Path:
    """Draw the mean over runs of one setting, with a band from least to greatest.

    Args:
        folders: of the runs, for example one per seed; one draws plain lines.
        out: the PNG to write; an SVG of the same name goes beside it.

    Returns:
        Path of the PNG.

    Raises:
        DataError: no folder, or a metrics file is missing, empty or broken.
    """
    if not folders:
        raise DataError("no run to plot: give at least one folder")
    paths = [Path(folder) / METRICS_FILE for folder in folders]
    out = Path(out)
    if out.suffix != ".png":
        out = out.with_name(out.name + ".png")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure = _draw([read_metrics(path) for path in paths])
    figure.savefig(out, dpi=150)
    figure.savefig(out.with_suffix(".svg"))
    return out


def read_metrics(path: Path | str) -> dict[str, np.ndarray]:
    """Read a metrics file into one array per key.

    Args:
        path: of a file with one JSON object per line; blank lines are skipped.

    Returns:
        Key -> [num_iterations] float64 in the order of `iteration`; NaN where a
        line lacks the key. A `stage` that counts from its own start again goes on
        where the one before ended. Values that are not numbers are left out.

    Raises:
        DataError: the file is missing or holds no iteration, or a line is not a
            JSON object with an integer `iteration`; names file and line.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file; a run writes it in its folder")
    rows = [
        _parse(line, f"{path}, line {number}")
        for number, line in enumerate(_lines(path), start=1)
        if line.strip()
    ]
    if not rows:
        raise DataError(f"{path}: empty; a run adds one line per iteration")
    rows = _number(rows)
    keys = dict.fromkeys(key for row in rows for key in row if key != "stage")
    return {
        key: np.array([row.get(key, np.nan) for row in rows], float) for key in keys
    }


def _number(rows: Sequence[Row]) -> list[Row]:
    """Count iterations through all stages; a repeated one (resumed) takes the last."""
    stages: dict[str | float | None, dict[float, Row]] = {}
    for row in rows:
        stages.setdefault(row.get("stage"), {})[row["iteration"]] = row
    numbered: list[Row] = []
    for stage in stages.values():
        last = numbered[-1]["iteration"] if numbered else -1
        offset = 0 if min(stage) > last else last + 1 - min(stage)
        numbered += [
            {**stage[iteration], "iteration": iteration + offset}
            for iteration in sorted(stage)
        ]
    return numbered


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason})") from error


def _parse(line: str, place: str) -> Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: not JSON ({error.msg})") from error
    if not isinstance(row, dict):
        raise DataError(f"{place}: expected a JSON object, got {line.strip()[:40]!r}")
    iteration = row.get("iteration")
    if not isinstance(iteration, int) or isinstance(iteration, bool):
        raise DataError(
            f"{place}: field 'iteration' must be an integer, got {iteration!r}"
        )
    return {
        key: np.nan if value is None else value
        for key, value in row.items()
        if key == "stage" or value is None or isinstance(value, int | float)
    }


def _draw(runs: Sequence[Series]) -> Figure:
    """Lay out the panels; every one has axes, those without data stay hidden."""
    figure = Figure(figsize=(12, 6.4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, panel in zip(figure.subplots(2, 3).flat, PANELS, strict=True):
        keys = [key for key in panel.keys if any(_has_data(run, key) for run in runs)]
        axes.set_visible(bool(keys))
        if keys:
            (_draw_stacked if panel.stacked else _draw_lines)(axes, panel, keys, runs)
            axes.set_title(panel.title, loc="left", fontsize=11)
            axes.set_xlabel("iteration")
            axes.set_ylabel(panel.unit)
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(axis="y", color="0.9", linewidth=0.8)
            axes.set_axisbelow(True)
            axes.xaxis.get_major_locator().set_params(integer=True)
            if panel.stacked:
                axes.set_ylim(0, 1.3 * axes.get_ylim()[1])  # the legend's room
            if len(panel.keys) > 1:
                axes.legend(frameon=False, fontsize=9, ncols=2 if panel.stacked else 1)
    return figure


def _has_data(run: Series, key: str) -> bool:
    return key in run and bool(np.isfinite(run[key]).any())


def _draw_lines(
    axes: Axes, panel: Panel, keys: Sequence[str], runs: Sequence[Series]
) -> None:
    for key, dash, shade in zip(panel.keys, DASHES, SHADES, strict=False):
        if key not in keys:
            continue
        iterations, values = _align(runs, key)
        mean = _over_runs(np.nanmean, values)
        # A lone point between gaps has no line to show it.
        marker = "." if np.isfinite(mean).sum() < 60 else ""
        axes.plot(
            iterations,
            mean,
            linestyle=dash,
            color=shade,
            marker=marker,
            label=panel.keys[key],
        )
        if len(runs) > 1:
            axes.fill_between(
                iterations,
                _over_runs(np.nanmin, values),
                _over_runs(np.nanmax, values),
                color=shade,
                alpha=0.15,
                linewidth=0,
            )


def _draw_stacked(
    axes: Axes, panel: Panel, keys: Sequence[str], runs: Sequence[Series]
) -> None:
    iterations, _ = _align(runs, keys[0])
    layers = np.stack([_over_runs(np.nanmean, _align(runs, key)[1]) for key in keys])
    timed = np.isfinite(layers).any(axis=0)
    # What an iteration did not do took no time: it is logged as NaN or not at all.
    areas = axes.stackplot(
        iterations[timed],
        np.nan_to_num(layers[:, timed]),
        labels=[panel.keys[key] for key in keys],
        edgecolor="white",
    )
    styles = dict(zip(panel.keys, zip(FILLS, HATCHES, strict=True), strict=True))
    for area, key in zip(areas, keys, strict=True):
        fill, hatch = styles[key]
        area.set_facecolor(fill)
        area.set_hatch(hatch)


def _align(runs: Sequence[Series], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Put runs on the union of their iterations.

    Returns:
        [num_iterations], and [num_runs, num_iterations] with NaN where a run has
        no value.
    """
    iterations = np.unique(np.concatenate([run["iteration"] for run in runs]))
    values = np.full((len(runs), len(iterations)), np.nan)
    for row, run in zip(values, runs, strict=True):
        if key in run:
            row[np.searchsorted(iterations, run["iteration"])] = run[key]
    return iterations, values


def _over_runs(statistic: Callable[..., np.ndarray], values: np.ndarray) -> np.ndarray:
    """[num_iterations] of a statistic over runs; NaN where no run has a value."""
    result = np.full(values.shape[1], np.nan)
    known = np.isfinite(values).any(axis=0)
    finite = np.where(np.isfinite(values), values, np.nan)
    result[known] = statistic(finite[:, known], axis=0)
    return result
