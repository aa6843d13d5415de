import asyncio
import json
import logging
import os
import pickle
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import bm25s
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rllib_arpo.errors import DataError
from rllib_arpo.tools import corpus as corpus_module
from rllib_arpo.tools import search_bm25
from rllib_arpo.tools.ranking import best_first
from rllib_arpo.tools.search import Document, SearchBackend, SearchTool
from rllib_arpo.tools.search_bm25 import DocumentIndex
from rllib_arpo.tools.stored_index import BESIDE, UNUSED_S, stored_index

TEXTS = ["depth vifel 44", "height vifel 57", "depth zepen 12", "height zepen 31"]
ROOT = Path(__file__).parents[2]


def texts_found(index: DocumentIndex, query: str, top_k: int = 3) -> list[str]:
    return [hit.text for hit in asyncio.run(index.search(query, top_k))]


def write_rows(file: Path, *rows: object) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def indexes(folder: Path, kind: str) -> list[Path]:
    return [path for path in folder.glob(f"**/{kind}-*") if path.is_dir()]


def state_of(folder: Path) -> dict[str, int]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return {str(file): file.stat().st_mtime_ns for file in files}


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, check=True, timeout=280
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "documents"
    folder.mkdir()
    write_rows(folder / "a.jsonl", *[{"text": text} for text in TEXTS])
    return folder


def test_the_best_documents_come_first():
    index = DocumentIndex.from_texts(TEXTS)
    found = texts_found(index, "Depth of VIFEL?", 2)
    assert found == ["depth vifel 44", "height vifel 57"]
    assert isinstance(index, SearchBackend)


def test_only_documents_that_share_a_word_are_hits():
    index = DocumentIndex.from_texts(TEXTS)
    assert texts_found(index, "44") == ["depth vifel 44"]
    assert texts_found(index, "unheard of") == []
    assert texts_found(index, "?!") == []


def test_equal_scores_keep_the_order_of_the_documents():
    pots = [Document("tea pot", title) for title in map(str, range(5000))]
    index = DocumentIndex([*pots, Document("tea tea", "cup")])
    assert [hit.title for hit in index.find("tea", 4)] == ["cup", "0", "1", "2"]


def test_scores_are_those_of_bm25s():
    rng = np.random.default_rng(0)
    words = [[f"w{i}" for i in rng.zipf(1.5, 20) if i < 500] for _ in range(300)]
    reference = bm25s.BM25(method="lucene")
    reference.index(words, show_progress=False)
    index = DocumentIndex.from_texts(map(" ".join, words))._index
    for query in (["w1"], ["w2", "w7", "w7"], ["w3", "w40", "w90"]):
        ours = index.bm25.get_scores_from_ids(index.ids_of(query))
        expected = reference.get_scores([w for w in query if w in reference.vocab_dict])
        np.testing.assert_allclose(ours, expected, rtol=1e-5)
        assert expected.max() > 0


@pytest.mark.parametrize("size", [1, 5, 1024, 5000])
def test_the_best_of_many_are_those_of_a_whole_sort(size):
    rng = np.random.default_rng(size)
    for decimals in (0, 1, 6):  # many ties, some, none
        scores = rng.normal(size=size).round(decimals)
        expected = np.argsort(-scores, kind="stable")
        assert best_first(scores, 7).tolist() == expected[:7].tolist()
        positive = [i for i in expected if scores[i] > 0]
        assert best_first(scores, 7, above=0).tolist() == positive[:7]


def test_a_folder_is_read_with_titles_and_cut_into_passages(tmp_path):
    (tmp_path / "Old_tea.txt").write_text("green leaf\n \n" + "word " * 300)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.md").write_text("black\nleaf")
    write_rows(
        tmp_path / "c.jsonl",
        {"title": "Cups", "text": "of clay", "id": 3},
        {"contents": "of glass", "title": None, "url": "https://example.org/glass"},
        {"contents": '"Search R1"\nquotes the title'},
        {"contents": '"a quote"'},
    )
    with (tmp_path / "c.jsonl").open("a") as file:
        file.write("\n")
    (tmp_path / "d.pdf").write_text("no document")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "e.txt").write_text("no document")
    documents = DocumentIndex.from_folder(tmp_path).documents
    assert documents[0].title == "Old tea"
    assert documents[0].text == "green leaf"
    # 2 + 300 words in pieces of at most 120: 2 + 120 is too many for one passage,
    # so 2, 120, 120, 60
    assert [len(d.text.split()) for d in documents[:4]] == [2, 120, 120, 60]
    assert documents[4:] == [
        Document("of clay", "Cups"),
        Document("of glass", url="https://example.org/glass"),
        Document("quotes the title", "Search R1"),
        Document('"a quote"'),
        Document("black leaf", "b"),
    ]


def test_titles_are_found_and_urls_are_not(tmp_path):
    row = {"title": "Cups", "text": "of clay", "url": "https://pottery.org"}
    write_rows(tmp_path / "a.jsonl", row)
    index = DocumentIndex.from_folder(tmp_path)
    assert texts_found(index, "cups") == ["of clay"]
    assert texts_found(index, "pottery") == []


def test_a_parquet_file_is_read_by_its_columns(tmp_path):
    table = pa.table({"id": [1, 2], "contents": ["of clay", "of glass"]})
    pq.write_table(
        table.append_column("title", [["Cups", None]]), tmp_path / "a.parquet"
    )
    documents = DocumentIndex.from_folder(tmp_path).documents
    assert documents[:] == [Document("of clay", "Cups"), Document("of glass")]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"{", "not JSON"),
        (b'{"text": "\xff"}', "not JSON in UTF-8"),
        (b'{"title": "x"}', '"contents" is None'),
        (b'{"text": 3}', '"text" is 3'),
        (b'{"text": "a", "url": ["b"]}', '"url" is'),
        (rb'{"text": "\ud800"}', "not Unicode"),
        (b"[1]", "expected an object"),
        (b'"text"', "expected an object"),
    ],
)
def test_a_bad_line_is_refused_with_its_place(tmp_path, line, problem):
    (tmp_path / "c.jsonl").write_bytes(b'{"text": "a"}\n' + line)
    with pytest.raises(DataError, match=rf"c\.jsonl, line 2: .*{problem}"):
        DocumentIndex.from_folder(tmp_path)


def test_a_file_that_is_no_text_is_refused_by_name(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"a\.txt is not UTF-8"):
        DocumentIndex.from_folder(tmp_path)
    (tmp_path / "a.txt").unlink()
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"a\.parquet cannot be read"):
        DocumentIndex.from_folder(tmp_path)


def test_a_missing_or_empty_folder_is_refused(tmp_path):
    with pytest.raises(DataError, match="holds no"):
        DocumentIndex.from_folder(tmp_path)
    with pytest.raises(DataError, match="not a folder"):
        DocumentIndex.from_folder(tmp_path / "none")
    with pytest.raises(DataError, match="at least one"):
        DocumentIndex.from_texts(["", "?!"])
    write_rows(tmp_path / "a.jsonl", {"text": "?!"})
    with pytest.raises(DataError, match="at least one"):
        DocumentIndex.from_folder(tmp_path)


def test_an_index_is_built_once_and_answers_as_one_in_memory(folder):
    first = DocumentIndex.from_folder(folder)
    built = state_of(folder)
    again = DocumentIndex.from_folder(folder)
    assert state_of(folder) == built
    assert texts_found(again, "depth zepen") == [TEXTS[2], TEXTS[0], TEXTS[3]]
    in_memory = DocumentIndex.from_texts(TEXTS)
    assert first.version == again.version == in_memory.version
    assert texts_found(in_memory, "depth zepen") == texts_found(again, "depth zepen")


def test_an_open_index_maps_its_files(folder):
    DocumentIndex.from_folder(folder)
    index = DocumentIndex.from_folder(folder)
    mapped = Path("/proc/self/maps")
    if not mapped.exists():
        pytest.skip("needs /proc")
    lines = mapped.read_text()
    for name in ("documents.arrow", "words.arrow", "data.csc", "indices.csc"):
        assert name in lines
    assert texts_found(index, "44") == ["depth vifel 44"]


def test_what_travels_is_the_name_of_the_folder(folder):
    index = DocumentIndex.from_folder(folder)
    pickled = pickle.dumps(index)
    assert len(pickled) < 1000 and b"vifel" not in pickled
    arrived = pickle.loads(pickled)
    assert texts_found(arrived, "44") == ["depth vifel 44"]
    assert arrived.version == index.version


def test_an_index_in_memory_travels_whole():
    tool = SearchTool(DocumentIndex.from_texts(TEXTS))
    arrived = pickle.loads(pickle.dumps(tool))
    assert asyncio.run(arrived.call("44")) == "1. depth vifel 44"


def test_a_change_of_the_documents_is_seen_and_open_indexes_keep_theirs(folder):
    old = DocumentIndex.from_folder(folder)
    with (folder / "a.jsonl").open("a") as file:
        file.write('{"text": "area vifel 9"}\n')
    new = DocumentIndex.from_folder(folder)
    assert texts_found(new, "area") == ["area vifel 9"]
    assert texts_found(old, "area") == []
    assert texts_found(old, "44") == ["depth vifel 44"]
    assert new.version != old.version


def test_the_version_depends_on_the_content_and_not_on_the_place(folder, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "other.jsonl").write_bytes((folder / "a.jsonl").read_bytes())
    os.utime(elsewhere / "other.jsonl", (0, 0))
    copy = DocumentIndex.from_folder(elsewhere)
    assert copy.version == DocumentIndex.from_folder(folder).version
    titled = DocumentIndex([Document(text, "title") for text in TEXTS])
    assert titled.version != copy.version


def test_only_an_old_index_that_nobody_used_for_a_week_goes(folder):
    def change(text: str) -> None:
        write_rows(folder / "a.jsonl", {"text": text})
        DocumentIndex.from_folder(folder)

    DocumentIndex.from_folder(folder)
    change("second")
    assert len(indexes(folder, "bm25")) == len(indexes(folder, "documents")) == 2
    for old in [*indexes(folder, "bm25"), *indexes(folder, "documents")]:
        last_used = time.time() - UNUSED_S - 60
        os.utime(old, (last_used, last_used))
    DocumentIndex.from_folder(folder)  # the second one is in use again
    change("third")
    assert len(indexes(folder, "bm25")) == len(indexes(folder, "documents")) == 2


def test_an_index_that_is_opened_while_another_process_removes_it_is_built_again(
    tmp_path, monkeypatch
):
    def build(folder: Path) -> None:
        (folder / "words").write_text("vifel")

    old = stored_index([tmp_path], "bm25", "old", build)
    last_used = time.time() - UNUSED_S - 60
    os.utime(old, (last_used, last_used))
    utime = os.utime

    def after_the_other_process(path: Path) -> None:
        monkeypatch.setattr(os, "utime", utime)
        stored_index([tmp_path], "bm25", "new", build)
        utime(path)

    monkeypatch.setattr(os, "utime", after_the_other_process)
    assert (stored_index([tmp_path], "bm25", "old", build) / "words").exists()


@pytest.mark.parametrize("file", ["data.csc.index.npy", "contents.json"])
def test_an_index_that_is_not_whole_is_built_again(folder, file):
    DocumentIndex.from_folder(folder)
    (stored,) = indexes(folder, "bm25")
    with (stored / file).open("r+b") as handle:
        handle.truncate(5)
    assert texts_found(DocumentIndex.from_folder(folder), "44") == ["depth vifel 44"]
    assert (stored / file).stat().st_size > 5


def test_a_build_that_died_is_begun_again(folder):
    DocumentIndex.from_folder(folder)
    (stored,) = indexes(folder, "bm25")
    stored.rename(stored.with_name(f"{stored.name}.part"))
    assert texts_found(DocumentIndex.from_folder(folder), "44") == ["depth vifel 44"]
    assert indexes(folder, "bm25") == [stored]


AT_ONCE = """
import logging, multiprocessing, sys
from rllib_arpo.tools.search_bm25 import DocumentIndex

def open_index(barrier):
    barrier.wait()
    print(DocumentIndex.from_folder(sys.argv[1]).find("44", 1)[0].text, flush=True)

logging.basicConfig(level=logging.INFO)
context = multiprocessing.get_context("fork")
barrier = context.Barrier(4)
children = [context.Process(target=open_index, args=(barrier,)) for _ in range(4)]
for child in children:
    child.start()
for child in children:
    child.join()
"""


def test_processes_that_start_at_once_build_once(folder):
    done = run_python(AT_ONCE, str(folder))
    assert done.stdout.count("depth vifel 44") == 4, done.stderr
    # documents, then bm25
    assert done.stderr.count("building the search index") == 2, done.stderr


def test_threads_that_start_at_once_build_once(folder, caplog):
    barrier = threading.Barrier(8)

    def run(_: int) -> list[str]:
        barrier.wait()
        return [hit.text for hit in DocumentIndex.from_folder(folder).find("44", 1)]

    with (
        caplog.at_level(logging.INFO, "rllib_arpo"),
        ThreadPoolExecutor(8) as pool,
    ):
        assert list(pool.map(run, range(8))) == [["depth vifel 44"]] * 8
    assert caplog.text.count("building the search index") == 2


def test_indexes_may_be_kept_elsewhere(folder, tmp_path):
    index = DocumentIndex.from_folder(folder, cache_folder=tmp_path / "cache")
    assert texts_found(index, "44") == ["depth vifel 44"]
    assert not (folder / BESIDE).exists()
    assert len(indexes(tmp_path / "cache", "bm25")) == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root can write everywhere")
def test_a_folder_that_cannot_be_written_has_its_index_in_the_users_cache(
    folder, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder.chmod(0o500)
    index = DocumentIndex.from_folder(folder)
    assert texts_found(index, "44") == ["depth vifel 44"]
    built = state_of(tmp_path / "cache")
    assert built
    DocumentIndex.from_folder(folder)
    assert state_of(tmp_path / "cache") == built


def test_an_index_that_cannot_be_written_is_an_error_with_a_cure(folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot write.*cache_folder"):
        DocumentIndex.from_folder(folder, cache_folder=tmp_path / "file" / "cache")


FULL_DISK = """
import resource, sys
from rllib_arpo.errors import DataError
from rllib_arpo.tools.search_bm25 import DocumentIndex
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    DocumentIndex.from_folder(sys.argv[1])
except DataError as error:
    print(error)
"""


def test_a_full_disk_is_an_error_that_says_so_and_leaves_nothing(folder):
    write_rows(folder / "a.jsonl", *[{"text": f"word{i}"} for i in range(2000)])
    done = run_python(FULL_DISK, str(folder))
    assert "cannot write the search index" in done.stdout
    assert "Free some space" in done.stdout
    assert indexes(folder, "documents") == []
    assert texts_found(DocumentIndex.from_folder(folder), "word7") == ["word7"]


def test_many_documents_are_found_across_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_module, "ROWS_PER_BATCH", 7)
    write_rows(tmp_path / "a.jsonl", *[{"text": f"common word{i}"} for i in range(50)])
    index = DocumentIndex.from_folder(tmp_path)
    assert len(index.documents) == 50
    assert texts_found(index, "word43") == ["common word43"]
    assert texts_found(index, "common", 2) == ["common word0", "common word1"]
    assert index.documents[48:] == [
        Document("common word48"),
        Document("common word49"),
    ]


def test_a_large_index_answers_the_same_from_a_thread(monkeypatch):
    index = DocumentIndex.from_texts(TEXTS)
    here = texts_found(index, "zepen")
    monkeypatch.setattr(search_bm25, "LARGE_INDEX", 1)
    assert texts_found(index, "zepen") == here
