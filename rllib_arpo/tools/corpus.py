"""A folder of text files as documents that a search may return.

    .txt .md     cut at paragraphs into passages, with the file's name as title
    .jsonl       a document a line: "text" or "contents", maybe "title" and "url"
    .parquet     the same, a document a row

Files are read as a stream into an Arrow file that all processes of a node map: no
process holds the texts. Text files are cut so that a hit is something that fits a
result. Files and folders whose name begins with a dot are left out.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import overload

import pyarrow as pa
import pyarrow.parquet as pq

from rllib_arpo.errors import DataError
from rllib_arpo.tools.search import Document
from rllib_arpo.tools.stored_index import building, stored_index

MAX_PASSAGE_WORDS = 120
SUFFIXES = (".txt", ".md", ".jsonl", ".parquet")
ROWS_PER_BATCH = 8192
# Part of the key of stored documents: raise it when files are read in another way.
READING = 1
_SCHEMA = pa.schema([(name, pa.string()) for name in ("text", "title", "url")])
_TABLE_FILE = "documents.arrow"
_DIGEST_FILE = "digest.txt"


class Documents(Sequence[Document]):
    """Documents in an Arrow table, in memory or mapped from a file; picklable.

    Args:
        table: with the text columns "text", "title" and "url".
        digest: of the content, the same on every machine.
    """

    def __init__(self, table: pa.Table, digest: str) -> None:
        self.digest = digest
        self._table = table
        self._columns = [table[name] for name in _SCHEMA.names]

    @classmethod
    def in_memory(cls, documents: Iterable[Document]) -> "Documents":
        """Hold `documents` in memory."""
        digest = hashlib.sha256()
        batches = [_batch(rows, digest) for rows in _batched(documents)]
        return cls(pa.Table.from_batches(batches, _SCHEMA), digest.hexdigest()[:16])

    @classmethod
    def mapped(cls, folder: Path) -> "Documents":
        """Map what `store` wrote."""
        with pa.ipc.open_file(pa.memory_map(str(folder / _TABLE_FILE))) as file:
            return cls(file.read_all(), (folder / _DIGEST_FILE).read_text())

    def __len__(self) -> int:
        return len(self._table)

    @overload
    def __getitem__(self, index: int) -> Document: ...
    @overload
    def __getitem__(self, index: slice) -> list[Document]: ...
    def __getitem__(self, index: int | slice) -> Document | list[Document]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return Document(*(column[index].as_py() for column in self._columns))

    def indexed_texts(self) -> Iterator[list[str]]:
        """In batches, what a search looks at: title and text."""
        for batch in self._table.to_batches():
            pairs = zip(
                batch["title"].to_pylist(), batch["text"].to_pylist(), strict=True
            )
            yield [f"{title}\n{text}" if title else text for title, text in pairs]


def stored_documents(corpus: Path, homes: Sequence[Path]) -> Documents:
    """The documents of a folder, read when no home holds them as they are.

    Args:
        corpus: folder of documents.
        homes: of its indexes.

    Raises:
        DataError: the folder is missing or holds no documents, a file or line is
            wrong (names both), or nothing can be written.
    """
    files = corpus_files(corpus)
    key = _fingerprint(corpus, files)

    def store(folder: Path) -> None:
        _store(read_documents(files), folder, title=f"reading {corpus}")
        if _fingerprint(corpus, corpus_files(corpus)) != key:
            raise DataError(f"files in {corpus} changed while they were read: retry")

    return Documents.mapped(stored_index(homes, "documents", key, store))


def corpus_files(corpus: Path) -> list[Path]:
    """The files of a folder that hold documents, sorted.

    Raises:
        DataError: there is no such folder, or there are no such files in it.
    """
    if not corpus.is_dir():
        raise DataError(f"{corpus} is not a folder of documents")
    files = [
        file
        for file in sorted(corpus.rglob("*"))
        if file.suffix in SUFFIXES
        and not any(part.startswith(".") for part in file.relative_to(corpus).parts)
        and file.is_file()
    ]
    if not files:
        raise DataError(f"{corpus} holds no {', '.join(SUFFIXES)} documents")
    return files


def read_documents(files: Iterable[Path]) -> Iterator[Document]:
    """The documents of files, in order.

    Raises:
        DataError: a file cannot be read or a line is wrong; names file and line.
    """
    for file in files:
        try:
            if file.suffix == ".jsonl":
                yield from _jsonl_documents(file)
            elif file.suffix == ".parquet":
                yield from _parquet_documents(file)
            else:
                yield from _passages(file)
        except UnicodeDecodeError as error:
            raise DataError(f"{file} is not UTF-8 text: {error}") from error
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{file} cannot be read: {error}") from error


def _store(documents: Iterable[Document], folder: Path, *, title: str) -> None:
    digest = hashlib.sha256()
    with (
        building(title) as advance,
        pa.OSFile(str(folder / _TABLE_FILE), "wb") as file,
        pa.ipc.new_file(file, _SCHEMA) as writer,
    ):
        for rows in _batched(documents):
            writer.write_batch(_batch(rows, digest))
            advance(len(rows))
    (folder / _DIGEST_FILE).write_text(digest.hexdigest()[:16])


def _batched(documents: Iterable[Document]) -> Iterator[list[Document]]:
    left = iter(documents)
    while rows := list(islice(left, ROWS_PER_BATCH)):
        yield rows


def _batch(rows: Sequence[Document], digest: "hashlib._Hash") -> pa.RecordBatch:
    columns = [[getattr(row, name) for row in rows] for name in _SCHEMA.names]
    digest.update(json.dumps(columns).encode())
    return pa.record_batch([pa.array(c, pa.string()) for c in columns], schema=_SCHEMA)


def _fingerprint(corpus: Path, files: Iterable[Path]) -> str:
    """Changes when a file is added, removed, renamed or written."""
    digest = hashlib.sha256(f"{READING} {MAX_PASSAGE_WORDS}".encode())
    for file in files:
        stat = file.stat()
        name = file.relative_to(corpus).as_posix()
        digest.update(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
    return digest.hexdigest()[:16]


def _passages(file: Path) -> Iterator[Document]:
    """Paragraphs joined to passages of up to `MAX_PASSAGE_WORDS` words."""
    title = file.stem.replace("_", " ")
    passage: list[str] = []
    for words in _paragraphs(file):
        for start in range(0, len(words), MAX_PASSAGE_WORDS):
            piece = words[start : start + MAX_PASSAGE_WORDS]
            if passage and len(passage) + len(piece) > MAX_PASSAGE_WORDS:
                yield Document(" ".join(passage), title)
                passage = []
            passage += piece
    if passage:
        yield Document(" ".join(passage), title)


def _paragraphs(file: Path) -> Iterator[list[str]]:
    """Words between empty lines."""
    words: list[str] = []
    with file.open(encoding="utf-8-sig") as lines:
        for line in lines:
            if line.isspace():
                yield words
                words = []
            words += line.split()
    yield words


def _jsonl_documents(file: Path) -> Iterator[Document]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.isspace():
                continue
            place = f"{file}, line {number}"
            try:
                row = json.loads(line.decode("utf-8"))
            except ValueError as error:
                raise DataError(f"{place}: not JSON in UTF-8: {error}") from error
            yield _document(row, place)


def _parquet_documents(file: Path) -> Iterator[Document]:
    with pq.ParquetFile(file) as table:
        names = {"text", "contents", "title", "url"} & set(table.schema_arrow.names)
        number = 0
        for batch in table.iter_batches(ROWS_PER_BATCH, columns=sorted(names)):
            for row in batch.to_pylist():
                yield _document(row, f"{file}, row {number}")
                number += 1


def _document(row: object, place: str) -> Document:
    if not isinstance(row, Mapping):
        raise DataError(f"{place}: expected an object, got {row!r}")
    fields = [row.get(name) or "" for name in ("title", "url")]
    field = "text" if "text" in row else "contents"
    fields.insert(0, row.get(field))
    for name, value in zip((field, "title", "url"), fields, strict=True):
        if not isinstance(value, str):
            raise DataError(
                f'{place}: expected text in "text" or "contents", and maybe in "title" '
                f'and "url"; "{name}" is {value!r}'
            )
        if not value.isascii():
            _check_unicode(value, name, place)
    text, title, url = fields
    if field == "contents" and not title:
        title, text = _quoted_title(text)
    return Document(text, title, url)


def _check_unicode(value: str, name: str, place: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f'{place}: "{name}" is not Unicode text: {error}') from error


def _quoted_title(contents: str) -> tuple[str, str]:
    """Title and text of Search-R1's layout, whose first line is the title in quotes."""
    first, _, rest = contents.partition("\n")
    if rest and len(first) > 2 and first[0] == first[-1] == '"':
        return first[1:-1], rest
    return "", contents
