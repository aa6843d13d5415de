"""Tasks on disk, each read when it is asked for.

A file of rows may be larger than memory, and a shuffled cursor jumps about in it,
which neither parquet nor jsonl allows. So the tasks are written, as one JSON line
each, to a temporary file that is mapped into memory and has no name: the system drops
its pages when memory is short, and the file when the process ends, however it ends.
In memory stay eight bytes per task.
"""

import json
import mmap
import shutil
import tempfile
from array import array
from collections.abc import Iterable, Sequence
from typing import Any, overload

import numpy as np

from rllib_arpo.errors import DataError
from rllib_arpo.tree import Message, Task

_to_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


class StoredTasks(Sequence[Task]):
    """A sequence of tasks that holds none of them.

    A slice is a view of the same file. A pickled one carries its rows with it, so
    give a config the name of a large file rather than its tasks.

    Args:
        data: the tasks as JSON, one after another.
        ends: [num_tasks + 1] where each begins, and the end of the last.
        rows: which of them this is a view of.
        num_skipped: bad rows that were left out of the file.
    """

    def __init__(
        self,
        data: mmap.mmap | bytes,
        ends: np.ndarray,
        rows: range,
        *,
        num_skipped: int = 0,
    ) -> None:
        self._data = data
        self._ends = ends
        self._rows = rows
        self.num_skipped = num_skipped

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Task: ...
    @overload
    def __getitem__(self, index: slice) -> "StoredTasks": ...
    def __getitem__(self, index: int | slice) -> "Task | StoredTasks":
        if isinstance(index, slice):
            return StoredTasks(
                self._data,
                self._ends,
                self._rows[index],
                num_skipped=self.num_skipped,
            )
        return _decoded(self._json(self._rows[index]))

    def __reduce__(self) -> tuple[Any, ...]:
        lines = [self._json(row) for row in self._rows]
        ends = np.cumsum([0, *map(len, lines)])
        rows = range(len(lines))
        return _unpickled, (b"".join(lines), ends, rows, self.num_skipped)

    def __deepcopy__(self, memo: dict[int, Any]) -> "StoredTasks":
        return self  # nothing in it changes

    def _json(self, row: int) -> bytes:
        return self._data[self._ends[row] : self._ends[row + 1]]


def store_tasks(tasks: Iterable[Task]) -> StoredTasks:
    """Write tasks to a temporary file, in the folder that TMPDIR names.

    Raises:
        DataError: there is no room for them, or none of them.
    """
    ends = array("q", [0])
    try:
        with tempfile.TemporaryFile(prefix="rllib_arpo_tasks_") as file:
            for task in tasks:
                ends.append(ends[-1] + file.write(_encoded(task)))
            file.flush()
            # Nothing to map: a mapping cannot be empty.
            data = (
                mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                if ends[-1]
                else b""
            )
    except OSError as error:
        folder = tempfile.gettempdir()
        free = shutil.disk_usage(folder).free / 1e6
        raise DataError(
            f"cannot write {ends[-1] / 1e6:.1f} MB of tasks or more into {folder}: "
            f"{error.strerror} ({free:.1f} MB are free). Free some space there, or set "
            "TMPDIR to a folder on a larger disk."
        ) from error
    return StoredTasks(data, np.frombuffer(ends, np.int64), range(len(ends) - 1))


def _unpickled(
    data: bytes, ends: np.ndarray, rows: range, num_skipped: int
) -> StoredTasks:
    return StoredTasks(data, ends, rows, num_skipped=num_skipped)


def _encoded(task: Task) -> bytes:
    fields = (
        task.task_id,
        [(message.role, message.content) for message in task.messages],
        task.answers,
        task.ability,
        task.source,
        task.metadata,
    )
    return _to_json(fields).encode()


def _decoded(line: bytes) -> Task:
    task_id, messages, answers, ability, source, metadata = json.loads(line)
    return Task(
        task_id=task_id,
        messages=tuple(Message(role=role, content=text) for role, text in messages),
        answers=tuple(answers),
        ability=ability,
        source=source,
        metadata=metadata,
    )
