r"""Rows of questions to tasks, and the cursor that walks over them.

Two kinds of files: parquet in the layout that verl, Search-R1 and the ARPO release
share (`prompt` as chat messages, `reward_model.ground_truth`), and jsonl with
`prompt` or `question` or `problem` and `answer`. A bad row is refused before any work
starts, with its file, row and field. The release wrote `\boxed` as a backspace
character and "oxed"; that is put right here.
"""

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, cast

import numpy as np
import pyarrow.parquet as pq
from pyarrow import ArrowException

from rllib_arpo.errors import DataError
from rllib_arpo.tree import Message, Task

ROLES = ("system", "user", "assistant")
QUESTION_FIELDS = ("prompt", "question", "problem")

logger = logging.getLogger(__name__)


def load_tasks(source: str | Path, *, limit: int | None = None) -> Sequence[Task]:
    """Read a .parquet or .jsonl file.

    Args:
        source: the file.
        limit: read only the first so many rows.

    Raises:
        DataError: the file is missing, empty or of another kind, or a row is wrong;
            names file, row (from 0) and field.
    """
    path = Path(source)
    if not path.is_file():
        raise DataError(f"{path} is no file")
    if limit is not None and limit < 1:
        raise DataError(f"`limit` ({limit}) must be at least 1")
    if path.suffix == ".parquet":
        rows = _parquet_rows(path)
    elif path.suffix == ".jsonl":
        rows = jsonl_rows(path)
    else:
        raise DataError(f"{path}: expected a .parquet or .jsonl file")
    tasks: list[Task] = []
    for number, row in enumerate(rows):
        if len(tasks) == limit:
            break
        tasks.append(_task(Row(path, number, row)))
    if not tasks:
        raise DataError(f"{path} holds no rows")
    return tasks


class CursorState(TypedDict):
    """Where a `TaskCursor` stands; plain numbers, for a checkpoint."""

    seed: int
    epoch: int
    position: int
    num_tasks: int


class TaskCursor:
    """Walks over tasks in a shuffled order, a new one each epoch, for ever.

    The order depends on the seed and the epoch alone, so a few numbers resume it.

    Args:
        tasks: at least one.
        seed: of the order.
        shuffle: False keeps the order of the file.
    """

    def __init__(
        self, tasks: Sequence[Task], *, seed: int = 0, shuffle: bool = True
    ) -> None:
        if not tasks:
            raise DataError("a cursor needs at least one task")
        self._tasks = tasks
        self._seed = seed
        self._shuffle = shuffle
        self._epoch = 0
        self._position = 0
        self._order = self._order_of(0)

    @property
    def epoch(self) -> int:
        """Passes over the tasks that have been begun, from 0."""
        return self._epoch

    def next(self, n: int) -> list[Task]:
        """The next `n` tasks, over the end of an epoch if need be."""
        tasks: list[Task] = []
        while len(tasks) < n:
            if self._position == len(self._order):
                self._epoch += 1
                self._position = 0
                self._order = self._order_of(self._epoch)
            end = min(self._position + n - len(tasks), len(self._order))
            tasks += [self._tasks[i] for i in self._order[self._position : end]]
            self._position = end
        return tasks

    def get_state(self) -> CursorState:
        """What `set_state` needs to go on here."""
        return CursorState(
            seed=self._seed,
            epoch=self._epoch,
            position=self._position,
            num_tasks=len(self._tasks),
        )

    def set_state(self, state: CursorState) -> None:
        """Go on where `state` was taken.

        Raises:
            DataError: it was taken over another number of tasks.
        """
        if state["num_tasks"] != len(self._tasks):
            raise DataError(
                f"the cursor's state is of {state['num_tasks']} tasks, the data holds "
                f"{len(self._tasks)}: resume with the data that the run began with"
            )
        self._seed = state["seed"]
        self._epoch = state["epoch"]
        self._position = state["position"]
        self._order = self._order_of(self._epoch)

    def _order_of(self, epoch: int) -> list[int]:
        if not self._shuffle:
            return list(range(len(self._tasks)))
        rng = np.random.default_rng((self._seed, epoch))
        return rng.permutation(len(self._tasks)).tolist()


class Row:
    """A row and its place, for messages that name it."""

    def __init__(self, path: Path, number: int, fields: object) -> None:
        self.path = path
        self.number = number
        if not isinstance(fields, Mapping):
            raise self.error("", f"expected an object, got {fields!r}")
        self.fields = cast(Mapping[str, Any], fields)

    def error(self, field: str, problem: str) -> DataError:
        place = f"{self.path}, row {self.number}"
        return DataError(
            f"{place}, `{field}`: {problem}" if field else f"{place}: {problem}"
        )


def _parquet_rows(path: Path) -> Iterator[object]:
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                yield from batch.to_pylist()
    except (ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as parquet: {error}") from error


def jsonl_rows(path: Path) -> Iterator[object]:
    """The lines of a jsonl file.

    Raises:
        DataError: a line is no JSON; names file and row.
    """
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines):
            if not line.strip():
                continue
            try:
                yield json.loads(line)
            except ValueError as error:
                raise DataError(f"{path}, row {number}: no JSON: {error}") from error


def _task(row: Row) -> Task:
    extra = row.fields.get("extra_info") or {}
    ability = row.fields.get("ability") or "qa"
    if not isinstance(ability, str):
        raise row.error("ability", f"expected text, got {ability!r}")
    question = extra.get("question") if isinstance(extra, Mapping) else None
    return Task(
        task_id=f"{row.path.stem}/{row.number}",
        messages=_messages(row),
        answers=_answers(row),
        ability=ability,
        source=str(row.fields.get("data_source") or row.path.stem),
        metadata={"question": question} if question else {},
    )


def _messages(row: Row) -> tuple[Message, ...]:
    field = next((f for f in QUESTION_FIELDS if row.fields.get(f)), None)
    if field is None:
        names = ", ".join(f"`{name}`" for name in QUESTION_FIELDS)
        raise row.error("prompt", f"missing or empty; expected one of {names}")
    prompt = row.fields[field]
    if isinstance(prompt, str):
        return (Message(role="user", content=_repaired(prompt)),)
    if not isinstance(prompt, list):
        raise row.error(field, f"expected text or a list of messages, got {prompt!r}")
    messages: list[Message] = []
    for number, message in enumerate(prompt):
        place = f"{field}[{number}]"
        if not isinstance(message, Mapping):
            raise row.error(place, f"expected role and content, got {message!r}")
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise row.error(f"{place}.role", f"{role!r} is none of {list(ROLES)}")
        if not isinstance(content, str) or not content.strip():
            raise row.error(f"{place}.content", f"expected text, got {content!r}")
        messages.append(Message(role=role, content=_repaired(content)))
    if messages[-1].role != "user":
        raise row.error(field, "the last message must be the user's")
    return tuple(messages)


def _answers(row: Row) -> tuple[str, ...]:
    field = "answer"
    given = row.fields.get("answer")
    reward_model = row.fields.get("reward_model")
    if reward_model is not None:
        field = "reward_model.ground_truth"
        if not isinstance(reward_model, Mapping):
            raise row.error("reward_model", f"expected fields, got {reward_model!r}")
        given = reward_model.get("ground_truth")
    listed: Iterable[object] = given if isinstance(given, list) else [given]
    answers = tuple(_answer(row, field, one) for one in listed)
    if not answers:
        raise row.error(field, "expected at least one accepted answer")
    return answers


def _answer(row: Row, field: str, given: object) -> str:
    if isinstance(given, bool) or not isinstance(given, str | int | float):
        raise row.error(field, f"expected text or a number, got {given!r}")
    answer = str(given)
    if not answer:
        raise row.error(field, "is empty")
    if not answer.strip():
        # The ARPO release has one such row; it trains nothing and harms nothing.
        logger.warning("%s", row.error(field, "is blank, so no answer can be right"))
    return answer.strip()


def _repaired(text: str) -> str:
    return text.replace("\boxed", "\\boxed")
