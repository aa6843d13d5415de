import asyncio
import pickle
from collections.abc import Sequence

import pytest

from rllib_arpo.errors import ToolError
from rllib_arpo.tools.search import MAX_QUERY_CHARS, Document, SearchBackend, SearchTool
from rllib_arpo.tools.tool import Tool


class Shelf:
    """A backend that finds the same documents for every query."""

    name = "shelf"
    version = "1"

    def __init__(self, *documents: Document) -> None:
        self.documents = documents

    async def search(self, query: str, top_k: int) -> Sequence[Document]:
        if query == "outage":
            raise ToolError("the shelf is closed", retryable=True)
        return self.documents[:top_k]


def ask(tool: SearchTool, query: str = "tea") -> str:
    return asyncio.run(tool.call(query))


def test_hits_are_numbered_and_a_hit_with_a_url_shows_it_on_a_line_of_its_own():
    shelf = Shelf(
        Document("green", "Tea"),
        Document("of clay"),
        Document("black", "Pu'er (tea)", "https://example.org/Pu'er_(tea)"),
        Document("white", url="https://example.org/white"),
        Document("", "No snippet", "https://example.org/none"),
    )
    assert ask(SearchTool(shelf, top_k=5)).splitlines() == [
        "1. Tea: green",
        "2. of clay",
        "3. Pu'er (tea)",
        "https://example.org/Pu'er_(tea)",
        "black",
        "4. https://example.org/white",
        "white",
        "5. No snippet",
        "https://example.org/none",
    ]
    assert isinstance(shelf, SearchBackend)
    assert isinstance(SearchTool(shelf), Tool)


def test_no_hit_says_so():
    assert ask(SearchTool(Shelf())) == "No results."


def test_an_empty_or_endless_query_is_refused():
    tool = SearchTool(Shelf(Document("a")))
    assert ask(tool, "x" * MAX_QUERY_CHARS) == "1. a"
    with pytest.raises(ToolError, match="513 characters, at most 512"):
        ask(tool, "x" * (MAX_QUERY_CHARS + 1))
    with pytest.raises(ToolError, match="empty"):
        ask(tool, " \n")


def test_an_outage_is_an_error_and_not_an_empty_result():
    with pytest.raises(ToolError, match="closed") as caught:
        ask(SearchTool(Shelf()), "outage")
    assert caught.value.retryable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("one two", "one two"),  # 7 characters
        ("one two three", "one two ..."),  # the cut falls between words
        ("one twofold", "one ..."),  # within a word: the word goes
        ("incomprehensible", "incompr ..."),  # of one word some is kept
    ],
)
def test_a_long_hit_is_cut_at_a_word_and_says_so(text, shown):
    tool = SearchTool(Shelf(Document(text, "T")), max_hit_chars=7)
    assert ask(tool) == f"1. T: {shown}"


def test_a_fork_is_the_tool_itself_and_a_tool_survives_pickle():
    tool = SearchTool(Shelf(Document("a"), Document("b")), top_k=1)
    assert tool.fork() is tool
    assert ask(pickle.loads(pickle.dumps(tool))) == "1. a"


@pytest.mark.parametrize("setting", ["top_k", "max_hit_chars"])
def test_limits_must_be_positive(setting):
    with pytest.raises(ValueError, match=setting):
        SearchTool(Shelf(), **{setting: 0})
