"""Dense retrieval: documents whose vectors lie closest to the query's.

A sentence-transformers model turns texts into vectors of length 1; the inner product
ranks them. The documents' vectors are computed once, stored, and mapped by every
process of the node. The model is loaded when a text has to be encoded, not before.

1. The search is exact (numpy over all vectors) unless a FAISS index is asked for,
   which pays from about a million documents on.
2. What is stored depends on the content of the documents and of the model's folder,
   so a model that was trained on is encoded anew. A name on the hub counts as it is.

Needs the extra `dense`.
"""

import asyncio
import hashlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, Literal, Self

import numpy as np
from numpy.typing import NDArray

from rllib_arpo.errors import ConfigError
from rllib_arpo.tools.corpus import Documents, stored_documents
from rllib_arpo.tools.ranking import best_first
from rllib_arpo.tools.search import Document
from rllib_arpo.tools.stored_index import building, index_homes, stored_index

EXACT = "numpy"
# Part of the version of an index: raise it when vectors or their order change.
ENCODING = 1
_VECTORS_FILE = "vectors.npy"
_FAISS_FILE = "index.faiss"
_ADDED_AT_ONCE = 65536
# Neither a tokenizer nor a model that is being loaded may serve two threads.
_encoding = threading.Lock()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Settings:
    """What `DenseIndex` was given; all that travels to another process."""

    folder: Path
    model: str
    index: str
    search_parameters: str
    query_prefix: str | None
    passage_prefix: str | None
    device: str | None
    batch_size: int
    cache_folder: Path | None


class DenseIndex:
    """Documents and their vectors: a `SearchBackend`, picklable.

    Made by `from_folder`. Its settings travel; each node opens its own index.
    """

    name = "dense"

    def __init__(self, settings: _Settings) -> None:
        self._settings = settings
        self._opened: _Index | None = _open(settings)

    @classmethod
    def from_folder(
        cls,
        path: str | Path,
        model: str | Path,
        *,
        index: str = EXACT,
        search_parameters: str = "",
        query_prefix: str | None = None,
        passage_prefix: str | None = None,
        device: str | None = None,
        batch_size: int = 64,
        cache_folder: str | Path | None = None,
    ) -> Self:
        """The documents that `DocumentIndex.from_folder` reads, encoded by a model.

        Args:
            path: folder of documents.
            model: a sentence-transformers folder or hub name.
            index: "numpy" compares with every document; else a FAISS factory string
                such as "HNSW32" or "IVF4096,Flat", whose index is stored as well.
            search_parameters: of a FAISS index: "nprobe=16", "efSearch=64".
            query_prefix: before each query, as E5 wants "query: "; None means the
                prompt that the model's folder names for queries, if any.
            passage_prefix: the same before each document, "passage: " for E5.
            device: of the model; None means the best there is.
            batch_size: texts that the model encodes at once.
            cache_folder: of indexes; None means within the folder, or the user's
                cache folder where that cannot be written.

        Raises:
            ConfigError: the extra is missing, or the model or the index is wrong.
            DataError: as `DocumentIndex.from_folder`.
        """
        if batch_size < 1:
            raise ConfigError(f"`batch_size` ({batch_size}) must be at least 1")
        cache = Path(cache_folder).absolute() if cache_folder is not None else None
        return cls(
            _Settings(
                folder=Path(path).absolute(),
                model=str(Path(model).absolute() if Path(model).is_dir() else model),
                index=index,
                search_parameters=search_parameters,
                query_prefix=query_prefix,
                passage_prefix=passage_prefix,
                device=device,
                batch_size=batch_size,
                cache_folder=cache,
            )
        )

    def __getstate__(self) -> dict[str, Any]:
        return {"_settings": self._settings, "_opened": None}

    @property
    def version(self) -> str:
        """Of the documents' and the model's content, and of the settings."""
        return self._index.version

    @property
    def documents(self) -> Sequence[Document]:
        """All, in order, read when they are asked for."""
        return self._index.documents

    async def search(self, query: str, top_k: int) -> list[Document]:
        """The documents closest to the query, closest first, in a thread."""
        return await asyncio.to_thread(self.find, query, top_k)

    def find(self, query: str, top_k: int) -> list[Document]:
        """As `search`, in the thread of the caller."""
        index = self._index
        vector = _encoded(self._settings, index.model, [query], "query")[0]
        return [index.documents[i] for i in index.closest(vector, top_k)]

    @property
    def _index(self) -> "_Index":
        if self._opened is None:
            self._opened = _open(self._settings)
        return self._opened


@dataclass(frozen=True, slots=True, kw_only=True)
class _Index:
    """An index that is open.

    Attributes:
        documents: mapped.
        version: see `DenseIndex.version`.
        model: digest of the model's content.
        vectors: [N, D] float32 of length 1, mapped.
        faiss_index: over the same vectors, mapped; None for an exact search.
    """

    documents: Documents
    version: str
    model: str
    vectors: NDArray[np.float32]
    faiss_index: Any = field(default=None, repr=False)

    def closest(self, vector: NDArray[np.float32], top_k: int) -> list[int]:
        """Of `vector` [D], the places of the nearest documents."""
        if self.faiss_index is None:
            return best_first(self.vectors @ vector, top_k).tolist()
        _, found = self.faiss_index.search(vector[np.newaxis], top_k)
        return [place for place in found[0].tolist() if place >= 0]  # -1: no more


def _open(settings: _Settings) -> _Index:
    _sentence_transformer()
    if settings.index != EXACT:
        _faiss()
    homes = index_homes(settings.folder, settings.cache_folder)
    documents = stored_documents(settings.folder, homes)
    model = _model_content(settings.model)
    key = _digest(ENCODING, model, documents.digest)
    vectors = _stored_vectors(settings, documents, model, homes, key)
    index = None
    if settings.index != EXACT:
        index = _stored_faiss(settings, vectors, homes, key)
    version = _digest(
        key,
        settings.query_prefix,
        settings.passage_prefix,
        settings.index,
        settings.search_parameters,
    )
    return _Index(
        documents=documents,
        version=version,
        model=model,
        vectors=vectors,
        faiss_index=index,
    )


def _stored_vectors(
    settings: _Settings,
    documents: Documents,
    model: str,
    homes: Sequence[Path],
    key: str,
) -> NDArray[np.float32]:
    def build(target: Path) -> None:
        title = f"encoding {settings.folder}"
        with (
            building(title, len(documents)) as advance,
            (target / _VECTORS_FILE).open("wb") as file,
        ):
            for texts in documents.indexed_texts():
                # The model sorts what it is given by length, so it is given more.
                for batch in _slices(texts, 16 * settings.batch_size):
                    vectors = _encoded(settings, model, batch, "passage")
                    if file.tell() == 0:
                        _write_header(file, (len(documents), vectors.shape[1]))
                    file.write(vectors.tobytes())
                    advance(len(batch))

    kind = f"vectors-{_digest(settings.model, settings.passage_prefix)}"
    folder = stored_index(homes, kind, key, build)
    return np.load(folder / _VECTORS_FILE, mmap_mode="r").view(np.ndarray)


def _write_header(file: BinaryIO, shape: tuple[int, int]) -> None:
    """Of a .npy file; mapping it for writing would die of a full disk."""
    layout = {"descr": "<f4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, layout)


def _stored_faiss(
    settings: _Settings, vectors: NDArray[np.float32], homes: Sequence[Path], key: str
) -> Any:
    faiss = _faiss()

    def build(target: Path) -> None:
        try:
            index = faiss.index_factory(
                vectors.shape[1], settings.index, faiss.METRIC_INNER_PRODUCT
            )
            index.train(vectors)
        except RuntimeError as error:
            raise ConfigError(
                f'`index` ("{settings.index}") must be "{EXACT}" or a FAISS factory '
                f"string for {vectors.shape[0]} vectors of {vectors.shape[1]} numbers: "
                f"{error}"
            ) from error
        with building(f"indexing {settings.folder}", len(vectors)) as advance:
            for part in _slices(vectors, _ADDED_AT_ONCE):
                index.add(part)
                advance(len(part))
        try:
            faiss.write_index(index, str(target / _FAISS_FILE))
        except RuntimeError as error:
            raise OSError(str(error)) from error

    kind = f"faiss-{_digest(settings.model, settings.passage_prefix, settings.index)}"
    folder = stored_index(homes, kind, key, build)
    index = faiss.read_index(str(folder / _FAISS_FILE), faiss.IO_FLAG_MMAP_IFC)
    if settings.search_parameters:
        try:
            space = faiss.ParameterSpace()
            space.set_index_parameters(index, settings.search_parameters)
        except RuntimeError as error:
            raise ConfigError(
                f'`search_parameters` ("{settings.search_parameters}") do not fit the '
                f'index "{settings.index}": {error}'
            ) from error
    return index


def _encoded(
    settings: _Settings,
    content: str,
    texts: list[str],
    kind: Literal["query", "passage"],
) -> NDArray[np.float32]:
    """[len(texts), D] vectors of length 1."""
    with _encoding:
        model = _model(settings.model, content, settings.device)
        encode = model.encode_query if kind == "query" else model.encode_document
        vectors = encode(
            texts,
            prompt=getattr(settings, f"{kind}_prefix"),
            batch_size=settings.batch_size,
            normalize_embeddings=True,
            show_progress_bar=False,
        )
    return np.ascontiguousarray(vectors, np.float32)


@lru_cache(maxsize=2)
def _model(name: str, content: str, device: str | None) -> Any:
    """The model of a name as long as its content is the same."""
    try:
        return _sentence_transformer()(name, device=device)
    except (OSError, ValueError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f'`model` ("{name}") cannot be loaded: give a sentence-transformers '
            f"folder or hub name ({reason})"
        ) from error


def _model_content(name: str) -> str:
    """Digest of a model's folder; a name on the hub as it is."""
    folder = Path(name)
    if not folder.is_dir():
        return name
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(path.relative_to(folder).as_posix().encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _slices(items: Any, size: int) -> Iterator[Any]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _sentence_transformer() -> Any:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise _missing("sentence-transformers", error) from error
    return SentenceTransformer


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise _missing("faiss-cpu", error) from error
    return faiss


def _missing(package: str, error: ImportError) -> ConfigError:
    return ConfigError(
        f'dense retrieval needs {package} ({error}): pip install "rllib_arpo[dense]"'
    )
