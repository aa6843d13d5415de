"""ARPO (arXiv:2507.19849): trees that branch where entropy rises after a tool.

python tuned_examples/almanac_arpo.py --as-test
"""

from almanac_base import almanac_config, run

config = (
    almanac_config()
    .tree_rollout(
        group_size=16,
        num_initial_rollouts=8,
        branch_rule="bernoulli",
        branch_base=0.5,
        branch_entropy_weight=0.2,
        entropy_probe_tokens=8,
    )
    .training(advantage_attribution="soft")
)

if __name__ == "__main__":
    run(config)
