"""BM25 over documents: words only, no model, the same answer every time.

The scores of a folder's documents are computed once, stored, and mapped by every
process of the node, as are the words and the texts: an open index costs a process
next to nothing. Scoring is bm25s (Lucene's variant); what is ours is the order.

1. Equal scores keep the order of the documents, whatever the size of the index.
2. Only a document that shares a word with the query is found.
"""

import asyncio
import re
from array import array
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, cast

import bm25s
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from scipy.sparse import csr_array

from rllib_arpo.errors import DataError
from rllib_arpo.tools.corpus import Documents, stored_documents
from rllib_arpo.tools.ranking import best_first
from rllib_arpo.tools.search import Document
from rllib_arpo.tools.stored_index import building, index_homes, stored_index

# Scoring takes about a millisecond from here on: then it leaves the event loop.
LARGE_INDEX = 20_000
# Part of the version of an index: raise it when words or scores change.
SCORING = f"1-{bm25s.__version__}"
_WORD = re.compile(r"\w+")
_WORDS_FILE = "words.arrow"


class DocumentIndex:
    """Documents and their BM25 scores: a `SearchBackend`, picklable.

    Made from documents, it is held in memory and travels whole. Made from a folder,
    its name travels, and each node opens its own index, once a process.

    Args:
        documents: at least one with a word.

    Raises:
        DataError: no document has a word.
    """

    name = "bm25"

    def __init__(self, documents: Iterable[Document]) -> None:
        held = Documents.in_memory(documents)
        self._place: tuple[Path, Path | None] | None = None
        self._opened: _Index | None = _built(held, advance=lambda steps: None)

    @classmethod
    def from_texts(cls, texts: Iterable[str]) -> Self:
        """One document a text."""
        return cls([Document(text) for text in texts])

    @classmethod
    def from_folder(
        cls, path: str | Path, *, cache_folder: str | Path | None = None
    ) -> Self:
        """All .txt, .md, .jsonl and .parquet files below a folder; see `corpus`.

        The first process builds the index while others wait, a later one opens it.

        Args:
            path: folder of documents.
            cache_folder: of indexes; None means within the folder, or the user's
                cache folder where that cannot be written.

        Raises:
            DataError: the folder is missing or holds no documents, a file or line is
                wrong (names both), or the index cannot be written.
        """
        index = cls.__new__(cls)
        cache = Path(cache_folder).absolute() if cache_folder is not None else None
        index._place = (Path(path).absolute(), cache)
        index._opened = _open(*index._place)
        return index

    def __getstate__(self) -> dict[str, Any]:
        opened = None if self._place else self._opened
        return {"_place": self._place, "_opened": opened}

    @property
    def version(self) -> str:
        """Of the documents' content and of the way they are scored."""
        return f"{self._index.documents.digest}-{SCORING}"

    @property
    def documents(self) -> Sequence[Document]:
        """All, in order, read when they are asked for."""
        return self._index.documents

    async def search(self, query: str, top_k: int) -> list[Document]:
        """The best documents that share a word with the query, best first."""
        if self._opened is None or len(self.documents) > LARGE_INDEX:
            return await asyncio.to_thread(self.find, query, top_k)
        return self.find(query, top_k)

    def find(self, query: str, top_k: int) -> list[Document]:
        """As `search`, in the thread of the caller."""
        index = self._index
        word_ids = index.ids_of(_words(query))
        if not word_ids:
            return []
        scores = index.bm25.get_scores_from_ids(word_ids)
        return [index.documents[int(i)] for i in best_first(scores, top_k, above=0)]

    @property
    def _index(self) -> "_Index":
        if self._opened is None:
            assert self._place is not None
            self._opened = _open(*self._place)
        return self._opened


@dataclass(frozen=True, slots=True)
class _Index:
    """An index that is open.

    Attributes:
        documents: in memory or mapped.
        words: sorted; a word's place is its id.
        bm25: the scores, in memory or mapped; it knows ids only.
    """

    documents: Documents
    words: pa.Array
    bm25: bm25s.BM25

    def ids_of(self, words: Iterable[str]) -> list[int]:
        """Of those that some document holds, repetitions included."""
        ids: list[int] = []
        for word in words:
            place = bisect_left(cast(Any, self.words), word, key=_text)
            if place < len(self.words) and _text(self.words[place]) == word:
                ids.append(place)
        return ids


def _open(folder: Path, cache_folder: Path | None) -> _Index:
    homes = index_homes(folder, cache_folder)
    documents = stored_documents(folder, homes)

    def build(target: Path) -> None:
        title = f"indexing {folder}"
        with building(title, len(documents)) as advance:
            index = _built(documents, advance)
        index.bm25.save(target, show_progress=False)
        batch = pa.record_batch([index.words], names=["words"])
        file = str(target / _WORDS_FILE)
        with pa.OSFile(file, "wb") as out, pa.ipc.new_file(out, batch.schema) as writer:
            writer.write_batch(batch)

    key = f"{documents.digest}-{SCORING}"
    return _mapped(documents, stored_index(homes, "bm25", key, build))


def _mapped(documents: Documents, folder: Path) -> _Index:
    bm25 = bm25s.BM25.load(folder, mmap=True, load_vocab=False, show_progress=False)
    with pa.ipc.open_file(pa.memory_map(str(folder / _WORDS_FILE))) as file:
        words = file.get_batch(0)["words"]
    return _Index(documents, words, bm25)


def _built(documents: Documents, advance: Callable[[int], None]) -> _Index:
    """Count the words of all documents and score them.

    Args:
        documents: to index.
        advance: told how many more were read.

    Raises:
        DataError: there are no words.
    """
    ids_by_word: defaultdict[str, int] = defaultdict()
    ids_by_word.default_factory = ids_by_word.__len__
    flat, ends = array("i"), array("q", [0])
    for texts in documents.indexed_texts():
        for text in texts:
            flat.extend(map(ids_by_word.__getitem__, _words(text)))
            ends.append(len(flat))
        advance(len(texts))
    if not flat:
        raise DataError("a search index needs at least one document with words")
    words = sorted(ids_by_word)
    new_ids = np.empty(len(words), np.int32)
    new_ids[[ids_by_word[word] for word in words]] = np.arange(len(words))
    bm25 = bm25s.BM25(method="lucene")
    bm25.scores = _scores(bm25, new_ids[np.asarray(flat)], np.asarray(ends))
    bm25.vocab_dict = {}
    bm25.nonoccurrence_array = None
    return _Index(documents, pa.array(words, pa.large_string()), bm25)


def _scores(
    bm25: bm25s.BM25, word_ids: NDArray[np.int32], ends: NDArray[np.int64]
) -> dict[str, Any]:
    """What `BM25.index` computes document by document, in a few array operations.

        idf(w) = ln(1 + (N - n_w + ½) / (n_w + ½))     of N documents, n_w hold w
        score(w, d) = idf(w) · f / (f + k₁·(1 - b + b·|d| / mean |d|))

    Args:
        bm25: holds k₁ and b.
        word_ids: [T] of all documents.
        ends: [N + 1] where each document begins and the last one ends.

    Returns:
        The columns of a sparse matrix [N, words], as bm25s holds them.
    """
    lengths = np.diff(ends)
    ones = np.ones(len(word_ids), np.float32)
    by_document = csr_array((ones, word_ids, ends))
    by_document.sum_duplicates()
    by_word = by_document.tocsc()
    del ones, by_document
    holding = np.diff(by_word.indptr)
    idf = np.log1p((len(lengths) - holding + 0.5) / (holding + 0.5))
    saturation = bm25.k1 * (1 - bm25.b + bm25.b * lengths / lengths.mean())
    data = by_word.data
    data /= data + saturation.astype(np.float32)[by_word.indices]
    data *= np.repeat(idf.astype(np.float32), holding)
    return {
        "data": data,
        "indices": by_word.indices.astype(np.int32, copy=False),
        "indptr": by_word.indptr.astype(np.int64, copy=False),
        "num_docs": len(lengths),
    }


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _text(value: pa.Scalar) -> str:
    return value.as_py()
