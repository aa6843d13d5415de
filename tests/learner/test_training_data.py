"""Trees are handed to learners whole."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rllib_arpo.learner.packing import RowCost
from rllib_arpo.learner.training_data import (
    TreeTrainingData,
    as_tree_data,
    balance,
    row_tokens,
    tree_cost,
)
from rllib_arpo.tree import RolloutTree
from tests.learner.helpers import TASK, forked_tree, leaf, random_tree, segment


def test_a_tree_costs_the_tokens_of_all_its_rows() -> None:
    # 2 + 3 + 2 shared, then 1 and 2: 8 + 9
    assert row_tokens(forked_tree()) == 17


def test_a_packed_tree_costs_its_rows_and_their_attention() -> None:
    # One row of 10 tokens: 10 + .1·100
    whole = RowCost(attention=0.1, max_tokens=100)
    assert tree_cost(forked_tree(), whole) == 20
    # Two rows of 8 and 9: 17 + .1·(64 + 81)
    assert tree_cost(forked_tree(), RowCost(0.1, 9)) == pytest.approx(31.5)
    assert tree_cost(forked_tree(), None) == 17


def test_trees_are_spread_by_the_cost_of_their_rows() -> None:
    # 12 leaves of one token share a prompt of 40: 492 as paths, 52 packed.
    shared = RolloutTree(
        task=TASK,
        segments=(
            segment(None, "prompt", [1] * 40),
            *(segment(0, "model", [2]) for _ in range(12)),
        ),
        leaves=tuple(leaf(1 + i, 1.0) for i in range(12)),
    )
    alone = [
        RolloutTree(
            task=TASK,
            segments=(segment(None, "prompt", [1]), segment(0, "model", [2] * length)),
            leaves=(leaf(1, 1.0),),
        )
        for length in (99, 59)
    ]

    def lengths(cost: RowCost | None) -> list[list[int]]:
        data = TreeTrainingData(episodes=[shared, *alone], row_cost=cost)
        return [[t.num_tokens for t in part.episodes] for part, _ in data.shard(2)]

    assert lengths(None) == [[52], [100, 60]]  # 492 | 160
    assert lengths(RowCost(0.0, 1000)) == [[100], [52, 60]]


def test_the_costliest_items_go_apart() -> None:
    # 9 -> part 0, 8 -> part 1, 2 -> part 1 (8 < 9), 1 -> part 0, the only one with room
    assert balance([1, 9, 2, 8], 2) == [[0, 1], [2, 3]]


@given(st.lists(st.integers(0, 1000), max_size=20), st.integers(1, 6))
def test_items_are_spread_evenly_and_once(costs: list[int], num_parts: int) -> None:
    parts = balance(costs, num_parts)
    assert sorted(i for part in parts for i in part) == list(range(len(costs)))
    assert len(parts) == num_parts
    assert max(map(len, parts)) <= -(-len(costs) // num_parts)


def test_shards_hold_whole_trees_and_the_statistics_of_the_batch() -> None:
    trees = [random_tree(seed) for seed in range(5)]
    rewards = np.concatenate([tree.rewards for tree in trees])
    shards = [data for data, _ in TreeTrainingData(episodes=trees).shard(2)]
    held = [tree for shard in shards for tree in shard.episodes]
    assert sorted(map(id, held)) == sorted(map(id, trees))
    for shard in shards:
        np.testing.assert_allclose(shard.reward_mean, rewards.mean(), rtol=1e-6)
        np.testing.assert_allclose(shard.reward_std, rewards.std(ddof=1), rtol=1e-6)


def test_there_may_be_more_learners_than_trees() -> None:
    shards = TreeTrainingData(episodes=[forked_tree()]).shard(3)
    assert sorted(len(shard.episodes) for shard, _ in shards) == [0, 0, 1]
    for shard, _ in shards:
        shard.validate()


def test_statistics_survive_the_way_to_a_learner() -> None:
    shard = TreeTrainingData(episodes=[], reward_mean=0.25, reward_std=0.5)
    assert as_tree_data(shard).reward_mean == 0.25
    assert as_tree_data(None, episodes=[forked_tree()]).reward_mean == 0.5
