"""Two learners on gloo train as one does."""

import numpy as np
import pytest
from ray.rllib.core import COMPONENT_LEARNER, COMPONENT_RL_MODULE, DEFAULT_MODULE_ID
from ray.rllib.core.learner.learner_group import LearnerGroup

from rllib_arpo.learner.training_data import TreeTrainingData
from tests.learner.helpers import (
    build_learner,
    forked_tree,
    learner_config,
    multi_module_spec,
    random_tree,
    results,
    weights,
)
from tests.models import save_tiny_model

SETTINGS = {
    "minibatch_size": 3,
    "kl_coeff": 0.1,
    "loss_aggregation": "sequence_mean",
    "advantage_normalization": "batch",
    "max_tokens_per_microbatch": 40,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def group(model, ray_session):
    config = learner_config(**SETTINGS)
    config.num_learners = 2
    config.num_cpus_per_learner = 1
    learners = LearnerGroup(config=config, module_spec=multi_module_spec(config, model))
    yield learners
    learners.shutdown()


def test_two_learners_equal_one_on_the_same_trees(model, group) -> None:
    one = build_learner(model, **{**SETTINGS, "minibatch_size": 6})
    batches = [
        [random_tree(seed) for seed in range(6)],
        [random_tree(9)],  # fewer trees than learners
        [forked_tree(rewards=(float("nan"), 1.0)), random_tree(1)],  # skipped by both
        [random_tree(seed) for seed in range(4)],
    ]
    for trees in batches:
        local = results(one.update(training_data=TreeTrainingData(episodes=trees)))
        for reduced in group.update(training_data=TreeTrainingData(episodes=trees)):
            remote = results(reduced)
            for name in ("num_optimizer_steps", "num_skipped_steps"):
                assert remote[name] == local[name]
            for name in ("total_loss", "grad_norm", "entropy", "num_tokens_trained"):
                if name in local:
                    assert remote[name] == pytest.approx(
                        local[name], rel=1e-4, nan_ok=True
                    )
    assert local["num_optimizer_steps"] == 3 and local["num_skipped_steps"] == 1
    states = group.foreach_learner(lambda learner: learner.get_state())
    first, second = (
        result.get()[COMPONENT_RL_MODULE][DEFAULT_MODULE_ID] for result in states
    )
    for name, array in weights(one).items():
        assert first[name].tobytes() == second[name].tobytes()
        np.testing.assert_allclose(first[name], array, atol=1e-5, err_msg=name)


def test_a_group_is_restored_to_the_bit(model, group) -> None:
    trees = [random_tree(seed) for seed in range(4)]
    state = group.get_state()
    group.update(training_data=TreeTrainingData(episodes=trees))
    expected = group.get_state()
    group.set_state(state)
    group.update(training_data=TreeTrainingData(episodes=trees))
    restored = group.get_state()

    def arrays(group_state):
        return group_state[COMPONENT_LEARNER][COMPONENT_RL_MODULE][DEFAULT_MODULE_ID]

    for name, array in arrays(expected).items():
        assert array.tobytes() == arrays(restored)[name].tobytes()
