"""Trajectories that earned enough, as traces for a cold start: rejection sampling.

What is written is what `load_traces` reads: one chat per row, with its reward.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rllib_arpo.data.tree_files import read_trees
from rllib_arpo.storage import output_aside
from rllib_arpo.tree import Leaf, RolloutTree, path

ROLES = {"model": "assistant", "tool": "tool"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """What an export found and wrote.

    Attributes:
        num_trees: trees that were read.
        num_trajectories: their leaves.
        num_written: rows of the file.
        num_tasks: different tasks among them.
    """

    num_trees: int
    num_trajectories: int
    num_written: int
    num_tasks: int


def export_traces(
    files: Iterable[Path],
    out: Path,
    *,
    min_reward: float,
    max_per_task: int | None = None,
) -> Exported:
    """Write the trajectories that end in an answer and earned `min_reward`.

    Args:
        files: of `write_trees`; the newest weights first, if there is a cap.
        out: a .jsonl file, replaced; its folder is made.
        min_reward: least reward of a trajectory.
        max_per_task: most rows of one task, the first found; None for all. The same
            text is never written twice.

    Raises:
        DataError: a file does not hold trees.
        CheckpointError: `out` cannot be written; a file before it is intact.
    """
    num_trees = num_trajectories = 0
    per_task: Counter[str] = Counter()
    written: set[str] = set()
    with output_aside(out) as aside, aside.open("w", encoding="utf-8") as lines:
        for tree in (tree for file in files for tree in read_trees(file)):
            num_trees += 1
            num_trajectories += len(tree.leaves)
            task_id = tree.task.task_id
            for row in _rows(tree, min_reward):
                chat = json.dumps(row["messages"], ensure_ascii=False)
                full = max_per_task is not None and per_task[task_id] >= max_per_task
                if chat in written or full:
                    continue
                written.add(chat)
                per_task[task_id] += 1
                lines.write(json.dumps(row, ensure_ascii=False) + "\n")
    return Exported(
        num_trees=num_trees,
        num_trajectories=num_trajectories,
        num_written=len(written),
        num_tasks=len(per_task),
    )


def _rows(tree: RolloutTree, min_reward: float) -> Iterator[dict[str, Any]]:
    for leaf in tree.leaves:
        if leaf.end == "answer" and leaf.reward >= min_reward:
            yield {
                "messages": _chat(tree, leaf),
                "task_id": tree.task.task_id,
                "source": tree.task.source,
                "reward": leaf.reward,
            }


def _chat(tree: RolloutTree, leaf: Leaf) -> list[dict[str, str]]:
    prompt = [{"role": m.role, "content": m.content} for m in tree.task.messages]
    segments = [tree.segments[index] for index in path(tree, leaf)[1:]]
    return prompt + [{"role": ROLES[s.role], "content": s.text} for s in segments]
