"""What a person should know about a file of rows before it is trained on.

Bad are rows that training refuses, and rows that nobody can learn from: their answer
is blank, or the reward cannot understand it. Duplicates and overlaps with a benchmark
are named, for the reader to judge. One pass; some 200 bytes of memory per row.
"""

from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from hashlib import blake2b
from itertools import islice
from typing import Any, Literal

import numpy as np

from rllib_arpo.data.data_file import DataFile
from rllib_arpo.data.datasets import CheckedRow, checked_rows, load_tasks
from rllib_arpo.data.overlaps import BenchmarkQuestions, normalized
from rllib_arpo.data.rows import shown
from rllib_arpo.envs.dialogue_tokens import DialogueTokens
from rllib_arpo.envs.env_config import load_tokenizer
from rllib_arpo.errors import DataError
from rllib_arpo.rewards.answers import problem
from rllib_arpo.rewards.math_worker import MAX_WORKERS
from rllib_arpo.tree import Task, question

Kind = Literal["bad_row", "blank_answer", "unparsable_answer", "duplicate", "overlap"]

BAD: tuple[Kind, ...] = ("bad_row", "blank_answer", "unparsable_answer")
JUDGED: tuple[Kind, ...] = ("duplicate", "overlap")
BATCH_ROWS = 1024


@dataclass(frozen=True, slots=True)
class Finding:
    """Something about one row.

    Attributes:
        kind: one of `BAD` or `JUDGED`.
        file: as the reader named it.
        row: from 0, in its file.
        problem: one line.
    """

    kind: Kind
    file: str
    row: int
    problem: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What was found.

    Attributes:
        file: what was checked.
        num_rows: all of them.
        num_tasks: rows that training accepts.
        by_source: tasks of each source.
        by_ability: tasks of each ability.
        length_unit: of the prompt lengths, "tokens" or "words".
        prompt_lengths: min, median, p95, max; empty when there is no task.
        findings: in the order of the rows.
    """

    file: str
    num_rows: int
    num_tasks: int
    by_source: dict[str, int]
    by_ability: dict[str, int]
    length_unit: str
    prompt_lengths: dict[str, float]
    findings: tuple[Finding, ...]

    @property
    def num_bad(self) -> int:
        """Rows that training refuses or that nobody can learn from."""
        return len({(f.file, f.row) for f in self.findings if f.kind in BAD})

    def of_kind(self, kind: Kind) -> list[Finding]:
        """The findings of one kind."""
        return [finding for finding in self.findings if finding.kind == kind]

    def as_json(self) -> dict[str, Any]:
        """Plain values: the numbers, and the findings by kind."""
        return asdict(self) | {
            "num_bad": self.num_bad,
            "findings": {
                kind: [
                    {"file": f.file, "row": f.row, "problem": f.problem}
                    for f in self.of_kind(kind)
                ]
                for kind in (*BAD, *JUDGED)
            },
        }


def check_data(
    file: DataFile,
    *,
    model: str | None = None,
    benchmarks: Sequence[DataFile] = (),
    on_rows: Callable[[int], None] = lambda _: None,
) -> Report:
    """Read all rows and look at each.

    Args:
        file: what is to be trained on.
        model: folder or hub name of the tokenizer that counts the prompts; without
            it they are measured in words.
        benchmarks: files whose questions must not be in `file`.
        on_rows: called with how many more rows are done.

    Raises:
        DataError: a file is missing, empty or cannot be read, or a benchmark's row
            is wrong.
        ConfigError: `model` holds no fast tokenizer.
    """
    tally = _Tally(
        BenchmarkQuestions(task for one in benchmarks for task in load_tasks(one)),
        length=_num_words if model is None else _token_counter(model),
    )
    rows = checked_rows(file)
    with ThreadPoolExecutor(MAX_WORKERS) as threads:
        while batch := list(islice(rows, BATCH_ROWS)):
            for row, doubt in zip(
                batch, threads.map(_answer_problem, batch), strict=True
            ):
                tally.add(row, doubt)
            on_rows(len(batch))
    if not tally.num_rows:
        raise DataError(f"{file.path} holds no rows")
    return Report(
        file=str(file.path),
        num_rows=tally.num_rows,
        num_tasks=len(tally.lengths),
        by_source=dict(tally.sources.most_common()),
        by_ability=dict(tally.abilities.most_common()),
        length_unit="words" if model is None else "tokens",
        prompt_lengths=_summary(tally.lengths),
        findings=tuple(tally.findings),
    )


class _Tally:
    """What has been seen so far."""

    def __init__(
        self, benchmarks: BenchmarkQuestions, *, length: Callable[[Task], int]
    ) -> None:
        self.num_rows = 0
        self.sources: Counter[str] = Counter()
        self.abilities: Counter[str] = Counter()
        self.lengths = array("q")
        self.findings: list[Finding] = []
        self._benchmarks = benchmarks
        self._length = length
        self._first: dict[bytes, tuple[str, int]] = {}

    def add(self, row: CheckedRow, answer_problem: str | None) -> None:
        self.num_rows += 1
        task = row.task
        if task is None:
            self._find(row, "bad_row", _problem(row))
            return
        if row.error is not None:
            self._find(row, "blank_answer", _problem(row))
        elif answer_problem is not None:
            self._find(row, "unparsable_answer", answer_problem)
        self.sources[task.source] += 1
        self.abilities[task.ability] += 1
        self.lengths.append(self._length(task))
        self._compare(row, normalized(question(task)))

    def _compare(self, row: CheckedRow, text: str) -> None:
        key = blake2b(text.encode(), digest_size=16).digest()
        file, number = self._first.setdefault(key, (row.file, row.number))
        if (file, number) != (row.file, row.number):
            where = f"row {number}" if file == row.file else f"{file}, row {number}"
            self._find(row, "duplicate", f"the question of {where}")
        overlap = self._benchmarks.find(text)
        if overlap is not None:
            self._find(row, "overlap", overlap)

    def _find(self, row: CheckedRow, kind: Kind, problem: str) -> None:
        self.findings.append(Finding(kind, row.file, row.number, problem))


def _problem(row: CheckedRow) -> str:
    """What is wrong with it, without the place that a finding has already."""
    assert row.error is not None
    field = f"`{row.error.field}` " if row.error.field else ""
    return f"{field}{row.error.problem}"


def _answer_problem(row: CheckedRow) -> str | None:
    """Why the reward understands none of the accepted answers."""
    if row.task is None:
        return None
    found: str | None = None
    for answer in row.task.answers:
        found = problem(answer, row.task.ability)
        if found is None:
            return None
        found = f"{shown(answer)}: {found}"
    return found


def _num_words(task: Task) -> int:
    return sum(len(message.content.split()) for message in task.messages)


def _token_counter(model: str) -> Callable[[Task], int]:
    tokens = DialogueTokens(load_tokenizer(model))
    return lambda task: len(tokens.prompt_ids(task.messages))


def _summary(lengths: Sequence[int]) -> dict[str, float]:
    if not len(lengths):
        return {}
    low, median, p95, high = np.percentile(lengths, (0, 50, 95, 100)).tolist()
    return {"min": low, "median": median, "p95": p95, "max": high}
