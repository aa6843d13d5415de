"""Two learners in Ray actors, and one learner that takes the same steps."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from ray.rllib.core import COMPONENT_LEARNER, COMPONENT_RL_MODULE, DEFAULT_MODULE_ID

from rllib_arpo.learner import microbatches
from rllib_arpo.learner.torch_learner import ARPOTorchLearner
from rllib_arpo.learner.training_data import TreeTrainingData
from rllib_arpo.learner_group import ARPOLearnerGroup
from rllib_arpo.tree import RolloutTree
from tests.learner.helpers import (
    LearnerConfig,
    learner_config,
    multi_module_spec,
    results,
)


class LearnerPair:
    """The two actors. Tests remake what they hold: starting them takes longest."""

    def __init__(self, model: str) -> None:
        config = pair_config("ddp")
        spec = multi_module_spec(config, model)
        self.group = ARPOLearnerGroup(config=config, module_spec=spec)

    def build(
        self, model: str, strategy: str, *, model_config: Any = None, **settings: Any
    ) -> ARPOLearnerGroup:
        """The group as it would be if it had been started with these settings."""
        config = pair_config(strategy, **settings)
        spec = multi_module_spec(config, model, **(model_config or {}))

        def make(learner: Any) -> None:
            learner.__init__(config=config, module_spec=spec)
            learner.build()

        self.group.config = config
        on_both(self.group, make)
        return self.group


def pair_config(strategy: str, **settings: Any) -> LearnerConfig:
    config = learner_config(learner_strategy=strategy, **settings)
    config.num_learners = 2
    config.num_cpus_per_learner = 1
    return config


def on_both(group: ARPOLearnerGroup, function: Any) -> list[Any]:
    """What both learners answer."""
    return [answer.get() for answer in _ok(group.foreach_learner(function))]


def _ok(answers: Any) -> Iterator[Any]:
    for answer in answers:
        if not answer.ok:
            raise answer.get()
        yield answer


def train(learners: Any, trees: list[RolloutTree]) -> list[dict[str, float]]:
    """One update; the metrics of each learner."""
    reduced = learners.update(training_data=TreeTrainingData(episodes=list(trees)))
    return [results(r) for r in (reduced if isinstance(reduced, list) else [reduced])]


def group_state(group: ARPOLearnerGroup) -> dict[str, Any]:
    return group.get_state()[COMPONENT_LEARNER]


def group_weights(group: ARPOLearnerGroup) -> dict[str, np.ndarray]:
    return group_state(group)[COMPONENT_RL_MODULE][DEFAULT_MODULE_ID]


class PairedLearner(ARPOTorchLearner):
    """One learner whose steps hold the trees that two learners' steps hold."""

    def _minibatches(
        self, columns: Any, *, num_trees: int, num_epochs: int, **settings: Any
    ) -> Iterator[np.ndarray]:
        trees = self.trees_of_update
        shards = [
            [next(i for i, t in enumerate(trees) if t is tree) for tree in data.trees]
            for data, _ in TreeTrainingData(
                episodes=list(trees),
                row_cost=self.row_cost if self.settings.packing == "tree" else None,
            ).shard(2)
        ]
        size = settings["minibatch_size"]
        num_steps = max(-(-len(shard) // size) for shard in shards)
        for epoch in range(num_epochs):
            orders = []
            for shard in shards:
                order = np.arange(len(shard))
                seed = (self.settings.seed or 0, self._weights_seq_no, epoch)
                np.random.default_rng(seed).shuffle(order)
                orders.append(np.array_split(np.array(shard, int)[order], num_steps))
            for parts in zip(*orders, strict=True):
                yield microbatches.rows_of_trees(columns, np.concatenate(parts))

    def _run_connectors(self, data: TreeTrainingData) -> Any:
        self.trees_of_update: Sequence[RolloutTree] = data.trees
        return super()._run_connectors(data)


def paired_learner(
    model: str, *, model_config: Any = None, **settings: Any
) -> PairedLearner:
    config = learner_config(**settings)
    spec = multi_module_spec(config, model, **(model_config or {}))
    learner = PairedLearner(config=config, module_spec=spec)
    learner.build()
    return learner
