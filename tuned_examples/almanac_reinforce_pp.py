"""REINFORCE++ (arXiv:2501.03262): advantages normalised over the batch, and a KL term.

python tuned_examples/almanac_reinforce_pp.py --as-test
"""

from almanac_base import almanac_config, run

config = (
    almanac_config()
    .tree_rollout(group_size=16, branch_rule="never")
    .training(
        clip_param=0.2,
        clip_param_high=None,
        advantage_normalization="batch",
        kl_coeff=0.001,
    )
)

if __name__ == "__main__":
    run(config)
