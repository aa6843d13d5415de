"""Advantages: from the rewards of leaves to the segments of a tree.

1. `group_advantages` and `batch_advantages` turn rewards into one number per leaf.
2. `soft_attribution` and `hard_attribution` say what each segment of each path gets.

A group whose rewards are all equal teaches nothing and gets zeros, never NaN. A NaN
reward stays NaN, so that the learner's finite check sees it and skips the step.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from rllib_arpo.tree import RolloutTree, leaves_below

Attribution = Literal["soft", "hard"]
Normalization = Literal["group", "batch"]

STD_EPSILON = 1e-6


def group_advantages(rewards: np.ndarray, *, normalize_by_std: bool) -> np.ndarray:
    """Advantage of each leaf within the group of its prompt.

        Âᵢ = (rᵢ - mean(r)) / (std(r) + 1e-6)        GRPO, arXiv:2402.03300, eq. 4
        Âᵢ =  rᵢ - mean(r)        without std: Dr. GRPO, arXiv:2503.20783, section 3

    The standard deviation is the sample one (divided by G - 1), as in the code that
    the ARPO paper's results come from.

    Args:
        rewards: [G] rewards of one tree's leaves.
        normalize_by_std: divide by the group's standard deviation.

    Returns:
        [G] float32; zeros when all rewards are equal.
    """
    rewards = rewards.astype(np.float64)
    return _standardize(
        rewards,
        mean=float(rewards.mean()),
        std=sample_std(rewards),
        normalize_by_std=normalize_by_std,
    )


def batch_advantages(
    rewards: np.ndarray, *, mean: float, std: float, normalize_by_std: bool
) -> np.ndarray:
    """Advantage of each leaf within the whole batch.

        Âᵢ = (rᵢ - mean_batch(r)) / (std_batch(r) + 1e-6)
                                                REINFORCE++, arXiv:2501.03262, eq. 9

    Args:
        rewards: [G] rewards of one tree's leaves.
        mean: mean reward over all leaves of the batch, on all learners.
        std: sample standard deviation over the same leaves.
        normalize_by_std: divide by `std`.

    Returns:
        [G] float32; zeros when `std` is 0.
    """
    return _standardize(
        rewards.astype(np.float64),
        mean=mean,
        std=std,
        normalize_by_std=normalize_by_std,
    )


def _standardize(
    rewards: np.ndarray, *, mean: float, std: float, normalize_by_std: bool
) -> np.ndarray:
    if std == 0:
        return np.zeros(len(rewards), np.float32)
    centred = rewards - mean
    if normalize_by_std:
        centred = centred / (std + STD_EPSILON)
    return centred.astype(np.float32)


def sample_std(rewards: np.ndarray) -> float:
    """Standard deviation with G - 1; exactly 0 for equal rewards or a single one."""
    if len(rewards) < 2 or rewards.min() == rewards.max():
        return 0.0
    return float(rewards.std(ddof=1, dtype=np.float64))


def soft_attribution(tree: RolloutTree, leaf_advantages: np.ndarray) -> np.ndarray:
    """Every token of a path gets the advantage of the path's leaf.

        Â(i, s) = Âᵢ                                ARPO, arXiv:2507.19849, section 3.2

    On a token that d paths share, the gradients add up to that of the mean advantage
    times d: the tree structure is felt through the loss, not through the advantages.

    Returns:
        [num_leaves, num_segments] float32.
    """
    shape = (len(tree.leaves), len(tree.segments))
    return np.broadcast_to(leaf_advantages[:, None], shape).astype(np.float32)


def hard_attribution(tree: RolloutTree, leaf_advantages: np.ndarray) -> np.ndarray:
    """A segment gets the mean advantage of the leaves below it.

        Â(s) = (1/d) Σ_{i below s} Âᵢ               ARPO, arXiv:2507.19849, section 3.2

    A segment that only one path holds keeps that path's advantage.

    Returns:
        [num_leaves, num_segments] float32; all rows are equal.
    """
    means = [
        leaf_advantages[below].mean(dtype=np.float64) if below else 0.0
        for below in leaves_below(tree)
    ]
    shape = (len(tree.leaves), len(tree.segments))
    return np.broadcast_to(np.array(means, np.float32), shape)


def attribute(
    trees: Sequence[RolloutTree],
    *,
    attribution: Attribution,
    normalization: Normalization,
    normalize_by_std: bool,
    batch_mean: float,
    batch_std: float,
) -> list[np.ndarray]:
    """Both steps for a list of trees.

    Args:
        trees: whole trees.
        attribution: "soft" or "hard".
        normalization: "group" or "batch".
        normalize_by_std: divide by the standard deviation.
        batch_mean: mean reward of the whole batch, used by "batch".
        batch_std: its sample standard deviation, used by "batch".

    Returns:
        Per tree, [num_leaves, num_segments] float32: the advantage that each path
        puts on each of its segments.
    """
    spread = soft_attribution if attribution == "soft" else hard_attribution
    advantages: list[np.ndarray] = []
    for tree in trees:
        if normalization == "group":
            leaf_advantages = group_advantages(
                tree.rewards, normalize_by_std=normalize_by_std
            )
        else:
            leaf_advantages = batch_advantages(
                tree.rewards,
                mean=batch_mean,
                std=batch_std,
                normalize_by_std=normalize_by_std,
            )
        advantages.append(spread(tree, leaf_advantages))
    return advantages
