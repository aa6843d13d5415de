"""Population based training: bad trials copy good ones and vary their settings.

Every 6 iterations of its own a trial of the worse half takes weights and settings of
one of the better half, and multiplies the settings or draws them anew. All trials train
at once, two on a core. A few minutes on two cores.

rllib-arpo tune tuned_examples/tune_arpo_pbt.py --out runs/population
"""

from typing import Any

from almanac_base import almanac_config
from ray import tune
from ray.tune.schedulers import PopulationBasedTraining

POPULATION = 4
NUM_ITERATIONS = 30
INTERVAL = 6


def make_tuner(storage_path: str) -> tune.Tuner:
    """The population."""
    lr = tune.loguniform(3e-4, 1e-2)
    weight: Any = tune.uniform(0.0, 1.0)
    main_cpus: Any = 0.5
    # Tune draws a value for each trial wherever a domain stands.
    config: Any = (
        almanac_config()
        .tree_rollout(branch_rule="bernoulli", branch_entropy_weight=weight)
        .training(lr=lr)
        .env_runners(num_env_runners=0)
        .learners(num_learners=0, num_cpus_per_learner=0.5)
        # A trial that waits for a core cannot be copied.
        .resources(num_cpus_for_main_process=main_cpus)
    )
    return tune.Tuner(
        "ARPO",
        param_space=config,
        tune_config=tune.TuneConfig(
            metric="env_runners/accuracy",
            mode="max",
            num_samples=POPULATION,
            scheduler=PopulationBasedTraining(
                time_attr="training_iteration",
                perturbation_interval=INTERVAL,
                quantile_fraction=0.5,
                hyperparam_mutations={"lr": lr, "branch_entropy_weight": weight},
            ),
        ),
        run_config=tune.RunConfig(
            name="sweep",
            storage_path=storage_path,
            stop={"training_iteration": NUM_ITERATIONS},
            checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=INTERVAL),
        ),
    )
