"""The browse tool: a web page's passages that matter for the task's question.

    fetch (fetch.py) ─► text (page_worker.py) ─► passages for the question (passages.py)

What is cached is the page's text, which all questions share. A page that cannot be
read is an error with a reason, never an empty text.
"""

import asyncio
import json
from collections.abc import Callable
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Self

from rllib_arpo.errors import ConfigError, ToolError
from rllib_arpo.tools import page_worker
from rllib_arpo.tools.fetch import PageFetcher
from rllib_arpo.tools.passages import estimate_tokens, excerpt
from rllib_arpo.tools.tool import text_parameter

if TYPE_CHECKING:
    from rllib_arpo.tools.cache import ToolCache

MAX_TITLE_CHARS = 200
MAX_URL_CHARS = 200
# What an answer with parts left out ends with; the third field says why.
NOTE = "\n\n({} of {} passages, those nearest to the question{})"


class BrowseTool:
    """Fetches a page and returns what it says about a question.

    Reads HTML, plain text and PDF; the answer opens with the page's title and address
    and says when parts were left out.

    Args:
        question: of the task, `tree.question(task)`.
        fetcher: shared by all tools of a process.
        max_tokens: of an answer; keep it below `max_result_tokens` of the environment,
            which cuts what is longer.
        count_tokens: counts those of a text; the default needs no tokenizer and
            estimates.
        extract_timeout_s: seconds for reading the text out of a page.
        cache: keeps the texts of pages.

    Raises:
        ConfigError: trafilatura or pypdf is not installed, or a number is too small.
    """

    name = "browse"
    description = (
        "Opens a web page or PDF file and returns its passages about the question."
    )
    parameters = text_parameter("url", "Address of the page, from a search result.")

    def __init__(
        self,
        question: str,
        fetcher: PageFetcher,
        *,
        max_tokens: int = 240,
        count_tokens: Callable[[str], int] = estimate_tokens,
        extract_timeout_s: float = 10.0,
        cache: "ToolCache | None" = None,
    ) -> None:
        if max_tokens < 1:
            raise ConfigError(f"`max_tokens` ({max_tokens}) must be at least 1")
        if extract_timeout_s <= 0:
            raise ConfigError(
                f"`extract_timeout_s` ({extract_timeout_s}) must be above 0 seconds"
            )
        self.question = question
        self.fetcher = fetcher
        self.max_tokens = max_tokens
        self.count_tokens = count_tokens
        self.extract_timeout_s = extract_timeout_s
        self.cache = cache
        self._version = f"{_extractors()} {fetcher.limits.max_bytes}"

    async def call(self, arguments: str) -> str:
        """The passages of the page at the address `arguments`.

        Raises:
            ToolError: the page cannot be fetched or has no text; retryable when its
                server is at fault.
            ToolTimeoutError: its server took too long.
        """
        url = arguments.strip()
        if not url:
            raise ToolError("the address is empty")
        if self.cache is None:
            page = await self._page(url)
        else:
            page = await self.cache.fetch(
                backend=self.name,
                version=self._version,
                arguments={"url": url},
                call=lambda: self._page(url),
            )
        return await asyncio.to_thread(self._answer, page)

    def fork(self) -> Self:
        """Itself: reading leaves no state."""
        return self

    async def _page(self, url: str) -> str:
        """What is kept of a page, as JSON."""
        page = await self.fetcher.fetch(url)
        loop = asyncio.get_running_loop()
        found = await loop.run_in_executor(
            page_worker.threads(),
            lambda: page_worker.extract_text(
                page.body,
                kind=page.kind,
                charset=page.charset,
                timeout_s=self.extract_timeout_s,
            ),
        )
        if isinstance(found, str):
            raise ToolError(f"the page cannot be read: {found}")
        if not found.text.strip():
            raise ToolError("the page has no text")
        return json.dumps({"url": page.url, **found._asdict()})

    def _answer(self, page: str) -> str:
        found = json.loads(page)
        title = " ".join(found["title"].split())
        opening = f"Title: {_shortened(title, MAX_TITLE_CHARS)}\n" if title else ""
        opening += f"URL: {_shortened(found['url'], MAX_URL_CHARS)}\n\n"
        unread = "" if found["whole"] else "; the end of the page was not read"
        # The note as long as it can get, so that there is room for it.
        around = self.count_tokens(opening + NOTE.format(9999, 9999, unread))
        kept = excerpt(
            found["text"],
            self.question,
            max_tokens=max(self.max_tokens - around, 1),
            count_tokens=self.count_tokens,
        )
        if kept.num_passages == kept.num_in_all and not unread:
            return opening + kept.text
        note = NOTE.format(kept.num_passages, kept.num_in_all, unread)
        return opening + kept.text + note


def _shortened(text: str, max_chars: int) -> str:
    return text if len(text) <= max_chars else text[:max_chars] + "..."


@lru_cache(maxsize=1)
def _extractors() -> str:
    """Names and versions of the packages that a page's text depends on."""
    try:
        return " ".join(f"{name} {version(name)}" for name in ("trafilatura", "pypdf"))
    except PackageNotFoundError as error:
        raise ConfigError(
            f"browsing needs {error.name}, which is not installed: "
            'pip install "rllib_arpo[web]"'
        ) from error
