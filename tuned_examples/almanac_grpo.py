"""GRPO (arXiv:2402.03300): independent rollouts, advantages within each group.

python tuned_examples/almanac_grpo.py --as-test
"""

from almanac_base import almanac_config, run

config = (
    almanac_config()
    .tree_rollout(group_size=16, branch_rule="never")
    .training(
        clip_param=0.2,
        clip_param_high=None,
        advantage_normalization="group",
        normalize_by_std=True,
        loss_aggregation="sequence_mean",
        kl_coeff=0.001,
    )
)

if __name__ == "__main__":
    run(config)
