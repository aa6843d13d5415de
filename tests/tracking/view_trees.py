"""Trees for the tests of the viewer."""

from typing import Any

import numpy as np

from rllib_arpo.tracking.viewer import ShownRun
from rllib_arpo.tree import (
    BranchDecision,
    Leaf,
    LeafOrigin,
    Message,
    RolloutTree,
    Segment,
    Task,
    ToolCall,
)


def shown(*trees: RolloutTree, name: str = "run", **options: Any) -> ShownRun:
    """Trees as the page shows those of a run."""
    return ShownRun(name=name, trees=trees, **options)


def a_tree(
    *, task_id: str = "t1", question: str = "How tall?", result: str = "17 cm"
) -> RolloutTree:
    """A search, then a right and a wrong leaf; the search of the third path fails."""
    branch = BranchDecision(
        entropy=0.25,
        entropy_change=0.125,
        probability=0.625,
        drawn=0.5,
        wanted=1,
        taken=1,
    )
    return RolloutTree(
        task=Task(
            task_id=task_id,
            messages=(Message(role="user", content=question),),
            answers=("17",),
        ),
        segments=(
            Segment(parent=None, role="prompt", token_ids=_ids(5)),
            model(0, 0.5, "<search>height</search>"),
            Segment(
                parent=1,
                role="tool",
                token_ids=_ids(4),
                tool_call=ToolCall(name="search", arguments="height", status="ok"),
                text=result,
            ),
            model(2, 0.1, "seventeen", branch=branch),
            model(2, 1.5, "eighteen"),
            model(0, 0.2, "<search>zebra</search>"),
            Segment(
                parent=5,
                role="tool",
                token_ids=_ids(2),
                tool_call=ToolCall(name="search", arguments="zebra", status="timeout"),
            ),
        ),
        leaves=(
            leaf(3, 1.0, "17"),
            leaf(4, 0.0, "18", origin="branch"),
            leaf(6, 0.0, None),
        ),
    )


def big_tree(*, num_leaves: int = 64, num_turns: int = 20) -> RolloutTree:
    """Nothing shared but the prompt, 32 tokens and some 120 characters a turn."""
    generator = np.random.default_rng(0)
    segments = [Segment(parent=None, role="prompt", token_ids=_ids(64))]
    leaves = []
    for number in range(num_leaves):
        parent = 0
        for turn in range(num_turns):
            segments.append(
                Segment(
                    parent=parent,
                    role="model",
                    token_ids=generator.integers(0, 30_000, 32).astype(np.int32),
                    entropies=generator.exponential(0.5, 32).astype(np.float32),
                    text=f"path {number} turn {turn} " + "thinks of it " * 8,
                )
            )
            parent = len(segments) - 1
            if turn < num_turns - 1:
                segments.append(
                    Segment(
                        parent=parent,
                        role="tool",
                        token_ids=_ids(40),
                        tool_call=ToolCall(
                            name="search", arguments=f"query {turn}", status="ok"
                        ),
                        text="a passage of a page that was found " * 4,
                    )
                )
                parent = len(segments) - 1
        leaves.append(leaf(parent, float(number % 2), str(number)))
    return RolloutTree(
        task=Task(
            task_id="big",
            messages=(Message(role="user", content="Big?"),),
            answers=("1",),
        ),
        segments=tuple(segments),
        leaves=tuple(leaves),
    )


def model(parent, entropy, text, *, branch=None):
    """A turn of two tokens around the mean entropy."""
    return Segment(
        parent=parent,
        role="model",
        token_ids=np.array([7, 9], np.int32),
        entropies=np.array([entropy * 0.5, entropy * 1.5], np.float32),
        branch=branch,
        text=text,
    )


def leaf(segment, reward, answer, *, origin: LeafOrigin = "initial"):
    """A leaf whose whole reward is its accuracy."""
    return Leaf(
        segment=segment,
        reward=reward,
        reward_parts={"accuracy": reward},
        origin=origin,
        end="answer" if answer else "no_answer",
        answer=answer,
    )


def _ids(count: int) -> np.ndarray:
    return np.arange(count, dtype=np.int32)
