"""Connector pieces between rollout trees and the learner's rows.

    trees ─► [your pieces] ─► AttributeAdvantages ─► PackTrees ─► flat columns

A piece of your own goes in front (`config.learners(learner_connector=...)`, it may
replace trees in `episodes` in place), or anywhere else by building the pipeline
yourself. Columns [N] that it adds to the packed batch reach
`ARPOTorchLearner.compute_token_losses` padded to [B, T].
"""

from typing import TYPE_CHECKING, Any, cast

import gymnasium as gym
import numpy as np
from ray.rllib.connectors.connector_v2 import ConnectorV2
from ray.rllib.connectors.learner import LearnerConnectorPipeline
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.utils.metrics.metrics_logger import MetricsLogger

from rllib_arpo.learner import packing
from rllib_arpo.learner.advantages import Attribution, Normalization, attribute
from rllib_arpo.learner.losses import Aggregation
from rllib_arpo.learner.packing import Packing

if TYPE_CHECKING:
    from ray.rllib.algorithms.algorithm_config import AlgorithmConfig

    from rllib_arpo.learner.settings import LearnerSettings

ADVANTAGES_OF_TREES = "advantages_of_trees"
REWARD_MEAN = "reward_mean"
REWARD_STD = "reward_std"
ROW_COST = "row_cost"


class AttributeAdvantages(ConnectorV2):
    """Writes what each path puts on each of its segments.

    `shared_data["advantages_of_trees"]` becomes a list with one
    [num_leaves, num_segments] array per tree. "batch" normalisation reads
    `shared_data["reward_mean"]` and `["reward_std"]`, which the learner fills in.
    """

    def __init__(
        self,
        input_observation_space: gym.Space | None = None,
        input_action_space: gym.Space | None = None,
        *,
        attribution: Attribution = "soft",
        normalization: Normalization = "group",
        normalize_by_std: bool = True,
    ) -> None:
        super().__init__(input_observation_space, input_action_space)
        self.attribution: Attribution = attribution
        self.normalization: Normalization = normalization
        self.normalize_by_std = normalize_by_std

    def __call__(
        self,
        *,
        batch: dict[str, Any],
        episodes: list,
        shared_data: dict | None = None,
        metrics: MetricsLogger | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Fill `shared_data`; the batch is passed on as it is."""
        shared = {} if shared_data is None else shared_data
        advantages = attribute(
            episodes,
            attribution=self.attribution,
            normalization=self.normalization,
            normalize_by_std=self.normalize_by_std,
            batch_mean=shared.get(REWARD_MEAN, 0.0),
            batch_std=shared.get(REWARD_STD, 0.0),
        )
        shared[ADVANTAGES_OF_TREES] = advantages
        if metrics is not None:
            self._log(episodes, advantages, metrics)
        return batch

    def _log(self, trees: list, advantages: list, metrics: MetricsLogger) -> None:
        at_leaves = np.concatenate(
            [
                a[np.arange(len(a)), [leaf.segment for leaf in tree.leaves]]
                for tree, a in zip(trees, advantages, strict=True)
            ]
        )
        equal = [np.ptp(tree.rewards) == 0 for tree in trees]
        values = {
            "advantage_mean": at_leaves.mean(),
            "advantage_std": at_leaves.std(),
            "advantage_max": at_leaves.max(),
            "advantage_min": at_leaves.min(),
            "equal_reward_groups": np.mean(equal),
        }
        for name, value in values.items():
            metrics.log_value((DEFAULT_MODULE_ID, name), float(value), window=1)


class PackTrees(ConnectorV2):
    """Writes the rows of all trees as flat columns (see `packing`).

    `shared_data["row_cost"]`, which the learner fills in, says where trees are cut.
    """

    def __init__(
        self,
        input_observation_space: gym.Space | None = None,
        input_action_space: gym.Space | None = None,
        *,
        layout: Packing = "tree",
        aggregation: Aggregation = "token_mean",
    ) -> None:
        super().__init__(input_observation_space, input_action_space)
        self.layout: Packing = layout
        self.aggregation: Aggregation = aggregation

    def __call__(
        self,
        *,
        batch: dict[str, Any],
        episodes: list,
        shared_data: dict | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Return `batch` with the columns under the default module's id."""
        shared = shared_data or {}
        advantages = shared.get(ADVANTAGES_OF_TREES)
        if self.layout == "tree":
            columns = packing.pack_trees(
                episodes,
                advantages,
                aggregation=self.aggregation,
                cost=shared.get(ROW_COST, packing.NO_CUTS),
            )
        else:
            columns = packing.pack_paths(
                episodes, advantages, aggregation=self.aggregation
            )
        batch[DEFAULT_MODULE_ID] = {**batch.get(DEFAULT_MODULE_ID, {}), **columns}
        return batch


def build_learner_pipeline(
    config: "AlgorithmConfig",
    input_observation_space: gym.Space | None,
    input_action_space: gym.Space | None,
    *,
    with_advantages: bool = True,
) -> LearnerConnectorPipeline:
    """The pipeline for `AlgorithmConfig.build_learner_connector`.

    Args:
        config: its `learner_connector`'s pieces go first; reads
            advantage_attribution, advantage_normalization, normalize_by_std, packing,
            loss_aggregation.
        input_observation_space: passed on to the pieces.
        input_action_space: passed on to the pieces.
        with_advantages: False for supervised training.
    """
    spaces: Any = (input_observation_space, input_action_space)
    pieces: list[ConnectorV2] = []
    if config._learner_connector is not None:
        made = config._learner_connector(*spaces)
        pieces.extend([made] if isinstance(made, ConnectorV2) else made)
    settings = cast("LearnerSettings", config)
    if with_advantages:
        pieces.append(
            AttributeAdvantages(
                *spaces,
                attribution=settings.advantage_attribution,
                normalization=settings.advantage_normalization,
                normalize_by_std=settings.normalize_by_std,
            )
        )
    pieces.append(
        PackTrees(
            *spaces,
            layout=settings.packing,
            aggregation=settings.loss_aggregation,
        )
    )
    return LearnerConnectorPipeline(
        input_observation_space=input_observation_space,
        input_action_space=input_action_space,
        connectors=pieces,
    )
