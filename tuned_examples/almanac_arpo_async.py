"""ARPO with an EnvRunner that goes on sampling while the learner updates.

python tuned_examples/almanac_arpo_async.py --as-test
"""

from almanac_base import almanac_config, run

config = (
    almanac_config()
    .tree_rollout(group_size=16, num_initial_rollouts=8, branch_rule="bernoulli")
    # The runner samples in a process of its own, the driver learns.
    .env_runners(num_env_runners=1)
    .training(
        asynchronous=True,
        # A tree is trained on at most two updates after its first token.
        max_policy_lag=2,
        # Corrects for tokens that older weights have sampled.
        old_logprobs="recompute",
        tis_cap=2.0,
    )
    # Which tree meets which weights depends on timing.
    .debugging(deterministic=False)
)

if __name__ == "__main__":
    run(config)
