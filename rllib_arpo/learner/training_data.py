"""Training data that RLlib may hand to learners without cutting it.

RLlib shards episodes by cutting them into pieces of equal length and counts
minibatches in turns. Here a tree stays whole: its advantages need all its leaves.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from ray.rllib.core.learner.training_data import TrainingData

from rllib_arpo.learner.advantages import sample_std
from rllib_arpo.learner.packing import RowCost, path_lengths, plan_rows
from rllib_arpo.tree import RolloutTree


@dataclass
class TreeTrainingData(TrainingData):
    """Whole rollout trees in `episodes` (or `episodes_refs`).

    Attributes:
        reward_mean: mean reward over all leaves of the whole batch; filled in from
            `episodes` when None. A shard keeps the batch's.
        reward_std: sample standard deviation over the same leaves.
        row_cost: of a tree's rows, by which trees are spread over learners; the
            LearnerGroup fills it in. None counts the tokens of all paths.
    """

    reward_mean: float | None = None
    reward_std: float | None = None
    row_cost: RowCost | None = None

    def __post_init__(self) -> None:
        if self.episodes is not None and self.reward_mean is None:
            rewards = [leaf.reward for tree in self.trees for leaf in tree.leaves]
            values = np.array(rewards, np.float64)
            self.reward_mean = float(values.mean()) if len(values) else 0.0
            self.reward_std = sample_std(values)

    @property
    def trees(self) -> list[RolloutTree]:
        """The trees in `episodes`; RLlib knows its own episode types only."""
        return cast(list[RolloutTree], self.episodes or [])

    def solve_refs(self) -> None:
        """Fetch `episodes_refs`."""
        super().solve_refs()
        self.__post_init__()

    def shard(
        self, num_shards: int, len_lookback_buffer: int | None = None, **kwargs: Any
    ) -> list[tuple[TrainingData, dict[str, Any]]]:
        """One part per learner, of whole trees; a part may be empty.

        Args:
            num_shards: number of learners.
            len_lookback_buffer: unused, trees have none.
            kwargs: unused; learners agree on the number of steps themselves.
        """
        self.solve_refs()
        return [
            (
                TreeTrainingData(
                    episodes=cast(list, [self.trees[i] for i in part]),
                    reward_mean=self.reward_mean,
                    reward_std=self.reward_std,
                ),
                {},
            )
            for part in balance(
                [tree_cost(tree, self.row_cost) for tree in self.trees], num_shards
            )
        ]


def row_tokens(tree: RolloutTree) -> int:
    """Tokens that the tree costs when each trajectory is a row of its own."""
    lengths = path_lengths(tree)
    return sum(lengths[leaf.segment] for leaf in tree.leaves)


def tree_cost(tree: RolloutTree, cost: RowCost | None) -> float:
    """What a learner pays for a tree: Σ T + attention·T² over its rows of T tokens.

    Args:
        tree: any.
        cost: of the rows that it is packed into; None if each path is one.
    """
    if cost is None:
        return row_tokens(tree)
    lengths = [
        sum(len(tree.segments[index].token_ids) for index in row)
        for row in plan_rows(tree, cost)
    ]
    return sum(length + cost.attention * length**2 for length in lengths)


def balance(costs: Sequence[float], num_parts: int) -> list[list[int]]:
    """Spread items over parts: equal counts first, then equal cost.

    Longest processing time first: the costliest item left goes to the cheapest part
    that still has room, where room is ⌈items / parts⌉ items.

    Returns:
        `num_parts` lists of indices in ascending order, each index once.
    """
    room = math.ceil(len(costs) / num_parts)
    parts: list[list[int]] = [[] for _ in range(num_parts)]
    loads = [0.0] * num_parts
    for item in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        open_parts = [p for p in range(num_parts) if len(parts[p]) < room]
        part = min(open_parts, key=lambda p: (loads[p], p))
        parts[part].append(item)
        loads[part] += costs[item]
    return [sorted(part) for part in parts]


def as_tree_data(
    training_data: TrainingData | None,
    episodes: list[Any] | None = None,
    episodes_refs: list[Any] | None = None,
) -> TreeTrainingData:
    """Whatever form RLlib hands trees over in, as fetched `TreeTrainingData`."""
    if isinstance(training_data, TreeTrainingData):
        data = training_data
    elif training_data is not None:
        data = TreeTrainingData(
            episodes=training_data.episodes, episodes_refs=training_data.episodes_refs
        )
    else:
        data = TreeTrainingData(episodes=episodes, episodes_refs=episodes_refs)
    data.validate()
    data.solve_refs()
    return data
