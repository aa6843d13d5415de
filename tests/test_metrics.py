"""What is measured on trees, by hand-counted numbers."""

import numpy as np
import pytest

from rllib_arpo.metrics import SOMETIMES, refuse_outage, tree_metrics
from rllib_arpo.tree import (
    BranchDecision,
    Leaf,
    Message,
    RolloutTree,
    Segment,
    Task,
    ToolCall,
)

TASK = Task(task_id="t", messages=(Message(role="user", content="q"),), answers=("a",))


def tokens(count: int) -> np.ndarray:
    return np.arange(count, dtype=np.int32)


def decision(wanted: int, taken: int) -> BranchDecision:
    return BranchDecision(
        entropy=0.5,
        entropy_change=0.0,
        probability=0.5,
        drawn=0.0,
        wanted=wanted,
        taken=taken,
    )


def model(
    parent: int, entropies: list[float], branch: BranchDecision | None = None
) -> Segment:
    return Segment(
        branch=branch,
        parent=parent,
        role="model",
        token_ids=tokens(len(entropies)),
        logprobs=np.zeros(len(entropies), np.float32),
        entropies=np.array(entropies, np.float32),
    )


def tool(parent: int, count: int, status: str, latency_s: float = 0.0) -> Segment:
    return Segment(
        parent=parent,
        role="tool",
        token_ids=tokens(count),
        tool_call=ToolCall(
            name="search",
            arguments="",
            status=status,  # type: ignore[arg-type]
            latency_s=latency_s,
        ),
    )


def leaf(segment: int, reward: float, parts, origin="initial", end="answer") -> Leaf:
    return Leaf(
        segment=segment, reward=reward, reward_parts=parts, origin=origin, end=end
    )


@pytest.fixture
def metrics():
    # 0 prompt(3) ─ 1 model(2) ─ 2 tool(4) ─┬─ 3 model(3)                  leaf A
    #                                       └─ 4 model(1) ─ 5 tool(2) ─ 6 model(2)  B
    forked = RolloutTree(
        task=TASK,
        segments=(
            Segment(parent=None, role="prompt", token_ids=tokens(3)),
            model(0, [1.0, 3.0]),
            tool(1, 4, "ok", 0.5),
            model(2, [4.0, 6.0, 8.0], decision(wanted=1, taken=1)),
            model(2, [2.0]),
            tool(4, 2, "timeout", 1.5),
            model(5, [0.0, 1.0], decision(wanted=1, taken=0)),
        ),
        leaves=(
            leaf(3, 1.1, {"accuracy": 1.0, "multi_tool_bonus": 0.1}),
            leaf(6, -1.0, {"accuracy": 0.0, "format": -1.0}, "branch", "length"),
        ),
    )
    # A call that was refused, and rewards that are all equal.
    plain = RolloutTree(
        task=TASK,
        segments=(
            Segment(parent=None, role="prompt", token_ids=tokens(3)),
            model(0, [5.0]),
            tool(1, 1, "refused", 9.0),
            model(2, [7.0, 9.0], decision(wanted=0, taken=0)),
            model(0, [1.0]),
        ),
        leaves=(
            leaf(3, 0.5, {"reward": 0.5}),
            leaf(4, 0.5, {"reward": 0.5}, "refill"),
        ),
    )
    return tree_metrics([forked, plain], entropy_probe_tokens=2)


def test_rewards_and_shares_are_means_over_leaves(metrics) -> None:
    assert metrics["reward_mean"] == pytest.approx(0.275)  # (1.1 - 1 + .5 + .5) / 4
    # sqrt((.825² + 1.275² + .225² + .225²) / 4)
    assert metrics["reward_std"] == pytest.approx(0.7758, abs=1e-4)
    # Without a part "accuracy" it is the reward: (1 + 0 + .5 + .5) / 4.
    assert metrics["accuracy"] == pytest.approx(0.5)
    assert metrics["format_error_share"] == 0.25
    assert metrics["truncated_share"] == 0.25
    assert metrics["degenerate_group_share"] == 0.5
    assert metrics["branches_per_tree"] == 0.5
    assert metrics["refills_per_tree"] == 0.5


def test_decisions_count_as_the_rule_wanted_not_as_the_budget_granted(metrics) -> None:
    assert metrics["num_branch_decisions"] == 3
    assert metrics["branch_wanted_share"] == pytest.approx(2 / 3)


def test_trajectories_count_shared_calls_each_and_totals_once(metrics) -> None:
    # A 1, B 2, the refused call 0, none 0: 3 / 4.
    assert metrics["tool_calls_per_trajectory"] == 0.75
    assert metrics["num_tool_calls"] == 2
    assert metrics["tool_failure_share"] == 0.5
    assert metrics["tool_error_share"] == 0
    assert metrics["tool_latency_s"] == pytest.approx(1.0)  # (.5 + 1.5) / 2


def test_tokens_are_counted_once_a_tree_and_once_a_path(metrics) -> None:
    assert metrics["num_tokens_sampled"] == 12  # 2 + 3 + 1 + 2 and 1 + 2 + 1
    assert metrics["tokens_unique"] == 25  # 17 and 8
    # A 3+2+4+3 = 12, B 3+2+4+1+2+2 = 14, 3+1+1+2 = 7, 3+1 = 4.
    assert metrics["tokens_paths"] == 37
    assert metrics["response_tokens"] == 6.25  # (9 + 11 + 4 + 1) / 4
    assert metrics["episode_len_mean"] == 2.0  # turns: 2, 3, 2, 1


def test_entropies_right_after_a_tool_are_told_apart(metrics) -> None:
    # First 2 tokens after a result: 4 6, 2, 0 1, 7 9.
    assert metrics["entropy_after_tool"] == pytest.approx(29 / 7)
    # The rest: 1 3, 8, 5, 1.
    assert metrics["entropy_elsewhere"] == pytest.approx(18 / 5)


def test_what_has_nothing_to_average_is_left_out() -> None:
    silent = RolloutTree(
        task=TASK,
        segments=(
            Segment(parent=None, role="prompt", token_ids=tokens(1)),
            model(0, []),
        ),
        leaves=(leaf(1, 0.0, {}),),
    )
    values = tree_metrics([silent], entropy_probe_tokens=2)
    assert not SOMETIMES & values.keys()
    assert values["num_tool_calls"] == values["num_branch_decisions"] == 0
    refuse_outage(values, 0.0)
    assert all(np.isfinite(value) for value in values.values())
