"""Learning curves of different settings in one figure.

A setting is one run, or several that differ in their seed: their mean is the line,
and a band goes from the least to the greatest. Each panel shows one metric, and each
setting has its own dash, shade and mark, the same in all panels: a print in grey
reads the same.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rllib_arpo.errors import DataError
from rllib_arpo.metrics import METRICS_FILE
from rllib_arpo.tracking.curves import (
    BAND,
    DASHES,
    SHADES,
    label_axes,
    lone_points,
    new_figure,
    plot_run,
    plot_runs,
    save_figure,
)
from rllib_arpo.tracking.series import (
    TOKEN_RATIO,
    Series,
    align,
    has_data,
    over_runs,
    read_metrics,
)

MARKS = ("", "o", "s", "^")
# Marks on a line; one for each iteration would hide the dashes.
NUM_MARKS = 10

TIMES = ("time_generate_s", "time_tools_s", "time_learn_s", "time_sync_s")
SECONDS = "seconds"

# Key, title, unit, floor of the vertical axis.
PANELS = (
    ("accuracy", "Accuracy", "mean per trajectory", None),
    ("reward_mean", "Reward", "mean per trajectory", None),
    ("tool_calls_per_trajectory", "Tool calls", "calls per trajectory", 0.0),
    ("branches_per_tree", "Branches", "branches per tree", 0.0),
    ("entropy_after_tool", "Entropy after a tool result", "nats per token", 0.0),
    ("entropy_elsewhere", "Entropy elsewhere", "nats per token", 0.0),
    (TOKEN_RATIO, "Tokens shared", "path tokens per tree token", 1.0),
    (SECONDS, "Time per iteration", "seconds", 0.0),
)


def plot(
    folders: Sequence[Path], *, names: Sequence[str] = (), out: Path | None = None
) -> Path:
    """Draw one run, seeds of one setting, or several settings side by side.

    Args:
        folders: of the runs.
        names: one per run; runs of the same name are seeds of one setting. Empty:
            each run is a setting of its own, named after its folder.
        out: the PNG to write. None: `curves.png` in the folder of a single run, else
            `comparison.png` here.

    Returns:
        Path of the PNG; an SVG of the same name is beside it.

    Raises:
        DataError: no folder, as many names as there are no runs, or a metrics file is
            missing, empty or broken.
    """
    groups = group_runs(folders, names)
    if len(folders) == 1:
        return plot_run(folders[0]) if out is None else plot_runs(folders, out)
    out = out or Path("comparison.png")
    return plot_runs(folders, out) if len(groups) == 1 else plot_groups(groups, out)


def group_runs(
    folders: Sequence[Path], names: Sequence[str] = ()
) -> dict[str, list[Path]]:
    """Runs by the name of their setting, in the order in which names appear.

    Raises:
        DataError: no folder, or the number of names is not that of the runs.
    """
    if not folders:
        raise DataError("no run to plot: give at least one folder")
    if names and len(names) != len(folders):
        raise DataError(
            f"{len(names)} names ({', '.join(names)}) for {len(folders)} runs: give "
            "one for each run; runs of the same name are seeds of one setting"
        )
    if not names:
        short = [folder.absolute().name for folder in folders]
        different = len(set(short)) == len(short)
        names = short if different else [str(folder) for folder in folders]
    groups: dict[str, list[Path]] = {}
    for name, folder in zip(names, folders, strict=True):
        groups.setdefault(name, []).append(folder)
    return groups


def plot_groups(groups: Mapping[str, Sequence[Path | str]], out: Path | str) -> Path:
    """Draw settings side by side.

    Args:
        groups: name of a setting -> folders of its runs, at least one.
        out: the PNG to write; an SVG of the same name goes beside it.

    Returns:
        Path of the PNG.

    Raises:
        DataError: a metrics file is missing, empty or broken.
    """
    return save_figure(
        _draw(
            {
                name: [_read(Path(folder)) for folder in folders]
                for name, folders in groups.items()
            }
        ),
        out,
    )


def style(number: int) -> dict[str, Any]:
    """How the line of a setting looks: no two of the first 16 are the same in grey."""
    turn, place = divmod(number, len(DASHES))
    return {
        "linestyle": DASHES[place],
        "color": SHADES[place],
        "marker": MARKS[turn % len(MARKS)],
        "markersize": 4,
    }


def _read(folder: Path) -> dict[str, np.ndarray]:
    series = read_metrics(folder / METRICS_FILE)
    times = [series[key] for key in TIMES if key in series]
    if times:
        total = np.nansum(times, axis=0)
        # A sum of nothing is no time of 0 s.
        series[SECONDS] = np.where(np.isfinite(times).any(axis=0), total, np.nan)
    return series


def _draw(groups: Mapping[str, Sequence[Series]]) -> Figure:
    figure = new_figure(6.8)
    for axes, (key, title, unit, floor) in zip(
        figure.subplots(2, 4).flat, PANELS, strict=True
    ):
        drawn = [
            runs for runs in groups.values() if any(has_data(r, key) for r in runs)
        ]
        axes.set_visible(bool(drawn))
        if drawn:
            for number, runs in enumerate(groups.values()):
                _draw_group(axes, key, runs, style(number))
            label_axes(axes, title=title, unit=unit, floor=floor)
    lines = [figure.axes[0].plot([], [], **style(i))[0] for i in range(len(groups))]
    figure.legend(
        lines,
        [_label(name, runs) for name, runs in groups.items()],
        loc="outside lower center",
        ncols=min(len(groups), 6),
        frameon=False,
        handlelength=4,
        title=BAND if any(len(runs) > 1 for runs in groups.values()) else None,
        title_fontsize=10,
    )
    return figure


def _label(name: str, runs: Sequence[Series]) -> str:
    return name if len(runs) == 1 else f"{name} (mean of {len(runs)} runs)"


def _draw_group(
    axes: Axes, key: str, runs: Sequence[Series], look: Mapping[str, Any]
) -> None:
    if not any(has_data(run, key) for run in runs):
        return
    iterations, values = align(runs, key)
    mean = over_runs(np.nanmean, values)
    every = max(len(iterations) // NUM_MARKS, 1)
    axes.plot(iterations, mean, markevery=every, **look)
    lone = lone_points(mean)
    if lone:
        dot = look["marker"] or "."
        axes.plot(iterations[lone], mean[lone], dot, color=look["color"])
    if len(runs) > 1:
        axes.fill_between(
            iterations,
            over_runs(np.nanmin, values),
            over_runs(np.nanmax, values),
            color=look["color"],
            alpha=0.12,
            linewidth=0,
        )
