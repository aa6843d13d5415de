import asyncio
import json
import pickle

import pytest

from rllib_arpo.errors import DataError, ToolError
from rllib_arpo.tools import search as search_module
from rllib_arpo.tools.search import DocumentIndex, SearchTool
from rllib_arpo.tools.tool import Tool

TEXTS = ["depth vifel 44", "height vifel 57", "depth zepen 12", "height zepen 31"]


def ask(tool: SearchTool, query: str) -> str:
    return asyncio.run(tool.call(query))


def test_the_best_documents_come_first_and_are_numbered():
    tool = SearchTool(DocumentIndex.from_texts(TEXTS), top_k=2)
    assert ask(tool, "Depth of VIFEL?").splitlines()[0] == "1. depth vifel 44"
    assert len(ask(tool, "Depth of VIFEL?").splitlines()) == 2
    assert isinstance(tool, Tool)


def test_only_documents_that_share_a_word_are_hits():
    assert ask(SearchTool(DocumentIndex.from_texts(TEXTS)), "44") == "1. depth vifel 44"


def test_no_hit_says_so_and_an_empty_query_is_an_error():
    tool = SearchTool(DocumentIndex.from_texts(TEXTS))
    assert ask(tool, "unheard of") == "No results."
    with pytest.raises(ToolError, match="empty"):
        ask(tool, "  ")


def test_equal_scores_keep_the_order_of_the_documents():
    index = DocumentIndex.from_texts([*["tea pot"] * 99, "tea tea"])
    assert [hit.text for hit in index.search("tea", 2)] == ["tea tea", "tea pot"]
    assert index.search("tea", 3)[1] is index.documents[0]
    assert index.search("tea", 3)[2] is index.documents[1]


def test_a_fork_shares_the_index_and_an_index_survives_pickle():
    tool = SearchTool(DocumentIndex.from_texts(TEXTS))
    assert tool.fork().index is tool.index
    assert ask(pickle.loads(pickle.dumps(tool)), "44") == "1. depth vifel 44"


def test_a_large_index_answers_the_same_from_a_thread(monkeypatch):
    tool = SearchTool(DocumentIndex.from_texts(TEXTS))
    here = ask(tool, "zepen")
    monkeypatch.setattr(search_module, "LARGE_INDEX", 1)
    assert ask(tool, "zepen") == here


def test_a_folder_is_read_with_titles_and_cut_into_passages(tmp_path):
    (tmp_path / "Old_tea.txt").write_text("green leaf\n\n" + "word " * 300)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.md").write_text("black leaf")
    rows = [{"title": "Cups", "text": "of clay"}, {"contents": "of glass"}]
    lines = "\n".join(json.dumps(row) for row in rows)
    (tmp_path / "c.jsonl").write_text(lines + "\n\n")
    index = DocumentIndex.from_folder(tmp_path)
    texts = [str(document) for document in index.documents]
    assert texts[0].startswith("Old tea: green leaf")
    # 2 + 300 words in pieces of at most 120: 2 + 120 is too many for one passage,
    # so 2, 120, 120, 60
    assert len([text for text in texts if text.startswith("Old tea")]) == 4
    assert texts[4:] == ["Cups: of clay", "of glass", "b: black leaf"]
    assert ask(SearchTool(index), "old green").startswith("1. Old tea: green leaf")


@pytest.mark.parametrize("line", ["{", '{"title": "x"}', "[1]", '"text"'])
def test_a_bad_line_is_refused_with_its_place(tmp_path, line):
    (tmp_path / "c.jsonl").write_text('{"text": "a"}\n' + line)
    with pytest.raises(DataError, match=r"c\.jsonl, line 2"):
        DocumentIndex.from_folder(tmp_path)


def test_a_missing_or_empty_folder_is_refused(tmp_path):
    with pytest.raises(DataError, match="holds no"):
        DocumentIndex.from_folder(tmp_path)
    with pytest.raises(DataError, match="not a folder"):
        DocumentIndex.from_folder(tmp_path / "none")
    with pytest.raises(DataError, match="at least one"):
        DocumentIndex.from_texts(["", "?!"])


def test_top_k_must_be_positive():
    with pytest.raises(ValueError, match="top_k"):
        SearchTool(DocumentIndex.from_texts(TEXTS), top_k=0)
