"""From metrics files to arrays: iterations on one axis, runs beside each other."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from rllib_arpo.errors import DataError
from rllib_arpo.metrics import TOKENS_PATHS, TOKENS_UNIQUE

# Not logged, but made of what is: tokens of all trajectories per token of the trees.
TOKEN_RATIO = "token_ratio"

Row: TypeAlias = dict[str, Any]
Series: TypeAlias = Mapping[str, np.ndarray]


def read_metrics(path: Path | str) -> dict[str, np.ndarray]:
    """Read a metrics file into one array per key.

    Args:
        path: of a file with one JSON object per line; blank lines are skipped, and a
            last line without an end, which a kill or a full disk left.

    Returns:
        Key -> [num_iterations] float64 in the order of `iteration`; NaN where a
        line lacks the key. A `stage` that counts from its own start again goes on
        where the one before ended. Values that are not numbers are left out;
        `TOKEN_RATIO` is added.

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
    series = {
        key: np.array([row.get(key, np.nan) for row in rows], float) for key in keys
    }
    if {TOKENS_PATHS, TOKENS_UNIQUE} <= keys.keys():
        series[TOKEN_RATIO] = series[TOKENS_PATHS] / series[TOKENS_UNIQUE]
    return series


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
    written = path.read_bytes()
    try:
        return written[: written.rfind(b"\n") + 1].decode("utf-8").splitlines()
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


def has_data(run: Series, key: str) -> bool:
    """Whether a run has any finite value of `key`."""
    return key in run and bool(np.isfinite(run[key]).any())


def align(runs: Sequence[Series], key: str) -> tuple[np.ndarray, np.ndarray]:
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


def over_runs(statistic: Callable[..., np.ndarray], values: np.ndarray) -> np.ndarray:
    """[num_iterations] of a statistic over runs; NaN where no run has a value."""
    result = np.full(values.shape[1], np.nan)
    known = np.isfinite(values).any(axis=0)
    finite = np.where(np.isfinite(values), values, np.nan)
    result[known] = statistic(finite[:, known], axis=0)
    return result
