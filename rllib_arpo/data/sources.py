"""From a config's `train_tasks` or `eval_tasks` to a list of tasks."""

from collections.abc import Callable, Sequence

from rllib_arpo.data.datasets import load_tasks
from rllib_arpo.errors import DataError
from rllib_arpo.tree import Task

TaskSource = str | Callable[[], Sequence[Task]] | Sequence[Task]


def resolve_tasks(source: TaskSource | None, *, setting: str) -> Sequence[Task]:
    """Load the tasks of a file, a function or a list.

    Args:
        source: a file, a function that returns tasks, or tasks.
        setting: name of the setting, for the error.

    Raises:
        DataError: nothing is set, a row is wrong, or there are no tasks.
    """
    if source is None:
        raise DataError(
            f"`{setting}` is None: set `.environment({setting}=...)` to a parquet or "
            "jsonl file, a list of tasks, or a function that returns one."
        )
    if isinstance(source, str):
        tasks = load_tasks(source)
    else:
        tasks = source() if callable(source) else source
    if not len(tasks):
        raise DataError(f"`{setting}` holds no task.")
    return tasks
