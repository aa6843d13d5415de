"""What the viewer reads from the folder of a run."""

import json
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rllib_arpo.data.tree_files import read_trees
from rllib_arpo.errors import ConfigError, DataError
from rllib_arpo.tracking.viewer_data import AdvantageSettings, Decode
from rllib_arpo.tree import RolloutTree

ALARMS_FILE = "alarms.jsonl"
CONFIG_FILE = "config.json"


def tree_files(run: Path) -> dict[int, Path]:
    """The run's files of trees by their iteration.

    Raises:
        ConfigError: there are none.
    """
    found = sorted((run / "trees").glob("iteration_*.parquet"))
    if not found:
        raise ConfigError(
            f"{run} keeps no trees: give the folder of a run, trained with "
            "num_saved_trees above 0"
        )
    return {int(file.stem.removeprefix("iteration_")): file for file in found}


class TreesByTask:
    """Trees of a run by their task, read when they are asked for.

    Args:
        files: of trees, by their iteration.
    """

    def __init__(self, files: Mapping[int, Path]) -> None:
        self._files = files
        self._iterations: dict[str, list[int]] = {}
        for number, file in files.items():
            for task_id in task_ids(file):
                self._iterations.setdefault(task_id, []).append(number)

    def nearest(self, task_id: str, iteration: int) -> tuple[int, RolloutTree] | None:
        """The task's tree that is nearest to an iteration, and which that is of."""
        numbers = self._iterations.get(task_id, [])
        if not numbers:
            return None
        number = min(numbers, key=lambda number: abs(number - iteration))
        trees = read_trees(self._files[number])
        return number, next(tree for tree in trees if tree.task.task_id == task_id)


def task_ids(file: Path) -> list[str]:
    """Of the trees in a file, without reading these.

    Raises:
        DataError: it is no file of trees.
    """
    try:
        with pq.ParquetFile(file) as parquet:
            tasks = parquet.read(columns=["task.task_id"])["task"].to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file} cannot be read as parquet: {error}") from error
    return [task["task_id"] for task in tasks]


def alarms(run: Path, iteration: int) -> list[dict[str, Any]]:
    """What rang in an iteration."""
    file = run / ALARMS_FILE
    if not file.exists():
        return []
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    # A line without an end was cut by a kill.
    alarms = [json.loads(line) for line in lines if line.endswith("\n")]
    return [alarm for alarm in alarms if alarm["iteration"] == iteration]


def advantage_settings(run: Path) -> AdvantageSettings:
    """Of the run's config, which names what differs from the defaults."""
    file = run / CONFIG_FILE
    if not file.exists():
        return AdvantageSettings()
    config = json.loads(file.read_text(encoding="utf-8"))
    names = [field.name for field in fields(AdvantageSettings)]
    return AdvantageSettings(**{key: config[key] for key in names if key in config})


def decoder(run: Path) -> Decode | None:
    """Text of a token by the tokenizer that the run saved, if it did."""
    files = [run / folder / "tokenizer.json" for folder in ("model", "base")]
    saved = next((file for file in files if file.is_file()), None)
    if saved is None:
        return None
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(saved))
    return cache(lambda token: tokenizer.decode([token], skip_special_tokens=False))
