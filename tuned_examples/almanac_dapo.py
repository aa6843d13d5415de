"""DAPO (arXiv:2503.14476): clip-higher, dynamic sampling, token mean, overlong shaping.

python tuned_examples/almanac_dapo.py --as-test
"""

from almanac_base import almanac_config, run

from rllib_arpo.rewards.reward import PaperReward

MAX_RESPONSE_TOKENS = 192

config = (
    almanac_config()
    .environment(
        env_config={
            "max_response_tokens": MAX_RESPONSE_TOKENS,
            "reward_fn": PaperReward(overlong_buffer_tokens=MAX_RESPONSE_TOKENS // 4),
        }
    )
    .tree_rollout(group_size=16, branch_rule="never")
    .training(
        clip_param=0.2,
        clip_param_high=0.28,
        dynamic_sampling=True,
        loss_aggregation="token_mean",
        kl_coeff=0.0,
    )
)

if __name__ == "__main__":
    run(config)
