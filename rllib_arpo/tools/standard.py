"""The two tools of the paper, as one picklable setting for `env_config`."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from rllib_arpo.tools.python import PythonTool
from rllib_arpo.tools.search import DocumentIndex, SearchTool
from rllib_arpo.tools.tool import Tool
from rllib_arpo.tree import Task


@dataclass(frozen=True, slots=True)
class StandardTools:
    """Python, and search over a folder of documents when there is one.

    The folder is indexed once in every process that uses it, and shared by all
    paths there; what travels to an EnvRunner is the folder's name.

    Attributes:
        corpus: folder of .txt, .md or .jsonl documents; None leaves search out.
        top_k: passages per search.
    """

    corpus: str | None = None
    top_k: int = 3

    @property
    def tool_names(self) -> tuple[str, ...]:
        """For `env_config["tool_names"]`."""
        return ("python",) if self.corpus is None else ("search", "python")

    def __call__(self, task: Task) -> Sequence[Tool]:
        tools: list[Tool] = [PythonTool()]
        if self.corpus is not None:
            tools.insert(0, SearchTool(_shared_index(self.corpus), top_k=self.top_k))
        return tools


@lru_cache(maxsize=4)
def _shared_index(folder: str) -> DocumentIndex:
    return DocumentIndex.from_folder(folder)
