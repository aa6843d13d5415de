import dataclasses
import json
from pathlib import Path

from rllib_arpo.data.export_traces import export_traces
from rllib_arpo.data.traces import load_traces, trace_tree
from rllib_arpo.data.tree_files import write_trees
from rllib_arpo.envs.tag_dialogue import TagDialogue
from rllib_arpo.tree import Leaf, Message, RolloutTree, Task, path_token_ids
from tests.tokenizers import qwen_like

SEARCH = "<think> look </think><search> height of vifel </search>"
RIGHT = "<think> 44 </think><answer> \\boxed{44} </answer>"
WRONG = "<think> 45 </think><answer> \\boxed{45} </answer>"


def grown(task_id: str) -> RolloutTree:
    """One search, and two answers to its result: right (1.1) and wrong (0)."""
    dialogue = TagDialogue(qwen_like(), ("search",))
    task = Task(
        task_id=task_id,
        messages=(Message(role="user", content=f"How high is vifel in {task_id}?"),),
        answers=("44",),
        source="test",
    )
    parts = [("model", SEARCH), ("tool", "height vifel 44"), ("model", RIGHT)]
    right = trace_tree(task, parts, dialogue)  # type: ignore[arg-type]
    wrong = trace_tree(task, [*parts[:2], ("model", WRONG)], dialogue)  # type: ignore[arg-type,list-item]
    last = dataclasses.replace(wrong.segments[3], parent=2)
    (leaf,) = right.leaves
    leaves = (
        dataclasses.replace(leaf, reward=1.1),
        dataclasses.replace(leaf, segment=4, reward=0.0, origin="branch", answer="45"),
        Leaf(
            segment=2,
            reward=1.1,
            reward_parts={},
            origin="refill",
            end="length",
        ),
    )
    return dataclasses.replace(right, segments=(*right.segments, last), leaves=leaves)


def exported_rows(folder: Path, **settings) -> list[dict]:
    export_traces(sorted(folder.glob("*.parquet")), folder / "out.jsonl", **settings)
    return [
        json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()
    ]


def test_only_answers_that_earned_enough_are_written(tmp_path):
    write_trees(tmp_path / "1.parquet", [grown("a"), grown("b")])
    rows = exported_rows(tmp_path, min_reward=1.0)
    assert [(row["task_id"], row["reward"]) for row in rows] == [("a", 1.1), ("b", 1.1)]
    assert rows[0]["messages"] == [
        {"role": "user", "content": "How high is vifel in a?"},
        {"role": "assistant", "content": SEARCH},
        {"role": "tool", "content": "height vifel 44"},
        {"role": "assistant", "content": RIGHT},
    ]
    assert len(exported_rows(tmp_path, min_reward=0.0)) == 4


def test_the_same_text_is_written_once_and_a_task_at_most_so_often(tmp_path):
    write_trees(tmp_path / "1.parquet", [grown("a")])
    write_trees(tmp_path / "2.parquet", [grown("a"), grown("b")])
    files = sorted(tmp_path.glob("*.parquet"))
    all_of_them = export_traces(files, tmp_path / "out.jsonl", min_reward=0.0)
    assert (all_of_them.num_trees, all_of_them.num_trajectories) == (3, 9)
    assert (all_of_them.num_written, all_of_them.num_tasks) == (4, 2)
    one_each = export_traces(
        files, tmp_path / "out.jsonl", min_reward=0.0, max_per_task=1
    )
    assert one_each.num_written == 2


def test_what_is_exported_is_taught_token_for_token(tmp_path):
    tree = grown("a")
    write_trees(tmp_path / "1.parquet", [tree])
    exported_rows(tmp_path, min_reward=1.0)
    qwen_like().save_pretrained(tmp_path / "model")
    (trace,) = load_traces(tmp_path / "out.jsonl", str(tmp_path / "model"), ("search",))
    assert (
        path_token_ids(trace, trace.leaves[0]).tolist()
        == path_token_ids(tree, tree.leaves[0]).tolist()
    )
