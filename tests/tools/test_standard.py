import asyncio
import pickle
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from rllib_arpo.errors import ConfigError, DataError
from rllib_arpo.tools.browse import BrowseTool
from rllib_arpo.tools.cache import CachedSearch
from rllib_arpo.tools.mcp import close_sessions
from rllib_arpo.tools.mcp_server import MCPServer
from rllib_arpo.tools.search import SearchTool
from rllib_arpo.tools.standard import StandardTools
from rllib_arpo.tools.tool import Tool
from rllib_arpo.tree import Message, Task

TASK = Task(
    task_id="a",
    messages=(Message(role="user", content="How high is vifel?"),),
    answers=("44",),
)
SERVER = Path(__file__).with_name("mcp_server.py")


@pytest.fixture
def corpus(tmp_path) -> str:
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "facts.txt").write_text("The height of vifel is 44.\n")
    return str(folder)


def names(tools: Sequence[Tool]) -> list[str]:
    return [tool.name for tool in tools]


def test_python_is_always_there_and_search_where_there_is_a_corpus(corpus):
    assert names(StandardTools()(TASK)) == ["python"]
    search, python = StandardTools(corpus=corpus)(TASK)
    assert asyncio.run(search.call("height of vifel")).startswith("1. ")
    assert asyncio.run(python.call("6 * 7")) == "42"


def test_paths_share_an_index_and_not_their_variables(corpus):
    tools = StandardTools(corpus=corpus)
    (search, python), (other_search, other_python) = tools(TASK), tools(TASK)
    assert isinstance(search, SearchTool)
    assert isinstance(other_search, SearchTool)
    assert search.backend is other_search.backend
    asyncio.run(python.call("x = 1"))
    with pytest.raises(Exception, match="x"):
        asyncio.run(other_python.call("x"))


def test_python_in_a_process_has_libraries():
    (python,) = StandardTools(python="subprocess")(TASK)
    code = "import sympy; sympy.factorint(360)"
    assert asyncio.run(python.call(code)) == "{2: 3, 3: 2, 5: 1}"


def test_pages_are_read_for_the_tasks_question():
    browse, _ = StandardTools(browse=True)(TASK)
    assert isinstance(browse, BrowseTool)
    assert browse.question == "How high is vifel?"


def test_a_service_and_pages_are_cached_and_a_corpus_is_not(
    corpus, tmp_path, monkeypatch
):
    monkeypatch.setenv("SERPER_API_KEY", "key")
    cache = str(tmp_path / "cache.sqlite")
    search, browse, _ = StandardTools(search="serper", browse=True, cache=cache)(TASK)
    assert isinstance(search, SearchTool)
    assert isinstance(search.backend, CachedSearch)
    assert search.backend.name == "serper"
    assert isinstance(browse, BrowseTool)
    assert browse.cache is not None
    search, _ = StandardTools(corpus=corpus, cache=cache)(TASK)
    assert isinstance(search, SearchTool)
    assert search.backend.name == "bm25"


def test_what_the_model_is_told_is_what_it_gets(corpus, monkeypatch):
    monkeypatch.setenv("SERPER_API_KEY", "key")
    for tools in (
        StandardTools(),
        StandardTools(corpus=corpus, browse=True, python="subprocess"),
        StandardTools(search="serper"),
    ):
        assert [spec.name for spec in tools.tool_specs] == names(tools(TASK))
        for spec, tool in zip(tools.tool_specs, tools(TASK), strict=True):
            assert spec.description == tool.description
            assert spec.parameters["type"] == "object"


def test_what_the_tools_are_is_known_without_opening_them():
    tools = StandardTools(corpus="nowhere", browse=True)
    assert [spec.name for spec in tools.tool_specs] == ["search", "browse", "python"]
    with pytest.raises(DataError, match="nowhere"):
        tools.open()


def test_the_tools_of_a_server_stand_beside_the_others():
    server = MCPServer(command=[sys.executable, str(SERVER)])
    tools = StandardTools(mcp_servers=(server,))
    try:
        listed = names(tools(TASK))
        assert listed[0] == "python"
        assert len(listed) > 1
        assert [spec.name for spec in tools.tool_specs] == listed
        # A path asks for them once more: the list is that of the process.
        assert tools(TASK)[1] is tools(TASK)[1]
    finally:
        close_sessions()


def test_what_travels_are_names(corpus):
    tools = StandardTools(corpus=corpus)
    tools.open()
    copy = pickle.loads(pickle.dumps(tools))
    assert copy == tools
    assert b"vifel" not in pickle.dumps(tools)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"python": "conda"}, r"`python` \('conda'\) must be one of"),
        ({"search": "bm25"}, "needs `corpus`"),
        ({"search": "serper", "corpus": "docs"}, "reads no `corpus`"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        StandardTools(**settings)


def test_an_unknown_service_and_a_missing_key_are_refused(monkeypatch):
    with pytest.raises(ConfigError, match="no search backend 'altavista'"):
        StandardTools(search="altavista").open()
    monkeypatch.delenv("BRAVE_API_KEY", raising=False)
    with pytest.raises(ConfigError, match="BRAVE_API_KEY"):
        StandardTools(search="brave").open()
