"""The search tool: BM25 over a collection of documents that is held in memory.

Long files are cut into passages when they are read, so that a hit is something that
fits a result; titles count as text. An index is built once and shared by every path.
"""

import asyncio
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import bm25s
import numpy as np

from rllib_arpo.errors import DataError, ToolError

MAX_PASSAGE_WORDS = 120
# Scoring takes about a millisecond from here on: then it leaves the event loop.
LARGE_INDEX = 20_000
_WORD = re.compile(r"\w+")


@dataclass(frozen=True, slots=True)
class Document:
    """One passage that a search may return."""

    text: str
    title: str = ""

    def __str__(self) -> str:
        return f"{self.title}: {self.text}" if self.title else self.text


class DocumentIndex:
    """Documents and their BM25 scores; read-only, picklable.

    Args:
        documents: at least one, each with at least one word.
    """

    def __init__(self, documents: Sequence[Document]) -> None:
        self.documents = tuple(documents)
        words = [_words(str(document)) for document in self.documents]
        if not any(words):
            raise DataError("a search index needs at least one document with words")
        self._bm25 = bm25s.BM25()
        self._bm25.index(words, show_progress=False)

    @classmethod
    def from_texts(cls, texts: Iterable[str]) -> Self:
        """One document a text."""
        return cls([Document(text) for text in texts])

    @classmethod
    def from_folder(cls, path: str | Path) -> Self:
        """All .txt, .md and .jsonl files below a folder.

        A text file is cut into passages, with its name as title. A line of a jsonl
        file is one document with "text" (or "contents") and maybe "title".

        Raises:
            DataError: the folder is missing or holds no documents, or a line is wrong.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise DataError(f"{folder} is not a folder of documents")
        documents: list[Document] = []
        for file in sorted(folder.rglob("*")):
            if file.suffix in (".txt", ".md"):
                documents += _passages(file)
            elif file.suffix == ".jsonl":
                documents += _jsonl_documents(file)
        if not documents:
            raise DataError(f"{folder} holds no .txt, .md or .jsonl documents")
        return cls(documents)

    def __len__(self) -> int:
        return len(self.documents)

    def search(self, query: str, top_k: int) -> list[Document]:
        """The best documents that share a word with the query, best first."""
        known = self._bm25.vocab_dict
        words = [word for word in _words(query) if word in known]
        if not words:
            return []
        scores = self._bm25.get_scores(words)
        if len(scores) > 4 * top_k:
            best = np.argpartition(-scores, top_k)[:top_k]
            # Ties at the edge are cut at random by argpartition: the lowest index wins.
            best = np.flatnonzero(scores >= scores[best].min())
        else:
            best = np.arange(len(scores))
        order = best[np.argsort(-scores[best], kind="stable")][:top_k]
        return [self.documents[i] for i in order if scores[i] > 0]


class SearchTool:
    """Answers a query with the best passages of an index, numbered.

    Args:
        index: shared by all forks.
        top_k: most passages to return.
    """

    name = "search"
    description = "Searches a collection of documents and returns the best passages."

    def __init__(self, index: DocumentIndex, *, top_k: int = 3) -> None:
        if top_k < 1:
            raise ValueError(f"`top_k` ({top_k}) must be at least 1")
        self.index = index
        self.top_k = top_k

    async def call(self, arguments: str) -> str:
        """Search for `arguments`.

        Raises:
            ToolError: the query is empty.
        """
        if not arguments.strip():
            raise ToolError("the search query is empty")
        if len(self.index) > LARGE_INDEX:
            hits = await asyncio.to_thread(self.index.search, arguments, self.top_k)
        else:
            hits = self.index.search(arguments, self.top_k)
        if not hits:
            return "No results."
        return "\n".join(f"{n}. {hit}" for n, hit in enumerate(hits, start=1))

    def fork(self) -> Self:
        """Itself: a search leaves no state."""
        return self


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _passages(file: Path) -> list[Document]:
    """Paragraphs joined to passages of up to `MAX_PASSAGE_WORDS` words."""
    title = file.stem.replace("_", " ")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text: {error}") from error
    passages: list[list[str]] = [[]]
    for paragraph in re.split(r"\n\s*\n", text):
        words = paragraph.split()
        for start in range(0, len(words), MAX_PASSAGE_WORDS):
            piece = words[start : start + MAX_PASSAGE_WORDS]
            if len(passages[-1]) + len(piece) > MAX_PASSAGE_WORDS:
                passages.append([])
            passages[-1] += piece
    return [Document(" ".join(words), title) for words in passages if words]


def _jsonl_documents(file: Path) -> list[Document]:
    documents: list[Document] = []
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                text = row["text"] if "text" in row else row["contents"]
                documents.append(Document(str(text), str(row.get("title") or "")))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise DataError(
                    f'{file}, line {number}: expected an object with "text" and '
                    f'maybe "title" ({error})'
                ) from error
    return documents
