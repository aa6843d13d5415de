"""A learner that dies: a clear error in time, and Tune goes on from a checkpoint."""

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import tune

from rllib_arpo import ARPOConfig
from rllib_arpo.errors import LearnerError
from rllib_arpo.learner.torch_learner import ARPOTorchLearner
from tests.tiny_runs import arpo_config, learner_weights, running, same

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.usefixtures("ray_session"),
]

# Far less than the half hour that a collective waits for a peer that is only slow.
LIMIT_S = 120


class MortalLearner(ARPOTorchLearner):
    """Dies inside an update while the file `trap` is there; the first to see it."""

    def compute_token_losses(
        self, batch: Mapping[str, Any], fwd_out: Mapping[str, Any]
    ) -> Any:
        try:
            os.remove(self.config.learner_config_dict["trap"])
        except FileNotFoundError:
            return super().compute_token_losses(batch, fwd_out)
        os._exit(1)


def config_of(model: str, trap: Path, *, num_learners: int) -> ARPOConfig:
    return (
        arpo_config(model)
        .training(
            learner_class=MortalLearner,
            learner_config_dict={"trap": str(trap)},
            train_batch_size_per_learner=2,
            minibatch_size=1,
        )
        .learners(num_learners=num_learners, num_cpus_per_learner=1)
    )


def test_a_learner_that_dies_ends_training_in_time_and_says_how_to_go_on(
    almanac_model, tmp_path
) -> None:
    trap = tmp_path / "trap"
    config = config_of(almanac_model, trap, num_learners=2)
    with running(config) as algorithm:
        algorithm.train()
        folder = algorithm.save_to_path(tmp_path / "checkpoint")
        weights = learner_weights(algorithm)
        trap.touch()
        start = time.monotonic()
        # The other learner waits for it in a collective.
        with pytest.raises(LearnerError, match=r"Learner \d of 2 died: .*--resume"):
            algorithm.train()
        assert not trap.exists()
        # A group that lacks a learner takes no further step.
        with pytest.raises(LearnerError, match=r"Learner \d of 2 died"):
            algorithm.train()
        assert time.monotonic() - start < LIMIT_S
    # The checkpoint is whole, and one learner can go on from it.
    with running(config_of(almanac_model, trap, num_learners=0)) as algorithm:
        algorithm.restore_from_path(folder)
        assert same(weights, learner_weights(algorithm))
        assert algorithm.train()["training_iteration"] == 2


@pytest.mark.parametrize(
    ("number", "num_learners", "packing"),
    [(0, 1, "tree"), (0, 2, "tree"), (1, 2, "tree"), (1, 2, "paths")],
)
def test_a_learner_killed_between_updates_is_noticed(
    almanac_model, tmp_path, number, num_learners, packing
) -> None:
    config = config_of(almanac_model, tmp_path / "trap", num_learners=num_learners)
    with running(config.training(packing=packing)) as algorithm:
        ray.kill(algorithm.learner_group._workers[number])
        died = f"Learner {number} of {num_learners} died"
        with pytest.raises(LearnerError, match=died):
            algorithm.train()
        with pytest.raises(LearnerError, match=died):
            algorithm.sync_weights()


def test_tune_goes_on_from_the_last_checkpoint_when_a_learner_dies(
    almanac_model, tmp_path
) -> None:
    trap = tmp_path / "trap"

    class SetTrap(tune.Callback):
        """Notes all iterations; after the second, once, sets the trap."""

        def __init__(self) -> None:
            self.iterations: list[int] = []

        def on_trial_result(self, iteration, trials, trial, result, **info) -> None:
            self.iterations.append(result["training_iteration"])
            if self.iterations == [1, 2]:
                trap.touch()

    noted = SetTrap()
    results = tune.Tuner(
        "ARPO",
        param_space=config_of(almanac_model, trap, num_learners=1),
        run_config=tune.RunConfig(
            stop={"training_iteration": 4},
            storage_path=str(tmp_path / "storage"),
            failure_config=tune.FailureConfig(max_failures=2),
            checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=1),
            callbacks=[noted],
            verbose=0,
        ),
    ).fit()
    assert not trap.exists()
    assert not results.errors
    assert results[0].metrics["training_iteration"] == 4
    # It died after the second, and no iteration was done twice.
    assert noted.iterations == [1, 2, 3, 4]
    assert results[0].metrics["iterations_since_restore"] < 4
    steps = results[0].metrics["learners"]["default_policy"]["num_optimizer_steps"]
    # 2 trees, 1 a step: no step is lost, none is counted twice.
    assert steps == 8
