"""ASHA over what matters most: learning rate, branching, group split, attribution.

rllib-arpo tune tuned_examples/tune_arpo.py --out runs/sweep

A few minutes on two cores: most trials end after 5 iterations.
"""

from typing import Any

from almanac_base import almanac_config
from ray import tune
from ray.tune.schedulers import ASHAScheduler

NUM_TRIALS = 12
NUM_ITERATIONS = 20


def make_tuner(storage_path: str) -> tune.Tuner:
    """The sweep; two trials at a time, each on one core."""
    weight: Any = tune.choice([0.0, 0.2, 0.5, 1.0])
    num_initial: Any = tune.choice([4, 8, 12])
    attribution: Any = tune.choice(["soft", "hard"])
    # Tune draws a value for each trial wherever a domain stands.
    config: Any = (
        almanac_config()
        .tree_rollout(
            branch_rule="bernoulli",
            branch_entropy_weight=weight,
            num_initial_rollouts=num_initial,
        )
        .training(
            lr=tune.loguniform(3e-4, 1e-2),
            advantage_attribution=attribution,
        )
        .env_runners(num_env_runners=0)
        .learners(num_learners=0)
    )
    return tune.Tuner(
        "ARPO",
        param_space=config,
        tune_config=tune.TuneConfig(
            metric="env_runners/accuracy",
            mode="max",
            num_samples=NUM_TRIALS,
            max_concurrent_trials=2,
            scheduler=ASHAScheduler(grace_period=5, max_t=NUM_ITERATIONS),
        ),
        run_config=tune.RunConfig(
            name="sweep",
            storage_path=storage_path,
            stop={"training_iteration": NUM_ITERATIONS},
            checkpoint_config=tune.CheckpointConfig(
                checkpoint_frequency=5, num_to_keep=1
            ),
        ),
    )
