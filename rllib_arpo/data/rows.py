r"""A row and what is asked of it before it becomes a task.

Two layouts are known: the one that verl, Search-R1 and the ARPO release share
(`prompt` as chat messages, `reward_model.ground_truth`), and a plain `question` or
`problem` with an `answer`; `DataFile.columns` names any other. The release wrote
`\boxed` as a backspace character and "oxed"; that is put right here.
"""

import ast
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

from rllib_arpo.data.data_file import PLACE_OF_QUESTION, QUESTION_COLUMNS, DataFile
from rllib_arpo.errors import RowError
from rllib_arpo.tree import Message, Task

ROLES = ("system", "user", "assistant")
GSM8K_MARK = "####"
MAX_SHOWN = 120


class Row:
    """A row and its place, for messages that name it.

    Args:
        path: the file, as messages name it.
        number: from 0, in its file.
        fields: what was read.
        name: of the file in task ids; its stem when empty.

    Raises:
        RowError: `fields` is no object.
    """

    def __init__(
        self, path: str | Path, number: int, fields: object, *, name: str = ""
    ) -> None:
        self.place = str(path)
        self.number = number
        self.name = name or self.path.stem
        if not isinstance(fields, Mapping):
            raise self.error("", f"expected an object, got {shown(fields)}")
        self.fields = cast(Mapping[str, Any], fields)

    @property
    def path(self) -> Path:
        """The file."""
        return Path(self.place)

    def error(self, field: str, problem: str) -> RowError:
        return RowError(self.place, self.number, field, problem)


def task_of(row: Row, file: DataFile) -> Task:
    """The task of a row.

    Raises:
        RowError: a field is missing or cannot be used.
    """
    messages = _messages(row, file)
    source = file.source or _optional_text(row, file, "source", "data_source")
    question = _own_question(row, file)
    if question is None and file.prompt_template is not None:
        question = messages[-1].content
    return Task(
        task_id=f"{row.name}/{row.number}",
        messages=_prompted(messages, file),
        answers=_answers(row, file),
        ability=file.ability or _optional_text(row, file, "ability", "ability") or "qa",
        source=source or row.name,
        metadata={} if question is None else {"question": question},
    )


def doubt_of(row: Row, file: DataFile, task: Task) -> RowError | None:
    """Why nobody can learn from a row that is well formed.

    The ARPO release has one such row (train_10k, 5274); it harms nothing, so it is
    kept, and named.
    """
    if any(task.answers):
        return None
    field, _ = _answer_field(row, file)
    return row.error(field, "is blank, so no answer can be right")


def shown(value: object) -> str:
    """What stands in a message for a value that may be long."""
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def _mapped(row: Row, file: DataFile, key: str) -> tuple[str, object] | None:
    """Path and value of what `columns` names for `key`; None if it names nothing."""
    path = file.columns.get(key)
    if path is None:
        return None
    if path in row.fields:
        return path, row.fields[path]
    value: object = row.fields
    for name in path.split("."):
        if not isinstance(value, Mapping) or name not in value:
            raise row.error(path, f"is missing; `columns` names it for {key!r}")
        value = cast(Mapping[str, object], value)[name]
    return path, value


def _optional_text(row: Row, file: DataFile, key: str, column: str) -> str | None:
    field, value = _mapped(row, file, key) or (column, row.fields.get(column))
    if value is None or value == "":
        return None
    return _text(row, field, value)


def _text(row: Row, field: str, value: object) -> str:
    if not isinstance(value, str):
        raise row.error(field, f"expected text, got {shown(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        problem = f"holds half a surrogate pair at character {error.start}"
        raise row.error(field, problem) from error
    return value.replace("\boxed", "\\boxed")


def _own_question(row: Row, file: DataFile) -> str | None:
    """The bare question that verl's layout keeps beside the prompt."""
    extra = row.fields.get("extra_info")
    if "question" in file.columns or not isinstance(extra, Mapping):
        return None
    question = extra.get("question")
    return _text(row, "extra_info.question", question) if question else None


def _messages(row: Row, file: DataFile) -> tuple[Message, ...]:
    """The row's own, the last one the user's."""
    field, prompt = _mapped(row, file, "question") or _first_question(row)
    if isinstance(prompt, str) and prompt.strip():
        return (Message(role="user", content=_text(row, field, prompt)),)
    if not isinstance(prompt, list) or not prompt:
        problem = f"expected text or a list of messages, got {shown(prompt)}"
        raise row.error(field, problem)
    messages = tuple(
        _message(row, f"{field}[{number}]", message)
        for number, message in enumerate(prompt)
    )
    if messages[-1].role != "user":
        raise row.error(field, "the last message must be the user's")
    return messages


def _first_question(row: Row) -> tuple[str, object]:
    for column in QUESTION_COLUMNS:
        if row.fields.get(column):
            return column, row.fields[column]
    names = ", ".join(f"`{name}`" for name in QUESTION_COLUMNS)
    problem = f"missing or empty; expected one of {names}, or another by `columns`"
    raise row.error("prompt", problem)


def _message(row: Row, place: str, message: object) -> Message:
    if not isinstance(message, Mapping):
        raise row.error(place, f"expected role and content, got {shown(message)}")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise row.error(f"{place}.role", f"{shown(role)} is none of {list(ROLES)}")
    text = _text(row, f"{place}.content", content)
    if not text.strip():
        raise row.error(f"{place}.content", "is blank")
    return Message(role=role, content=text)


def _prompted(messages: tuple[Message, ...], file: DataFile) -> tuple[Message, ...]:
    """With the system prompt and the template of the config."""
    prompt = list(messages)
    if file.prompt_template is not None:
        text = file.prompt_template.replace(PLACE_OF_QUESTION, prompt[-1].content)
        prompt[-1] = Message(role="user", content=text)
    if file.system_prompt is not None:
        others = (message for message in prompt if message.role != "system")
        prompt = [Message(role="system", content=file.system_prompt), *others]
    return tuple(prompt)


def _answer_field(row: Row, file: DataFile) -> tuple[str, object]:
    mapped = _mapped(row, file, "answer")
    if mapped is not None:
        return mapped
    reward_model = row.fields.get("reward_model")
    if reward_model is None:
        return "answer", row.fields.get("answer")
    if not isinstance(reward_model, Mapping):
        raise row.error("reward_model", f"expected fields, got {shown(reward_model)}")
    return "reward_model.ground_truth", reward_model.get("ground_truth")


def _answers(row: Row, file: DataFile) -> tuple[str, ...]:
    field, given = _answer_field(row, file)
    if isinstance(given, str) and file.answers == "gsm8k":
        given = _after_mark(row, field, given)
    if isinstance(given, str) and file.answers == "list":
        given = _listed(row, field, given)
    listed: Iterable[object] = given if isinstance(given, list) else [given]
    answers = tuple(_answer(row, field, one) for one in listed)
    if not answers:
        raise row.error(field, "expected at least one accepted answer")
    return answers


def _after_mark(row: Row, field: str, solution: str) -> str:
    _, mark, answer = solution.rpartition(GSM8K_MARK)
    if not mark or not answer.strip():
        problem = f"no answer after {GSM8K_MARK!r} in {shown(solution)}"
        raise row.error(field, problem)
    return answer


def _listed(row: Row, field: str, text: str) -> list[object]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "\\d" is no escape, but in an answer
            listed = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        raise row.error(field, f"is no list: {shown(text)}") from error
    if not isinstance(listed, list | tuple):
        raise row.error(field, f"is no list: {shown(text)}")
    return list(listed)


def _answer(row: Row, field: str, given: object) -> str:
    if isinstance(given, bool) or not isinstance(given, str | int | float):
        raise row.error(field, f"expected text or a number, got {shown(given)}")
    if given != given:  # NaN: how pandas writes what is missing
        raise row.error(field, "is missing (NaN)")
    if given == "":
        raise row.error(field, "is empty")
    return _text(row, field, str(given)).strip()
