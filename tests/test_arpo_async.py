"""Asynchronous training with real EnvRunner actors."""

import pytest

from rllib_arpo import ARPO, RolloutTree
from tests.tiny_runs import arpo_config, learner_weights, running, same, token_ids

pytestmark = pytest.mark.usefixtures("ray_session")


def record_batches(algorithm: ARPO, trees: list[RolloutTree]) -> None:
    """Append to `trees` what each update is made with."""
    update = algorithm._update

    def recording(batch: list[RolloutTree]) -> None:
        trees.extend(batch)
        update(batch)

    algorithm._update = recording


def three_iterations(config):
    """Weights, trees and metrics of three iterations."""
    trees, results = [], []
    with running(config) as algorithm:
        record_batches(algorithm, trees)
        for _ in range(3):
            results.append(algorithm.train())
        return learner_weights(algorithm), trees, results


def test_a_lag_of_zero_is_the_synchronous_algorithm(almanac_model) -> None:
    config = arpo_config(almanac_model).env_runners(num_env_runners=1)
    weights, trees, results = three_iterations(config)
    config = arpo_config(almanac_model).env_runners(num_env_runners=1)
    config.training(asynchronous=True, max_policy_lag=0)
    same_weights, same_trees, same_results = three_iterations(config)
    assert len({tree.seed for tree in trees}) == 12
    assert [tree.seed for tree in trees] == [tree.seed for tree in same_trees]
    assert token_ids(trees) == token_ids(same_trees)
    assert same(weights, same_weights)
    for one, other in zip(results, same_results, strict=True):
        one, other = one["env_runners"], other["env_runners"]
        assert other["num_trees_stale"] == other["policy_lag_max"] == 0
        for name in ("num_episodes", "num_env_steps_sampled_lifetime", "reward_mean"):
            assert one[name] == other[name]
