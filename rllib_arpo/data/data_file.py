r"""`DataFile`: where rows are, and how a row becomes a task.

    DataFile("s3://bucket/gsm8k/*.parquet", answers="gsm8k", ability="math")
    DataFile("numina", split="train", ability="math",
             columns={"question": "problem", "answer": "solution.final"})

A plain path stands for `DataFile(path)`, and a mapping with the same names for its
arguments. It is picklable, so a config can hold it, and holds no rows.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from rllib_arpo.errors import ConfigError

QUESTION_COLUMNS = ("prompt", "question", "problem")
OTHER_COLUMNS = ("answer", "reward_model", "ability", "data_source", "extra_info")
DEFAULT_COLUMNS = frozenset({*QUESTION_COLUMNS, *OTHER_COLUMNS})
MAPPED = ("question", "answer", "ability", "source")
PLACE_OF_QUESTION = "{question}"

AnswerFormat = Literal["plain", "gsm8k", "list"]
BadRowRule = Literal["error", "skip"]


@dataclass(frozen=True, kw_only=True)
class DataFile:
    r"""Rows of questions in one or several files.

    Args:
        path: a .parquet, .jsonl or .arrow file; a folder of such files, or one that
            Hugging Face's `save_to_disk` wrote; or a path whose last part has `*` in
            it. On this machine, or a URI of pyarrow: `s3://`, `gs://`, `file://`.
        split: of a saved `DatasetDict`.
        columns: which column holds what, where the row's layout is not that of verl
            or a plain `question` and `answer`. Keys are "question" (text, or chat
            messages), "answer", "ability" and "source"; values are names of columns,
            with dots for fields inside them, as "reward_model.ground_truth".
        ability: of all rows, whatever they say; chooses the answer check.
        source: of all rows, for metrics by source.
        system_prompt: takes the place of the row's own system message.
        prompt_template: the user's message, with `{question}` where the row's goes.
        answers: "plain": text, a number, or a list of accepted ones; "gsm8k": a
            worked solution, its answer after `####`; "list": a list of accepted
            answers written as text, `"['a', 'b']"`.
        on_bad_row: "error" refuses the file, "skip" leaves the row out and counts it.

    Raises:
        ConfigError: a value cannot work.
    """

    path: str | Path = field(kw_only=False)
    split: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    ability: str | None = None
    source: str | None = None
    system_prompt: str | None = None
    prompt_template: str | None = None
    answers: AnswerFormat = "plain"
    on_bad_row: BadRowRule = "error"

    def __post_init__(self) -> None:
        unknown = sorted(set(self.columns) - set(MAPPED))
        if unknown:
            raise ConfigError(
                f"`columns` has the keys {unknown}; expected some of {list(MAPPED)}"
            )
        _one_of("answers", self.answers, get_args(AnswerFormat))
        _one_of("on_bad_row", self.on_bad_row, get_args(BadRowRule))
        template = self.prompt_template
        if template is not None and PLACE_OF_QUESTION not in template:
            raise ConfigError(
                f"`prompt_template` ({template!r}) must hold {PLACE_OF_QUESTION}, "
                "where the row's question goes"
            )

    @classmethod
    def of(cls, source: "str | Path | DataFile | Mapping[str, Any]") -> "DataFile":
        """A path, or a mapping of the arguments, as a `DataFile`.

        Raises:
            ConfigError: a key is no argument, or a value cannot work.
        """
        if isinstance(source, DataFile):
            return source
        if isinstance(source, Mapping):
            known = {one.name for one in fields(cls)}
            unknown = sorted(map(str, set(source) - known))
            if unknown or "path" not in source:
                raise ConfigError(
                    f"a data file is described by `path` and some of {sorted(known)}, "
                    f"got the keys {sorted(map(str, source))}"
                )
            return cls(**source)
        return cls(source)

    @property
    def column_names(self) -> frozenset[str]:
        """Columns that a reader may need; others can be left on the disk."""
        mapped = {part for path in self.columns.values() for part in _heads(path)}
        return DEFAULT_COLUMNS | mapped


def _heads(path: str) -> tuple[str, str]:
    """What a dotted path may begin at: a column may have dots in its name."""
    return path, path.partition(".")[0]


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"`{name}` ({value!r}) must be one of {list(allowed)}")
