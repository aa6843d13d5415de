"""The search tool, and what every search backend is.

A backend turns a query into documents: BM25 over a folder (`search_bm25`), dense
vectors over a folder (`search_dense`), an engine on the web (`search_http`), or the
recorded answers of another backend (`cache`). `SearchTool` shows them to the model,
so that all backends look alike to it.

An outage is a `ToolError` of the backend. The released code returned an empty text
for it, which the model could not tell from a query that finds nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, Self, runtime_checkable

from rllib_arpo.errors import ToolError
from rllib_arpo.tools.tool import text_parameter

MAX_QUERY_CHARS = 512
NO_RESULTS = "No results."


@dataclass(frozen=True, slots=True)
class Document:
    """One passage or page that a search may return.

    Attributes:
        text: the passage, or the engine's snippet of the page.
        title: empty when it has none.
        url: where the whole page is, for the browse tool; empty when nowhere.
    """

    text: str
    title: str = ""
    url: str = ""

    def __str__(self) -> str:
        if self.url:
            return "\n".join(filter(None, (self.title, self.url, self.text)))
        return f"{self.title}: {self.text}" if self.title else self.text


@runtime_checkable
class SearchBackend(Protocol):
    """Finds documents. Must be picklable, and serve many calls at once."""

    @property
    def name(self) -> str:
        """Of the kind of backend, for example "bm25": part of a cache's key."""
        ...

    @property
    def version(self) -> str:
        """Changes whenever the same query may find other things."""
        ...

    async def search(self, query: str, top_k: int) -> Sequence[Document]:
        """The best documents, best first; none when nothing was found.

        Args:
            query: not empty.
            top_k: most documents to return, at least 1.

        Raises:
            ToolError: the search failed, `retryable` when it may work later.
        """
        ...


class SearchTool:
    """Answers a query with the best documents of a backend, numbered.

    A document with a URL takes three lines (title, URL, text), others one.

    Args:
        backend: shared by all forks.
        top_k: most documents to return.
        max_hit_chars: a longer text is cut at a word and ends in "..."; None cuts
            none. The environment cuts the whole result by tokens all the same.
    """

    name = "search"
    description = "Searches a collection of documents and returns the best passages."
    parameters = text_parameter("query", "What to look for.")

    def __init__(
        self,
        backend: SearchBackend,
        *,
        top_k: int = 3,
        max_hit_chars: int | None = None,
    ) -> None:
        if top_k < 1:
            raise ValueError(f"`top_k` ({top_k}) must be at least 1")
        if max_hit_chars is not None and max_hit_chars < 1:
            raise ValueError(f"`max_hit_chars` ({max_hit_chars}) must be at least 1")
        self.backend = backend
        self.top_k = top_k
        self.max_hit_chars = max_hit_chars

    async def call(self, arguments: str) -> str:
        """Search for `arguments`.

        Raises:
            ToolError: the query is empty or too long, or the backend failed.
        """
        query = arguments.strip()
        if not query:
            raise ToolError("the search query is empty")
        if len(query) > MAX_QUERY_CHARS:
            raise ToolError(
                f"the search query has {len(query)} characters, "
                f"at most {MAX_QUERY_CHARS} are allowed"
            )
        hits = await self.backend.search(query, self.top_k)
        if not hits:
            return NO_RESULTS
        return "\n".join(
            f"{number}. {self._shortened(hit)}" for number, hit in enumerate(hits, 1)
        )

    def fork(self) -> Self:
        """Itself: a search leaves no state."""
        return self

    def _shortened(self, hit: Document) -> Document:
        if self.max_hit_chars is None or len(hit.text) <= self.max_hit_chars:
            return hit
        head = hit.text[: self.max_hit_chars]
        if not hit.text[self.max_hit_chars].isspace():
            head = head.rpartition(" ")[0] or head
        return Document(f"{head.rstrip()} ...", hit.title, hit.url)
