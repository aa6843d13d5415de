import copy
import json
import os
import pickle
import random
import resource
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rllib_arpo.data.data_file import DataFile
from rllib_arpo.data.datasets import checked_rows, load_tasks
from rllib_arpo.data.stored_tasks import StoredTasks, store_tasks
from rllib_arpo.errors import DataError
from rllib_arpo.tree import Message, Task

MB = 1_000_000


def task(number: int, text: str = "?") -> Task:
    return Task(
        task_id=f"t/{number}",
        messages=(
            Message(role="system", content="s"),
            Message(role="user", content=text),
        ),
        answers=("a", "ä\n", ""),
        ability="math",
        source="x",
        metadata={"question": text},
    )


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), max_size=5))
def test_what_is_stored_comes_back(texts):
    tasks = [task(number, text) for number, text in enumerate(texts)]
    assert list(store_tasks(tasks)) == tasks


@given(st.integers(-12, 12), st.slices(10), st.slices(10))
def test_it_is_indexed_and_sliced_as_a_list(index, first, second):
    tasks = [task(number) for number in range(10)]
    stored = store_tasks(tasks)
    assert list(stored[first][second]) == tasks[first][second]
    assert len(stored[first]) == len(tasks[first])
    if -10 <= index < 10:
        assert stored[index] == tasks[index]
    else:
        with pytest.raises(IndexError):
            stored[index]


def test_a_pickled_slice_carries_its_own_rows_only():
    stored = store_tasks(task(number, "x" * 1000) for number in range(1000))
    part = pickle.dumps(stored[5:7])
    assert list(pickle.loads(part)) == [task(n, "x" * 1000) for n in (5, 6)]
    assert len(part) < 10_000
    assert copy.deepcopy(stored) is stored


def anonymous_bytes() -> int:
    """Memory of this process that no file backs, so that only swapping frees it."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) * 1024


def long_rows(count: int) -> Iterator[dict[str, str]]:
    for number in range(count):
        yield {"question": os.urandom(5000).hex(), "answer": str(number)}


def write_jsonl(path: Path, count: int) -> None:
    with path.open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in long_rows(count))


def write_one_row_group(path: Path, count: int) -> None:
    table = pa.Table.from_pylist(list(long_rows(count)))
    pq.write_table(table, path, row_group_size=count, compression="none")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc")
@pytest.mark.parametrize(
    ("name", "write"), [("r.jsonl", write_jsonl), ("r.parquet", write_one_row_group)]
)
def test_memory_does_not_grow_with_the_file(tmp_path, name, write):
    count = 20_000
    write(tmp_path / name, count)
    size = (tmp_path / name).stat().st_size
    assert size > 190 * MB
    pa.default_memory_pool().release_unused()
    before = anonymous_bytes()
    peak = 0

    def tasks() -> Iterator[Task]:
        nonlocal peak
        for number, row in enumerate(checked_rows(DataFile(tmp_path / name))):
            if number % 100 == 0:
                peak = max(peak, anonymous_bytes())
            assert row.task is not None
            yield row.task

    stored = store_tasks(tasks())
    for number in random.Random(0).sample(range(count), 5000):
        assert stored[number].answers == (str(number),)
        if number % 100 == 0:
            peak = max(peak, anonymous_bytes())
    assert peak - before < size / 2


def test_a_full_disk_is_a_clear_error_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "spool"))
    (tmp_path / "spool").mkdir()
    write_jsonl(tmp_path / "r.jsonl", 200)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MB, hard))
    try:
        with pytest.raises(DataError, match=r"spool: File too large .* TMPDIR"):
            load_tasks(tmp_path / "r.jsonl")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list((tmp_path / "spool").iterdir()) == []
    assert isinstance(load_tasks(tmp_path / "r.jsonl"), StoredTasks)
