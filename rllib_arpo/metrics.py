"""Names and formulas of what is measured on trees.

All means are over one iteration's trees, computed where the trees are, so that no
number mixes iterations or forgets a runner.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from ray.rllib.utils.metrics import EPISODE_LEN_MEAN, EPISODE_RETURN_MEAN

from rllib_arpo.errors import ToolOutageError
from rllib_arpo.tree import RolloutTree, Segment, count_tool_calls, path

METRICS_FILE = "metrics.jsonl"
REWARD_MEAN = "reward_mean"
REWARD_STD = "reward_std"
ACCURACY = "accuracy"
FORMAT_ERROR_SHARE = "format_error_share"
TRUNCATED_SHARE = "truncated_share"
TOOL_CALLS_PER_TRAJECTORY = "tool_calls_per_trajectory"
NUM_TOOL_CALLS = "num_tool_calls"
TOOL_FAILURE_SHARE = "tool_failure_share"
TOOL_ERROR_SHARE = "tool_error_share"
TOOL_LATENCY_S = "tool_latency_s"
ENTROPY_AFTER_TOOL = "entropy_after_tool"
ENTROPY_ELSEWHERE = "entropy_elsewhere"
BRANCHES_PER_TREE = "branches_per_tree"
REFILLS_PER_TREE = "refills_per_tree"
NUM_BRANCH_DECISIONS = "num_branch_decisions"
BRANCH_WANTED_SHARE = "branch_wanted_share"
DEGENERATE_GROUP_SHARE = "degenerate_group_share"
RESPONSE_TOKENS = "response_tokens"
NUM_TOKENS_SAMPLED = "num_tokens_sampled"
TOKENS_UNIQUE = "tokens_unique"
TOKENS_PATHS = "tokens_paths"
NUM_TREES_REQUEUED = "num_trees_requeued"
# Of asynchronous training: trees dropped since they were older than the lag; versions
# between the learner and a trained token; jobs with the EnvRunners when a batch was
# full.
NUM_TREES_STALE = "num_trees_stale"
POLICY_LAG_MEAN = "policy_lag_mean"
POLICY_LAG_MAX = "policy_lag_max"
NUM_JOBS_WAITING = "num_jobs_waiting"
NUM_JOBS_GROWING = "num_jobs_growing"
DYNAMIC_SAMPLING_ROUNDS = "dynamic_sampling_rounds"
# Of the engines: sums over an iteration and its EnvRunners, but for the levels,
# which are means over the EnvRunners.
ENGINE_METRICS = "engine"
ENGINE_LEVELS = (
    "num_running",
    "num_waiting",
    "prefix_cache_tokens",
    "entropy_approximated_by_top_k",
)
# Of the learner: means over the trained tokens, in nats.
ENTROPY = "entropy"
SAMPLER_LOGPROB_DIFFERENCE = "sampler_logprob_difference"
PREFIX_CACHE_HIT_RATE = "prefix_cache_hit_rate"
WEIGHT_PROBE_ERROR = "weight_probe_error"
ENGINE_STEP_TIME_S = "step_time_s"
ENGINE_SAMPLE_TIME_S = "sample_time_s"

# Left out where there is nothing to average: no call, no decision, no such token.
SOMETIMES = frozenset(
    {
        TOOL_FAILURE_SHARE,
        TOOL_ERROR_SHARE,
        TOOL_LATENCY_S,
        BRANCH_WANTED_SHARE,
        ENTROPY_AFTER_TOOL,
        ENTROPY_ELSEWHERE,
    }
)
# A share of a handful of calls says nothing about an outage.
MIN_CALLS_FOR_OUTAGE = 20


def tree_metrics(
    trees: Sequence[RolloutTree], *, entropy_probe_tokens: int
) -> dict[str, float]:
    """What an iteration's trees look like.

    Args:
        trees: at least one.
        entropy_probe_tokens: k; entropies of the first k tokens after a tool result
            are told apart from all others (paper, figure 2).

    Returns:
        A flat dict. Entropies are in nats; shares lie in [0, 1]; "per trajectory"
        counts a shared segment once for each leaf below it, totals count it once.
        Those of `SOMETIMES` are left out where there is nothing to average.
    """
    leaves = [(tree, leaf) for tree in trees for leaf in tree.leaves]
    paths = [[tree.segments[i] for i in path(tree, leaf)] for tree, leaf in leaves]
    segments = [segment for tree in trees for segment in tree.segments]
    calls = [s.tool_call for s in segments if s.tool_call is not None]
    decisions = [s.branch for s in segments if s.branch is not None]
    executed = [call for call in calls if call.status != "refused"]
    after, elsewhere = _split_entropies(trees, entropy_probe_tokens)
    rewards = np.array([leaf.reward for _, leaf in leaves])
    model_tokens = [len(s.token_ids) for s in segments if s.role == "model"]
    sometimes = {
        TOOL_FAILURE_SHARE: [c.status in ("unavailable", "timeout") for c in executed],
        TOOL_ERROR_SHARE: [call.status == "error" for call in executed],
        TOOL_LATENCY_S: [call.latency_s for call in executed],
        BRANCH_WANTED_SHARE: [decision.wanted > 0 for decision in decisions],
        ENTROPY_AFTER_TOOL: after,
        ENTROPY_ELSEWHERE: elsewhere,
    }
    return {
        **{name: _mean(values) for name, values in sometimes.items() if values},
        REWARD_MEAN: float(rewards.mean()),
        EPISODE_RETURN_MEAN: float(rewards.mean()),
        REWARD_STD: float(rewards.std()),
        ACCURACY: _mean(
            [leaf.reward_parts.get("accuracy", leaf.reward) for _, leaf in leaves]
        ),
        FORMAT_ERROR_SHARE: _mean(
            [leaf.reward_parts.get("format", 0.0) < 0 for _, leaf in leaves]
        ),
        TRUNCATED_SHARE: _mean([leaf.end == "length" for _, leaf in leaves]),
        EPISODE_LEN_MEAN: _mean([sum(s.role == "model" for s in p) for p in paths]),
        TOOL_CALLS_PER_TRAJECTORY: _mean([count_tool_calls(p) for p in paths]),
        NUM_TOOL_CALLS: float(len(executed)),
        BRANCHES_PER_TREE: sum(leaf.origin == "branch" for _, leaf in leaves)
        / len(trees),
        REFILLS_PER_TREE: sum(leaf.origin == "refill" for _, leaf in leaves)
        / len(trees),
        NUM_BRANCH_DECISIONS: float(len(decisions)),
        DEGENERATE_GROUP_SHARE: _mean([np.ptp(tree.rewards) == 0 for tree in trees]),
        RESPONSE_TOKENS: _mean([sum(len(s.token_ids) for s in p[1:]) for p in paths]),
        NUM_TOKENS_SAMPLED: float(sum(model_tokens)),
        TOKENS_UNIQUE: float(sum(tree.num_tokens for tree in trees)),
        TOKENS_PATHS: float(sum(len(s.token_ids) for p in paths for s in p)),
    }


def refuse_outage(values: Mapping[str, float], max_share: float | None) -> None:
    """Stop when so many tool calls failed that training on them would do harm.

    Args:
        values: of `tree_metrics`.
        max_share: `ARPOConfig.max_tool_failure_share`.

    Raises:
        ToolOutageError: too large a share of the calls failed.
    """
    share, calls = values.get(TOOL_FAILURE_SHARE, 0.0), int(values[NUM_TOOL_CALLS])
    if max_share is not None and calls >= MIN_CALLS_FOR_OUTAGE and share > max_share:
        raise ToolOutageError(
            f"{share:.0%} of {calls} tool calls failed or timed out, more than "
            f"`max_tool_failure_share` ({max_share:.0%}). Training on this would "
            "teach the model that tools do not work. Check the tools' servers "
            "and limits, then resume from the last checkpoint."
        )


def _split_entropies(
    trees: Sequence[RolloutTree], k: int
) -> tuple[list[float], list[float]]:
    after: list[float] = []
    elsewhere: list[float] = []
    for tree in trees:
        for segment in tree.segments:
            if segment.role == "model":
                probe = k if _follows_tool(tree, segment) else 0
                after.extend(segment.entropies[:probe])
                elsewhere.extend(segment.entropies[probe:])
    return after, elsewhere


def _follows_tool(tree: RolloutTree, segment: Segment) -> bool:
    assert segment.parent is not None
    return tree.segments[segment.parent].tool_call is not None


def _mean(values: Sequence[float | bool]) -> float:
    """Mean, 0 for nothing."""
    return float(np.mean(values)) if len(values) else 0.0
