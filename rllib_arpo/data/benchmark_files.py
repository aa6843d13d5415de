"""Rows of a benchmark as its publisher wrote them: a file, or a data set of the Hub.

Column names are compared in lower case with `_` for spaces, since releases of the same
benchmark differ in that alone ("Final answer", "final_answer").
"""

import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from pyarrow import ArrowException

from rllib_arpo.errors import ConfigError, DataError, RowError

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")


@dataclass(frozen=True, slots=True, kw_only=True)
class HubFile:
    """A split of a data set of the Hugging Face Hub.

    Attributes:
        repo: "owner/name".
        config: name of the subset, None where there is one only.
        split: of the subset.
    """

    repo: str
    config: str | None = None
    split: str = "test"

    def __str__(self) -> str:
        return ":".join((self.repo, self.config or "", self.split))


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkRow:
    """A row and its place, for messages that name it.

    Attributes:
        file: where it is from.
        number: from 0.
        fields: column -> value; columns in lower case, with `_` for spaces.
    """

    file: str
    number: int
    fields: Mapping[str, Any]

    def first(self, *columns: str) -> tuple[str, Any]:
        """Name and value of the first of these columns that holds something.

        Raises:
            RowError: none does.
        """
        for column in columns:
            value = self.fields.get(column)
            if value not in (None, "", []):
                return column, value
        names = ", ".join(f"`{name}`" for name in columns)
        raise self.error(columns[0], f"missing or empty; expected one of {names}")

    def text(self, *columns: str) -> str:
        """The first of these columns that holds something, as text.

        Raises:
            RowError: none does, or it holds something else.
        """
        column, value = self.first(*columns)
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise self.error(column, f"expected text, got {value!r:.80}")
        return str(value).strip()

    def error(self, field: str, problem: str) -> RowError:
        """What is wrong with a column, to be raised."""
        return RowError(self.file, self.number, field, problem)


def read_rows(source: Path | HubFile) -> Iterator[BenchmarkRow]:
    """All rows in their order.

    Args:
        source: a .jsonl, .json (a list, or one object per line), .parquet or .csv
            file, or a data set of the Hub.

    Raises:
        DataError: the file is missing or cannot be read.
        ConfigError: the Hub cannot be asked.
    """
    rows = _hub_rows(source) if isinstance(source, HubFile) else _file_rows(source)
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise RowError(
                str(source), number, "", f"expected an object, got {row!r:.80}"
            )
        fields = {_column(str(name)): value for name, value in row.items()}
        yield BenchmarkRow(file=str(source), number=number, fields=fields)


def _column(name: str) -> str:
    return name.strip().lower().replace(" ", "_")


def _file_rows(path: Path) -> Iterator[Any]:
    if not path.is_file():
        raise DataError(f"{path} is no file")
    if path.suffix not in SUFFIXES:
        raise DataError(f"{path}: expected a {', '.join(SUFFIXES)} file")
    try:
        if path.suffix == ".parquet":
            with pq.ParquetFile(path) as file:
                for batch in file.iter_batches(batch_size=1024):
                    yield from batch.to_pylist()
        elif path.suffix == ".csv":
            with path.open(encoding="utf-8-sig", newline="") as lines:
                yield from csv.DictReader(lines)
        else:
            yield from _json_rows(path.read_text(encoding="utf-8"))
    except (ArrowException, OSError, csv.Error, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _json_rows(text: str) -> Iterator[Any]:
    if text.lstrip().startswith("["):
        yield from json.loads(text)
        return
    # Not `splitlines`: U+2028 and its like stand in questions.
    for line in text.split("\n"):
        if line.strip():
            yield json.loads(line)


def _hub_rows(source: HubFile) -> Iterator[Any]:
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            f"{source} is a data set of the Hugging Face Hub, and reading it needs the "
            'package datasets: pip install "rllib_arpo[hub]", or give a file'
        ) from error
    try:
        yield from datasets.load_dataset(source.repo, source.config, split=source.split)
    # boundary: the Hub fails in the ways of its HTTP client, of the file system and of
    # scripts in the repository; none of them is ours to handle.
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"cannot load {source} from the Hugging Face Hub: {reason}. Some data sets "
            "need a login and the owner's consent. Or give a file: NAME=PATH, or "
            "--benchmark-dir"
        ) from error
