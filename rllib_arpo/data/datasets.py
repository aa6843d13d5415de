"""Rows of files to tasks, every row checked before any work starts.

One pass over the files reads, checks and stores (see `stored_tasks`): a bad row is
refused with its file, row and field, and memory does not grow with the files.
"""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from rllib_arpo.data.data_file import DataFile
from rllib_arpo.data.files import read_rows
from rllib_arpo.data.rows import doubt_of, task_of
from rllib_arpo.data.stored_tasks import StoredTasks, store_tasks
from rllib_arpo.errors import DataError, RowError
from rllib_arpo.tree import Task

MAX_WARNINGS = 5

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CheckedRow:
    """What became of a row.

    Attributes:
        file: as messages name it.
        number: from 0, in its file.
        task: None when the row is bad.
        error: why it is bad; with a task, why nobody can learn from it.
    """

    file: str
    number: int
    task: Task | None
    error: RowError | None


def checked_rows(file: DataFile) -> Iterator[CheckedRow]:
    """Every row, in order, as a task or with what is wrong with it.

    Raises:
        DataError: there is no such file, or it cannot be read.
    """
    for row in read_rows(file):
        if isinstance(row, RowError):
            yield CheckedRow(row.file, row.row, None, row)
            continue
        try:
            task = task_of(row, file)
            error = doubt_of(row, file, task)
        except RowError as bad:
            task, error = None, bad
        yield CheckedRow(row.place, row.number, task, error)


def load_tasks(
    source: str | Path | DataFile | Mapping[str, Any], *, limit: int | None = None
) -> StoredTasks:
    """Read and check files of rows.

    Args:
        source: a path or URI, or a `DataFile` as one or as a mapping.
        limit: only the first so many tasks; later rows are not read.

    Raises:
        DataError: the file is missing, empty or of another kind, or a row is wrong
            (unless `on_bad_row="skip"`); names file, row (from 0) and field.
        ConfigError: a mapping describes no `DataFile`.
    """
    if limit is not None and limit < 1:
        raise DataError(f"`limit` ({limit}) must be at least 1")
    file = DataFile.of(source)
    bad: list[RowError] = []
    tasks = store_tasks(islice(_tasks(file, bad), limit))
    if not tasks:
        problem = f"no good row ({bad[0]})" if bad else "no rows"
        raise DataError(f"{file.path} holds {problem}")
    if bad:
        tasks.num_skipped = len(bad)
        logger.warning(
            "%s: %d bad rows are left out, %d kept", file.path, len(bad), len(tasks)
        )
    return tasks


def _tasks(file: DataFile, bad: list[RowError]) -> Iterator[Task]:
    """The good rows; the others go to `bad`, or are raised."""
    num_warnings = 0
    for row in checked_rows(file):
        if row.task is None:
            assert row.error is not None
            if file.on_bad_row == "error":
                raise row.error
            bad.append(row.error)
        else:
            yield row.task
        if row.error is not None:
            num_warnings += 1
            if num_warnings <= MAX_WARNINGS:
                logger.warning("%s", row.error)
    if num_warnings > MAX_WARNINGS:
        logger.warning(
            "%s: %d more rows like these; `rllib-arpo data check` names all",
            file.path,
            num_warnings - MAX_WARNINGS,
        )
