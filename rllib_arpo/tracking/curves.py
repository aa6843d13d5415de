"""Learning curves of one run, or of one setting over several seeds.

A run writes `metrics.jsonl`: one JSON object per iteration with flat keys. From it
come `curves.png` and `curves.svg`, eight panels that answer, left to right: does it
learn, does it use its tools, is it unsure after their results, does it branch there;
how much does the tree save, how long are answers, and where does the time go. Lines
differ in dash and shade, so a print in grey reads the same. A key that a run did not
log is not drawn; NaN leaves a gap. Runs of different settings: `comparison.py`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from rllib_arpo.errors import DataError
from rllib_arpo.metrics import METRICS_FILE
from rllib_arpo.storage import output_aside
from rllib_arpo.tracking.series import (
    TOKEN_RATIO,
    Series,
    align,
    has_data,
    over_runs,
    read_metrics,
)

DASHES = ("-", "--", ":", "-.")
SHADES = ("#000000", "#0072B2", "#D55E00", "#777777")
FILLS = ("#2b5c8a", "#7fa8cc", "#e0a458", "#f3dcb8")
HATCHES = ("", "//", "..", "xx")
BAND = "band: from the least to the greatest"


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One of the plots.

    Attributes:
        title: what it shows.
        unit: label of the vertical axis.
        keys: metric key -> name in the legend.
        stacked: areas on top of each other instead of lines.
        floor: where the vertical axis starts; None: below the least value.
    """

    title: str
    unit: str
    keys: Mapping[str, str]
    stacked: bool = False
    floor: float | None = 0.0


PANELS = (
    Panel(
        title="Reward and accuracy",
        unit="mean per trajectory",
        keys={"accuracy": "accuracy", "reward_mean": "reward"},
        floor=None,
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
        title="Tokens shared",
        unit="path tokens per tree token",
        keys={TOKEN_RATIO: "token ratio"},
        floor=1.0,
    ),
    Panel(
        title="Response length",
        unit="tokens per trajectory",
        keys={"response_tokens": "response tokens"},
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
    return save_figure(_draw([read_metrics(path) for path in paths]), out)


def save_figure(figure: Figure, out: Path | str) -> Path:
    """Write a PNG, and an SVG of the same name beside it; return the PNG's path.

    Raises:
        CheckpointError: one cannot be written.
    """
    out = Path(out)
    if out.suffix != ".png":
        out = out.with_name(out.name + ".png")
    with output_aside(out) as aside:
        figure.savefig(aside, dpi=150, format="png")
    with output_aside(out.with_suffix(".svg")) as aside:
        figure.savefig(aside, format="svg")
    return out


def new_figure(height: float) -> Figure:
    """Room for two rows of four panels, `height` in inches."""
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12)
    figure = Figure(figsize=(16, height), layout=layout)
    FigureCanvasAgg(figure)
    return figure


def label_axes(axes: Axes, *, title: str, unit: str, floor: float | None) -> None:
    """What all plots over iterations have in common."""
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel("iteration")
    axes.set_ylabel(unit)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.locator_params(axis="x", integer=True)
    if floor is not None:
        least, greatest = axes.dataLim.intervaly
        if least >= floor and greatest > floor:
            axes.set_ylim(floor, floor + 1.08 * (greatest - floor))


def _draw(runs: Sequence[Series]) -> Figure:
    """Lay out the panels; every one has axes, those without data stay hidden."""
    figure = new_figure(6.4)
    if len(runs) > 1:
        figure.supxlabel(f"line: mean of {len(runs)} runs, {BAND}", fontsize=10)
    for axes, panel in zip(figure.subplots(2, 4).flat, PANELS, strict=True):
        keys = [key for key in panel.keys if any(has_data(run, key) for run in runs)]
        axes.set_visible(bool(keys))
        if keys:
            (_draw_stacked if panel.stacked else _draw_lines)(axes, panel, keys, runs)
            label_axes(axes, title=panel.title, unit=panel.unit, floor=panel.floor)
            if panel.stacked:
                axes.set_ylim(0, 1.25 * axes.get_ylim()[1])  # the legend's room
            if len(panel.keys) > 1:
                axes.legend(frameon=False, fontsize=9, ncols=2 if panel.stacked else 1)
    return figure


def _draw_lines(
    axes: Axes, panel: Panel, keys: Sequence[str], runs: Sequence[Series]
) -> None:
    for key, dash, shade in zip(panel.keys, DASHES, SHADES, strict=False):
        if key not in keys:
            continue
        iterations, values = align(runs, key)
        mean = over_runs(np.nanmean, values)
        axes.plot(
            iterations,
            mean,
            linestyle=dash,
            color=shade,
            label=panel.keys[key],
        )
        lone = lone_points(mean)
        if lone:
            axes.plot(iterations[lone], mean[lone], "o", color=shade, markersize=4)
        if len(runs) > 1:
            axes.fill_between(
                iterations,
                over_runs(np.nanmin, values),
                over_runs(np.nanmax, values),
                color=shade,
                alpha=0.15,
                linewidth=0,
            )


def lone_points(values: np.ndarray) -> list[int]:
    """Where a value stands between gaps: it has no line to show it."""
    known = np.isfinite(values)
    beside = np.zeros_like(known)
    beside[1:] |= known[:-1]
    beside[:-1] |= known[1:]
    return np.flatnonzero(known & ~beside).tolist()


def _draw_stacked(
    axes: Axes, panel: Panel, keys: Sequence[str], runs: Sequence[Series]
) -> None:
    iterations, _ = align(runs, keys[0])
    layers = np.stack([over_runs(np.nanmean, align(runs, key)[1]) for key in keys])
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
