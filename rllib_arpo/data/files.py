"""Files of rows, wherever pyarrow can read: read as a stream, a batch in memory.

1. parquet: the needed columns only, page by page, so that one row group of many
   gigabytes does not count.
2. jsonl: a row's number is that of its line; blank lines are passed over.
3. A folder of Hugging Face's `save_to_disk`: `state.json` lists Arrow streams, whose
   rows are numbered on from file to file as `dataset[i]` does. `save_to_disk` writes
   the rows of a shuffled or filtered data set in their new order.
4. A URI with a key in it is refused: errors, logs and `config.json` would show it.
"""

import fnmatch
import io
import json
import os
import posixpath
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pyarrow.parquet as pq
from pyarrow import ArrowException, RecordBatch, ipc
from pyarrow.fs import FileSelector, FileSystem, FileType, LocalFileSystem

from rllib_arpo.data.data_file import DataFile
from rllib_arpo.data.rows import Row
from rllib_arpo.errors import DataError, RowError

SUFFIXES = (".parquet", ".jsonl", ".arrow")
STATE_FILE = "state.json"
SPLITS_FILE = "dataset_dict.json"
BATCH_ROWS = 128
BUFFER_BYTES = 1 << 20

_URI = re.compile(r"[a-z][a-z0-9+.-]*://")
_KEY_IN_URI = re.compile(r"[a-z][a-z0-9+.-]*://[^/]*@|[?&](secret|access)_key=")


@dataclass(frozen=True, slots=True, kw_only=True)
class RowsOnDisk:
    """Rows numbered from 0, in one file or in several of the same kind.

    Attributes:
        filesystem: where the files are.
        paths: in `filesystem`, in the order of the rows.
        place: what messages call it.
        name: what task ids begin with.
    """

    filesystem: FileSystem
    paths: tuple[str, ...]
    place: str
    name: str


def read_rows(file: DataFile) -> Iterator[Row | RowError]:
    """Rows in order; an error stands for a row that is no JSON object.

    Raises:
        DataError: there is no such file, or it cannot be read.
    """
    for rows in find_rows(file):
        yield from rows_of(rows, file.column_names)


def jsonl_rows(path: Path) -> Iterator[object]:
    """The objects of a jsonl file.

    Raises:
        DataError: a line is no JSON object; names file and row.
    """
    for row in read_rows(DataFile(path)):
        if isinstance(row, RowError):
            raise row
        yield row.fields


def find_rows(file: DataFile) -> list[RowsOnDisk]:
    """The files that a `DataFile` stands for, by name.

    Raises:
        DataError: there are none, or of no kind that can be read.
    """
    place, query = _without_query(str(file.path))
    folder, name = posixpath.split(place)
    try:
        if "*" in name:
            filesystem, path = _opened(f"{folder or '.'}{query}")
            return _shards(filesystem, path, folder, name, file)
        filesystem, path = _opened(place + query)
        kind = filesystem.get_file_info(path).type
        if kind == FileType.Directory:
            return _folder(filesystem, path, place.rstrip("/"), file)
    except (ArrowException, OSError) as error:
        raise DataError(f"{place} cannot be reached: {error}") from error
    if kind != FileType.File:
        raise DataError(f"{place} is no file and no folder")
    if not path.endswith(SUFFIXES):
        raise DataError(f"{place}: expected a {', '.join(SUFFIXES)} file or a folder")
    _refuse_split(file, place)
    return [_single(filesystem, path, place)]


def rows_of(rows: RowsOnDisk, columns: frozenset[str]) -> Iterator[Row | RowError]:
    """The rows of files that were found, with at least `columns` of them.

    Raises:
        DataError: a file cannot be read.
    """
    kind = posixpath.splitext(rows.paths[0])[1]
    try:
        if kind == ".jsonl":
            yield from _rows_of_lines(rows)
        else:
            yield from _rows_of_batches(rows, kind, columns)
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{rows.place} cannot be read as {kind}: {error}") from error


def _rows_of_lines(rows: RowsOnDisk) -> Iterator[Row | RowError]:
    (path,) = rows.paths
    with (
        rows.filesystem.open_input_stream(path) as stream,
        # NativeFile reads as a raw stream does, but is not declared to be one.
        io.BufferedReader(cast(io.RawIOBase, stream), BUFFER_BYTES) as lines,
    ):
        for number, line in enumerate(lines):
            if line.isspace():
                continue
            try:
                fields = json.loads(line)
                yield Row(rows.place, number, fields, name=rows.name)
            except RowError as error:
                yield error
            except (ValueError, RecursionError) as error:
                yield RowError(rows.place, number, "", f"no JSON: {error}")


def _rows_of_batches(
    rows: RowsOnDisk, kind: str, columns: frozenset[str]
) -> Iterator[Row]:
    batches = (
        batch for path in rows.paths for batch in _batches(rows, path, kind, columns)
    )
    number = 0
    for batch in batches:
        for fields in batch.to_pylist():
            yield Row(rows.place, number, fields, name=rows.name)
            number += 1


def _without_query(text: str) -> tuple[str, str]:
    """A URI without its `?...`, and that; a path may hold question marks."""
    if not _URI.match(text):
        return text, ""
    place, mark, query = text.partition("?")
    return place, mark + query


def _opened(text: str) -> tuple[FileSystem, str]:
    if not _URI.match(text):
        return LocalFileSystem(), os.path.abspath(text)
    if _KEY_IN_URI.search(text):
        raise DataError(
            f"{text.partition('://')[0]}://... holds a key, which logs and config.json "
            "would show: leave it out and set the provider's environment variables, "
            "as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    return FileSystem.from_uri(text)


def _single(filesystem: FileSystem, path: str, place: str) -> RowsOnDisk:
    name = posixpath.splitext(posixpath.basename(path))[0]
    return RowsOnDisk(filesystem=filesystem, paths=(path,), place=place, name=name)


def _refuse_split(file: DataFile, place: str) -> None:
    if file.split is not None:
        raise DataError(
            f"{place} has no splits, so `split` ({file.split!r}) says nothing: choose "
            'files by name, as "data/train-*.parquet"'
        )


def _folder(
    filesystem: FileSystem, path: str, place: str, file: DataFile
) -> list[RowsOnDisk]:
    held = {
        posixpath.basename(info.path)
        for info in filesystem.get_file_info(FileSelector(path))
    }
    if SPLITS_FILE in held:
        path, place = _split(filesystem, path, place, file.split)
        name = "/".join(path.rsplit("/", 2)[-2:])
    elif STATE_FILE in held:
        _refuse_split(file, place)
        name = posixpath.basename(path)
    else:
        return _shards(filesystem, path, place, "*", file)
    state = _json(filesystem, f"{path}/{STATE_FILE}", place)
    paths = tuple(f"{path}/{one['filename']}" for one in state["_data_files"])
    if not paths:
        raise DataError(f"{place} holds no rows")
    return [RowsOnDisk(filesystem=filesystem, paths=paths, place=place, name=name)]


def _split(
    filesystem: FileSystem, path: str, place: str, split: str | None
) -> tuple[str, str]:
    splits = _json(filesystem, f"{path}/{SPLITS_FILE}", place)["splits"]
    if split not in splits:
        raise DataError(f"{place}: `split` ({split!r}) must be one of {splits}")
    return f"{path}/{split}", f"{place}/{split}"


def _json(filesystem: FileSystem, path: str, place: str) -> dict[str, Any]:
    with filesystem.open_input_stream(path) as file:
        try:
            return json.loads(file.readall())
        except ValueError as error:
            name = posixpath.basename(path)
            raise DataError(f"{place}: {name} is no JSON: {error}") from error


def _shards(
    filesystem: FileSystem, path: str, place: str, pattern: str, file: DataFile
) -> list[RowsOnDisk]:
    names = sorted(
        posixpath.basename(info.path)
        for info in filesystem.get_file_info(FileSelector(path))
        if info.type == FileType.File
    )
    chosen = [
        name
        for name in names
        if fnmatch.fnmatchcase(name, pattern) and name.endswith(SUFFIXES)
    ]
    if not chosen:
        raise DataError(
            f"{place or '.'} holds no {', '.join(SUFFIXES)} file named {pattern!r}"
        )
    kinds = sorted({posixpath.splitext(name)[1] for name in chosen})
    if len(kinds) > 1:
        raise DataError(
            f"{place or '.'} holds {' and '.join(kinds)} files: choose one kind by a "
            f'name such as "{posixpath.join(place, "*" + kinds[0])}"'
        )
    _refuse_split(file, place)
    return [
        _single(filesystem, posixpath.join(path, name), posixpath.join(place, name))
        for name in chosen
    ]


def _batches(
    rows: RowsOnDisk, path: str, kind: str, columns: frozenset[str]
) -> Iterator[RecordBatch]:
    with rows.filesystem.open_input_file(path) as opened:
        if kind == ".parquet":
            file = pq.ParquetFile(opened, buffer_size=BUFFER_BYTES, pre_buffer=False)
            names = _needed(rows.place, file.schema_arrow.names, columns)
            yield from file.iter_batches(batch_size=BATCH_ROWS, columns=names)
        else:
            with ipc.open_stream(opened) as stream:
                names = _needed(rows.place, stream.schema.names, columns)
                for batch in stream:
                    yield batch.select(names)


def _needed(place: str, names: list[str], columns: frozenset[str]) -> list[str]:
    needed = [name for name in names if name in columns]
    if not needed:
        raise DataError(
            f"{place} has the columns {names}, and none of {sorted(columns)}: say "
            "which hold the question and the answer by `columns`"
        )
    return needed
