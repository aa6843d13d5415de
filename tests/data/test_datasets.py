import json
import logging
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rllib_arpo.data.cursor import TaskCursor
from rllib_arpo.data.datasets import load_tasks
from rllib_arpo.errors import DataError
from rllib_arpo.tree import Message, Task

SHARED = Path(__file__).parents[3] / "shared" / "data"


def row(**changes):
    return {
        "data_source": "mix",
        "prompt": [
            {"content": "Box it: \boxed{}", "role": "system"},
            {"content": "1 + 1?", "role": "user"},
        ],
        "ability": "math",
        "reward_model": {"ground_truth": "2", "style": "rule"},
        "extra_info": {"index": 0, "question": "1 + 1?", "split": "train"},
        "metadata": None,
    } | changes


def write_parquet(path: Path, *rows) -> Path:
    pq.write_table(pa.Table.from_pylist(list(rows)), path)
    return path


def write_jsonl(path: Path, *rows) -> Path:
    path.write_text("\n".join(json.dumps(r) for r in rows) + "\n")
    return path


def test_a_parquet_row_becomes_a_task(tmp_path):
    (task,) = load_tasks(write_parquet(tmp_path / "rows.parquet", row()))
    assert task == Task(
        task_id="rows/0",
        messages=(
            Message(role="system", content=r"Box it: \boxed{}"),  # repaired
            Message(role="user", content="1 + 1?"),
        ),
        answers=("2",),
        ability="math",
        source="mix",
        metadata={"question": "1 + 1?"},
    )


def test_a_missing_ability_is_a_question(tmp_path):
    (task,) = load_tasks(write_parquet(tmp_path / "r.parquet", row(ability=None)))
    assert task.ability == "qa"


def test_a_ground_truth_may_be_a_list(tmp_path):
    rows = row(reward_model={"ground_truth": ["NYC", "New York"]})
    (task,) = load_tasks(write_parquet(tmp_path / "r.parquet", rows))
    assert task.answers == ("NYC", "New York")


@pytest.mark.parametrize(
    "line",
    [
        {"question": "1 + 1?", "answer": "2"},
        {"prompt": "1 + 1?", "answer": 2},
        {"problem": "1 + 1?", "answer": ["2"]},
        {"prompt": [{"role": "user", "content": "1 + 1?"}], "answer": "2"},
    ],
)
def test_jsonl_rows_become_tasks(tmp_path, line):
    (task,) = load_tasks(write_jsonl(tmp_path / "r.jsonl", line))
    assert task.messages == (Message(role="user", content="1 + 1?"),)
    assert task.answers == ("2",)
    assert (task.ability, task.source, task.task_id) == ("qa", "r", "r/0")


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": 3}, "prompt"),
        ({"prompt": [{"role": "bot", "content": "x"}]}, r"prompt\[0\].role"),
        ({"prompt": [{"role": "user", "content": " "}]}, r"prompt\[0\].content"),
        ({"prompt": [{"role": "system", "content": "x"}]}, "prompt"),
        ({"reward_model": {"ground_truth": None}}, "reward_model.ground_truth"),
        ({"reward_model": {"ground_truth": ""}}, "reward_model.ground_truth"),
        ({"reward_model": {"ground_truth": []}}, "reward_model.ground_truth"),
        ({"reward_model": {"style": "rule"}}, "reward_model.ground_truth"),
        ({"reward_model": "2"}, "reward_model"),
        ({"reward_model": None}, "answer"),
        ({"ability": 3}, "ability"),
    ],
)
def test_a_bad_row_is_refused_with_file_row_and_field(tmp_path, changes, field):
    path = write_jsonl(tmp_path / "r.jsonl", row(), row(**changes))
    with pytest.raises(DataError, match=rf"r\.jsonl, row 1, `{field}`"):
        load_tasks(path)


def test_a_bad_parquet_row_is_refused_with_its_place(tmp_path):
    bad = row(reward_model={"ground_truth": None, "style": "rule"})
    path = write_parquet(tmp_path / "r.parquet", row(), row(), bad)
    with pytest.raises(DataError, match=r"r\.parquet, row 2, `reward_model.ground"):
        load_tasks(path)


def test_a_blank_ground_truth_is_kept_and_warned_of(tmp_path, caplog):
    path = write_jsonl(tmp_path / "r.jsonl", row(reward_model={"ground_truth": " "}))
    with caplog.at_level(logging.WARNING):
        (task,) = load_tasks(path)
    assert task.answers == ("",)
    assert "row 0, `reward_model.ground_truth`" in caplog.text


def test_files_that_cannot_be_read_are_refused(tmp_path):
    (tmp_path / "text.parquet").write_text("no parquet")
    (tmp_path / "bad.jsonl").write_text('{"question": "x", "answer": "y"}\n{')
    (tmp_path / "list.jsonl").write_text("[1]\n")
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "rows.csv").write_text("a,b")
    for name, message in [
        ("text.parquet", "cannot be read"),
        ("bad.jsonl", "row 1"),
        ("list.jsonl", "row 0: expected an object"),
        ("empty.jsonl", "no rows"),
        ("rows.csv", "expected a"),
        ("none.jsonl", "no file"),
    ]:
        with pytest.raises(DataError, match=message):
            load_tasks(tmp_path / name)


def test_a_limit_reads_the_first_rows_only(tmp_path):
    lines = [{"question": str(i), "answer": "x"} for i in range(5)]
    path = write_jsonl(tmp_path / "r.jsonl", *lines, {"question": "bad"})
    assert [t.task_id for t in load_tasks(path, limit=2)] == ["r/0", "r/1"]
    with pytest.raises(DataError, match="limit"):
        load_tasks(path, limit=0)


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no data in {SHARED}")
@pytest.mark.parametrize(
    ("name", "rows", "math"),
    [
        ("train_10k", 10_000, 5_000),
        ("valid", 180, 100),
        ("hard_search_1k", 1_071, 0),
    ],
)
def test_the_paper_s_rows_are_read_and_repaired(name, rows, math):
    tasks = load_tasks(SHARED / f"{name}.parquet")
    assert len(tasks) == len({task.task_id for task in tasks}) == rows
    assert sum(task.ability == "math" for task in tasks) == math
    assert not any("\b" in m.content for task in tasks for m in task.messages)
    assert r"\boxed{answer here}" in tasks[0].messages[0].content


def tasks_of(number: int) -> list[Task]:
    return [Task(task_id=str(i), messages=(), answers=("x",)) for i in range(number)]


def ids(tasks) -> list[str]:
    return [task.task_id for task in tasks]


@given(st.integers(1, 9), st.integers(0, 5), st.lists(st.integers(0, 7), max_size=8))
def test_every_epoch_holds_each_task_once(number, seed, sizes):
    cursor = TaskCursor(tasks_of(number), seed=seed)
    drawn = [name for n in sizes for name in ids(cursor.next(n))]
    assert len(drawn) == sum(sizes)
    for start in range(0, len(drawn) - number + 1, number):
        assert sorted(drawn[start : start + number]) == ids(tasks_of(number))


@given(st.integers(0, 30), st.integers(0, 30))
def test_a_restored_cursor_goes_on_where_the_state_was_taken(before, after):
    cursor = TaskCursor(tasks_of(7), seed=1)
    cursor.next(before)
    restored = TaskCursor(tasks_of(7), seed=99)
    restored.set_state(json.loads(json.dumps(cursor.get_state())))
    assert ids(restored.next(after)) == ids(cursor.next(after))
    assert restored.get_state() == cursor.get_state()


def test_the_order_depends_on_the_seed_and_the_epoch():
    first, again, other = (TaskCursor(tasks_of(50), seed=s) for s in (1, 1, 2))
    order = ids(first.next(50))
    assert order == ids(again.next(50))
    assert order != ids(other.next(50))
    assert order != ids(first.next(50))
    assert first.epoch == 1


def test_without_shuffling_the_order_is_the_file_s():
    cursor = TaskCursor(tasks_of(3), shuffle=False)
    assert ids(cursor.next(5)) == ["0", "1", "2", "0", "1"]


def test_a_state_over_other_data_is_refused():
    state = TaskCursor(tasks_of(3)).get_state()
    with pytest.raises(DataError, match="3 tasks, the data holds 4"):
        TaskCursor(tasks_of(4)).set_state(state)
    with pytest.raises(DataError, match="at least one"):
        TaskCursor([])
