"""Rollout trees in parquet files: what a run keeps of its iterations.

One row is one tree, whole: tokens, log-probabilities, entropies, branch decisions,
tool calls and rewards. A file is written aside, brought to the disk and renamed, so
that it is never half there. `task.metadata` is kept as far as JSON can hold it.
"""

import dataclasses
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rllib_arpo.errors import DataError
from rllib_arpo.storage import file_aside
from rllib_arpo.tree import (
    BranchDecision,
    Leaf,
    Message,
    RolloutTree,
    Segment,
    Task,
    ToolCall,
)

ARRAYS = {
    "token_ids": pa.int32(),
    "logprobs": pa.float32(),
    "entropies": pa.float32(),
    "policy_versions": pa.int32(),
}
_MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string())])
_TASK = pa.struct(
    [
        ("task_id", pa.string()),
        ("messages", pa.list_(_MESSAGE)),
        ("answers", pa.list_(pa.string())),
        ("ability", pa.string()),
        ("source", pa.string()),
        ("metadata", pa.string()),
    ]
)
_TOOL_CALL = pa.struct(
    [
        ("name", pa.string()),
        ("arguments", pa.string()),
        ("status", pa.string()),
        ("latency_s", pa.float64()),
        ("num_attempts", pa.int32()),
        ("truncated", pa.bool_()),
    ]
)
_BRANCH = pa.struct(
    [
        ("entropy", pa.float64()),
        ("entropy_change", pa.float64()),
        ("probability", pa.float64()),
        ("drawn", pa.float64()),
        ("wanted", pa.int32()),
        ("taken", pa.int32()),
    ]
)
_SEGMENT = pa.struct(
    [
        ("parent", pa.int32()),
        ("role", pa.string()),
        *((name, pa.list_(type_)) for name, type_ in ARRAYS.items()),
        ("finish_reason", pa.string()),
        ("tool_call", _TOOL_CALL),
        ("branch", _BRANCH),
        ("text", pa.string()),
    ]
)
_LEAF = pa.struct(
    [
        ("segment", pa.int32()),
        ("reward", pa.float64()),
        ("reward_parts", pa.map_(pa.string(), pa.float64())),
        ("origin", pa.string()),
        ("end", pa.string()),
        ("answer", pa.string()),
    ]
)
SCHEMA = pa.schema(
    [
        ("task", _TASK),
        ("segments", pa.list_(_SEGMENT)),
        ("leaves", pa.list_(_LEAF)),
        ("seed", pa.uint64()),
    ]
)


def write_trees(file: str | Path, trees: Sequence[RolloutTree]) -> None:
    """Write trees to a parquet file, whole or not at all.

    Raises:
        OSError: the file cannot be written.
    """
    table = pa.Table.from_pylist([_tree_row(tree) for tree in trees], schema=SCHEMA)
    with file_aside(Path(file)) as aside:
        pq.write_table(table, aside, compression="zstd")


def read_trees(file: str | Path) -> Iterator[RolloutTree]:
    """The trees of a file that `write_trees` wrote, one at a time.

    Raises:
        DataError: it is no such file.
    """
    try:
        with pq.ParquetFile(file) as parquet:
            if not parquet.schema_arrow.equals(SCHEMA):
                raise DataError(f"{file} does not hold rollout trees")
            for batch in parquet.iter_batches(batch_size=8):
                for row in batch.to_pylist():
                    yield _tree(row)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file} cannot be read as parquet: {error}") from error


def _tree_row(tree: RolloutTree) -> dict[str, Any]:
    task = _fields(tree.task)
    task["messages"] = [_fields(message) for message in tree.task.messages]
    task["metadata"] = json.dumps(dict(tree.task.metadata), default=str)
    return {
        "task": task,
        "segments": [_segment_row(segment) for segment in tree.segments],
        "leaves": [
            _fields(leaf) | {"reward_parts": list(leaf.reward_parts.items())}
            for leaf in tree.leaves
        ],
        "seed": tree.seed,
    }


def _segment_row(segment: Segment) -> dict[str, Any]:
    row = _fields(segment)
    for name in ("tool_call", "branch"):
        row[name] = None if row[name] is None else _fields(row[name])
    return row


def _fields(carrier: Any) -> dict[str, Any]:
    """The fields of a carrier, as they are; `asdict` would copy all arrays."""
    return {f.name: getattr(carrier, f.name) for f in dataclasses.fields(carrier)}


def _tree(row: dict[str, Any]) -> RolloutTree:
    task = row["task"]
    return RolloutTree(
        task=Task(
            **task
            | {
                "messages": tuple(Message(**message) for message in task["messages"]),
                "answers": tuple(task["answers"]),
                "metadata": json.loads(task["metadata"]),
            }
        ),
        segments=tuple(_segments(row["segments"])),
        leaves=tuple(
            Leaf(**leaf | {"reward_parts": dict(leaf["reward_parts"])})
            for leaf in row["leaves"]
        ),
        seed=row["seed"],
    )


def _segments(rows: Iterable[dict[str, Any]]) -> Iterator[Segment]:
    for row in rows:
        arrays = {
            name: np.array(row[name], type_.to_pandas_dtype())
            for name, type_ in ARRAYS.items()
        }
        call, branch = row["tool_call"], row["branch"]
        carriers: dict[str, Any] = {
            "tool_call": None if call is None else ToolCall(**call),
            "branch": None if branch is None else BranchDecision(**branch),
        }
        fields: dict[str, Any] = {**row, **arrays, **carriers}
        yield Segment(**fields)
