import dataclasses

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rllib_arpo.data.tree_files import read_trees, write_trees
from rllib_arpo.errors import DataError
from rllib_arpo.tree import (
    BranchDecision,
    Leaf,
    Message,
    RolloutTree,
    Segment,
    Task,
    ToolCall,
)
from tests.synced import Disk


def tree(task_id: str = "a") -> RolloutTree:
    tokens = np.arange(3, dtype=np.int32)
    reals = np.array([-0.1, -2.5, 0.0], np.float32)
    model = Segment(
        parent=0,
        role="model",
        token_ids=tokens,
        logprobs=reals,
        entropies=-reals,
        policy_versions=tokens,
        finish_reason="stop",
        text="<search> vifel </search>",
    )
    call = ToolCall(name="search", arguments="vifel", status="ok", latency_s=0.25)
    decision = BranchDecision(
        entropy=0.5,
        entropy_change=-0.125,
        probability=0.475,
        drawn=0.75,
        wanted=1,
        taken=0,
    )
    return RolloutTree(
        task=Task(
            task_id=task_id,
            messages=(
                Message(role="system", content="Use tools."),
                Message(role="user", content="How high is vifel? \ud83d\ude42 ü"),
            ),
            answers=("44", "forty-four"),
            ability="math",
            source="test",
            metadata={"question": "How high?", "level": 3},
        ),
        segments=(
            Segment(parent=None, role="prompt", token_ids=tokens, text="How high?"),
            model,
            Segment(parent=1, role="tool", token_ids=tokens, tool_call=call, text="44"),
            dataclasses.replace(model, parent=2, branch=decision),
        ),
        leaves=(
            Leaf(
                segment=3,
                reward=1.1,
                reward_parts={"accuracy": 1.0, "multi_tool_bonus": 0.1},
                origin="initial",
                end="answer",
                answer="44",
            ),
            Leaf(
                segment=1,
                reward=-1.0,
                reward_parts={"format": -1.0},
                origin="refill",
                end="length",
            ),
        ),
        seed=2**64 - 1,
    )


def same(left: object, right: object) -> bool:
    """Equality of carriers, arrays by value and type."""
    if isinstance(left, np.ndarray) and isinstance(right, np.ndarray):
        return left.dtype == right.dtype and np.array_equal(left, right)
    if dataclasses.is_dataclass(left):
        names = [field.name for field in dataclasses.fields(left)]
        return type(left) is type(right) and all(
            same(getattr(left, name), getattr(right, name)) for name in names
        )
    if isinstance(left, tuple) and isinstance(right, tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right


def test_what_is_read_is_what_was_written(tmp_path):
    question = "How high is vifel? ü"
    trees = [tree(str(number)) for number in range(20)]
    task = dataclasses.replace(
        trees[0].task, messages=(Message(role="user", content=question),)
    )
    trees = [dataclasses.replace(one, task=task) for one in trees]
    write_trees(tmp_path / "trees.parquet", trees)
    read = list(read_trees(tmp_path / "trees.parquet"))
    assert len(read) == 20
    assert all(map(same, read, trees))
    assert [file.name for file in tmp_path.iterdir()] == ["trees.parquet"]


def test_a_file_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    file = tmp_path / "trees.parquet"
    task = Task(task_id="a", messages=(), answers=("1",))
    disk = Disk(monkeypatch)
    write_trees(file, [dataclasses.replace(tree(), task=task)])
    assert disk.held(file, before=file)


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path):
    file = tmp_path / "trees.parquet"
    good = dataclasses.replace(
        tree(), task=Task(task_id="a", messages=(), answers=("1",))
    )
    write_trees(file, [good])
    before = file.read_bytes()
    with pytest.raises(UnicodeEncodeError):  # half of a pair is no text
        write_trees(file, [tree()])
    assert file.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["trees.parquet"]


def test_another_file_is_refused(tmp_path):
    with pytest.raises(DataError, match="cannot be read as parquet"):
        list(read_trees(tmp_path / "none.parquet"))
    (tmp_path / "text.parquet").write_text("no parquet")
    with pytest.raises(DataError, match="cannot be read as parquet"):
        list(read_trees(tmp_path / "text.parquet"))
    pq.write_table(pa.table({"question": ["1 + 1?"]}), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match="does not hold rollout trees"):
        list(read_trees(tmp_path / "rows.parquet"))
