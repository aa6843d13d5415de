"""Trees are handed to learners whole."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from rllib_arpo.learner.training_data import (
    TreeTrainingData,
    as_tree_data,
    balance,
    row_tokens,
)
from tests.learner.helpers import forked_tree, random_tree


def test_a_tree_costs_the_tokens_of_all_its_rows() -> None:
    # 2 + 3 + 2 shared, then 1 and 2: 8 + 9
    assert row_tokens(forked_tree()) == 17


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
