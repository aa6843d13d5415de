"""Advantages on groups and trees, against numbers worked out by hand."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from rllib_arpo.learner.advantages import (
    attribute,
    batch_advantages,
    group_advantages,
    hard_attribution,
    soft_attribution,
)
from tests.learner.helpers import forked_tree, random_tree

REWARDS = st.lists(
    st.floats(min_value=-1, max_value=2, width=32), min_size=1, max_size=16
)


def test_group_advantages_subtract_the_mean() -> None:
    # rewards 1,0,0,0: mean .25 -> .75,-.25,-.25,-.25
    advantages = group_advantages(np.array([1.0, 0, 0, 0]), normalize_by_std=False)
    np.testing.assert_allclose(advantages, [0.75, -0.25, -0.25, -0.25])


def test_group_advantages_divide_by_the_sample_std() -> None:
    # squares .5625 + 3 * .0625 = .75, / 3 = .25, std .5 -> 1.5,-.5,-.5,-.5
    advantages = group_advantages(np.array([1.0, 0, 0, 0]), normalize_by_std=True)
    np.testing.assert_allclose(advantages, [1.5, -0.5, -0.5, -0.5], rtol=1e-5)


def test_equal_rewards_give_zeros() -> None:
    # The mean of three times 0.1 is not exactly 0.1 in floating point.
    advantages = group_advantages(np.full(3, 0.1), normalize_by_std=True)
    assert advantages.tolist() == [0, 0, 0]


def test_a_single_leaf_gets_zero() -> None:
    assert group_advantages(np.array([1.0]), normalize_by_std=True).tolist() == [0]


def test_a_nan_reward_is_not_hidden() -> None:
    advantages = group_advantages(np.array([1.0, np.nan]), normalize_by_std=True)
    assert np.isnan(advantages).all()


def test_batch_advantages_use_the_statistics_of_the_batch() -> None:
    # (1 - .5) / .25 = 2, (0 - .5) / .25 = -2, even though the group's mean is 2/3
    advantages = batch_advantages(
        np.array([1.0, 1, 0]), mean=0.5, std=0.25, normalize_by_std=True
    )
    np.testing.assert_allclose(advantages, [2, 2, -2], rtol=1e-5)


@given(REWARDS, st.booleans())
def test_advantages_of_a_group_add_up_to_zero(rewards: list[float], std: bool) -> None:
    advantages = group_advantages(np.array(rewards), normalize_by_std=std)
    # A spread far below the 1e-6 under the fraction line leaves rounding only.
    assert abs(advantages.sum(dtype=np.float64)) < 1e-5


def test_soft_attribution_gives_each_path_its_own_advantage() -> None:
    table = soft_attribution(forked_tree(), np.array([0.5, -2.0], np.float32))
    assert table.tolist() == [[0.5] * 5, [-2.0] * 5]


def test_hard_attribution_gives_shared_segments_the_mean() -> None:
    # Segments 0, 1, 2 are shared: (.5 - 2) / 2 = -.75; 3 and 4 belong to one leaf.
    table = hard_attribution(forked_tree(), np.array([0.5, -2.0], np.float32))
    assert table.tolist() == [[-0.75, -0.75, -0.75, 0.5, -2.0]] * 2


@given(st.integers(0, 1000))
def test_hard_and_soft_put_equal_sums_on_every_segment(seed: int) -> None:
    tree = random_tree(seed)
    sums = []
    for attribution in ("soft", "hard"):
        (table,) = attribute(
            [tree],
            attribution=attribution,
            normalization="group",
            normalize_by_std=True,
            batch_mean=0.0,
            batch_std=0.0,
        )
        total = np.zeros(len(tree.segments))
        for number, leaf in enumerate(tree.leaves):
            index: int | None = leaf.segment
            while index is not None:
                total[index] += table[number, index]
                index = tree.segments[index].parent
        sums.append(total)
    np.testing.assert_allclose(sums[0], sums[1], atol=1e-5)
