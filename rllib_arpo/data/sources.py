"""From a config's `train_tasks` or `eval_tasks` to tasks, and to a cursor over them."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rllib_arpo.data.cursor import Cursor, TaskCursor
from rllib_arpo.data.data_file import DataFile
from rllib_arpo.data.datasets import load_tasks
from rllib_arpo.data.mixture import Mixture, MixtureCursor
from rllib_arpo.errors import ConfigError, DataError
from rllib_arpo.tree import Task

TaskSource = (
    str
    | Path
    | DataFile
    | Mixture
    | Mapping[str, Any]
    | Callable[[], Sequence[Task]]
    | Sequence[Task]
)


def resolve_tasks(source: TaskSource | None, *, setting: str) -> Sequence[Task]:
    """Load the tasks of a file, a function or a list.

    Args:
        source: a file (by path, as a `DataFile`, or as a mapping of its arguments), a
            function that returns tasks, or tasks.
        setting: name of the setting, for the error.

    Raises:
        DataError: nothing is set, a row is wrong, or there are no tasks.
        ConfigError: a mapping describes no file, or the source is a mixture.
    """
    if source is None:
        raise DataError(
            f"`{setting}` is None: set `.environment({setting}=...)` to a parquet or "
            "jsonl file, a list of tasks, or a function that returns one."
        )
    if isinstance(source, Mixture):
        raise ConfigError(
            f"`{setting}` is a mixture, whose weights say how to draw tasks for "
            "training: give one file, folder, list or function here"
        )
    if isinstance(source, str | Path | DataFile | Mapping):
        tasks = load_tasks(source)
    else:
        tasks = source() if callable(source) else source
    if not len(tasks):
        raise DataError(f"`{setting}` holds no task.")
    return tasks


def make_cursor(source: TaskSource | None, *, seed: int, setting: str) -> Cursor:
    """A shuffled cursor over a source or a mixture of sources.

    Args:
        source: as for `resolve_tasks`, or a `Mixture`, or a mapping of its arguments
            `sources` and `weights`.
        seed: of the order.
        setting: name of the setting, for the error.

    Raises:
        DataError: nothing is set, a row is wrong, or there are no tasks.
        ConfigError: a mapping describes no file and no mixture.
    """
    if isinstance(source, Mapping) and "sources" in source:
        unknown = sorted(map(str, set(source) - {"sources", "weights"}))
        if unknown:
            raise ConfigError(
                f"`{setting}`: a mixture has `sources` and `weights`, got {unknown}"
            )
        source = Mixture(**source)
    if isinstance(source, Mixture):
        return MixtureCursor(
            [
                resolve_tasks(one, setting=f"{setting}, source {number}")
                for number, one in enumerate(source.sources)
            ],
            weights=source.weights,
            seed=seed,
        )
    return TaskCursor(resolve_tasks(source, setting=setting), seed=seed)
