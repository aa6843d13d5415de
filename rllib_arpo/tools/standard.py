"""The tools of the paper, Python and search, and the further ones, as one setting.

`StandardTools` is what stands in `env_config["tools"]`: names and numbers only, so it
travels to every EnvRunner, which opens indexes, caches and connections of its own, once
a process, and shares them among all paths.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

from rllib_arpo.errors import ConfigError
from rllib_arpo.tools.browse import BrowseTool
from rllib_arpo.tools.cache import CachedSearch, CacheMode, ToolCache
from rllib_arpo.tools.fetch import PageFetcher
from rllib_arpo.tools.mcp import MCPTool, mcp_tools
from rllib_arpo.tools.mcp_server import MCPServer, identity
from rllib_arpo.tools.python import PythonTool
from rllib_arpo.tools.python_subprocess import SubprocessPythonTool
from rllib_arpo.tools.search import SearchBackend, SearchTool
from rllib_arpo.tools.search_bm25 import DocumentIndex
from rllib_arpo.tools.search_dense import DenseIndex
from rllib_arpo.tools.search_http import search_backend
from rllib_arpo.tools.tool import Tool, ToolSpec
from rllib_arpo.tree import Task, question

PythonBackend = Literal["embedded", "subprocess"]
PYTHON_TOOLS: dict[str, type[PythonTool] | type[SubprocessPythonTool]] = {
    "embedded": PythonTool,
    "subprocess": SubprocessPythonTool,
}
OF_CORPUS = ("bm25", "dense")


@dataclass(frozen=True, slots=True, kw_only=True)
class StandardTools:
    """Makes the tools of an episode: Python, and what else is asked for.

    Attributes:
        python: "embedded", an interpreter without libraries, or "subprocess", Python
            with numpy, sympy and scipy.
        corpus: folder of documents for search; see `corpus.py`.
        search: "bm25" or "dense" over the corpus, or the name of a service, see
            `search_http.py`; None: "bm25" if there is a corpus, else no search.
        search_settings: keyword arguments of that backend.
        top_k: documents per search.
        browse: whether pages can be opened.
        cache: SQLite file for what services and pages answered; None keeps nothing.
        cache_mode: "use", "record" or "replay"; see `cache.py`.
        mcp_servers: servers whose tools the agent gets.

    Raises:
        ConfigError: two settings contradict each other.
    """

    python: PythonBackend = "embedded"
    corpus: str | None = None
    search: str | None = None
    search_settings: Mapping[str, Any] = field(default_factory=dict)
    top_k: int = 3
    browse: bool = False
    cache: str | None = None
    cache_mode: CacheMode = "use"
    mcp_servers: tuple[MCPServer, ...] = ()

    def __post_init__(self) -> None:
        if self.python not in PYTHON_TOOLS:
            raise ConfigError(
                f"`python` ({self.python!r}) must be one of {list(PYTHON_TOOLS)}"
            )
        if self.corpus is None and self.search in OF_CORPUS:
            raise ConfigError(
                f"`search` ({self.search!r}) needs `corpus`, a folder of documents"
            )
        if self.corpus is not None and self.search not in (None, *OF_CORPUS):
            raise ConfigError(
                f"`search` ({self.search!r}) is a service and reads no `corpus` "
                f"({self.corpus!r}): leave one of them out"
            )

    @property
    def tool_specs(self) -> tuple[ToolSpec, ...]:
        """What the dialogue tells the model; asks the MCP servers for theirs.

        Raises:
            ConfigError: an MCP server cannot be reached.
        """
        kinds = [
            SearchTool if self._searches else None,
            BrowseTool if self.browse else None,
            PYTHON_TOOLS[self.python],
        ]
        further = [tool for server in self.mcp_servers for tool in _tools_of(server)]
        return tuple(
            ToolSpec(
                name=tool.name, description=tool.description, parameters=tool.parameters
            )
            for tool in (*filter(None, kinds), *further)
        )

    def __call__(self, task: Task) -> Sequence[Tool]:
        return self.open(question(task))

    def open(self, asked: str = "") -> list[Tool]:
        """The tools for a question; opens what they need in this process.

        Raises:
            ConfigError: a server, a key or a package is missing.
            DataError: the corpus cannot be read.
        """
        cache = _cache(self.cache, self.cache_mode) if self.cache is not None else None
        tools: list[Tool] = []
        if self._searches:
            backend = _backend(
                self.search or "bm25",
                self.corpus,
                json.dumps(dict(self.search_settings), sort_keys=True),
                replayed=self.cache is not None and self.cache_mode == "replay",
            )
            if cache is not None and self.corpus is None:
                backend = CachedSearch(backend, cache)
            tools.append(SearchTool(backend, top_k=self.top_k))
        if self.browse:
            tools.append(BrowseTool(asked, _fetcher(), cache=cache))
        tools.append(PYTHON_TOOLS[self.python]())
        for server in self.mcp_servers:
            tools += _tools_of(server)
        return tools

    @property
    def _searches(self) -> bool:
        return self.search is not None or self.corpus is not None


@lru_cache(maxsize=4)
def _backend(
    name: str, corpus: str | None, settings: str, *, replayed: bool
) -> SearchBackend:
    options = json.loads(settings)
    if corpus is None:
        return search_backend(name, require_key=not replayed, **options)
    if name == "dense":
        return DenseIndex.from_folder(corpus, **options)
    return DocumentIndex.from_folder(corpus, **options)


@lru_cache(maxsize=4)
def _cache(file: str, mode: CacheMode) -> ToolCache:
    return ToolCache(file, mode=mode)


def _tools_of(server: MCPServer) -> list[MCPTool]:
    """Listed once a process: the next path need not wait for it."""
    key = identity(server)
    if key not in _listed:
        _listed[key] = mcp_tools(server)
    return _listed[key]


_listed: dict[object, list[MCPTool]] = {}


@lru_cache(maxsize=1)
def _fetcher() -> PageFetcher:
    return PageFetcher()
