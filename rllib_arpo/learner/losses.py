"""The losses, as pure functions of per-token tensors.

Every function returns one value per token. Masking and averaging are all in a token's
weight W (see `packing`): the loss of an optimizer step is Σ W·L / Σ W, where the sum
below the line is counted beforehand over all micro-batches and learners, so that
their gradients simply add up.

    token_mean      every path's token weighs 1       DAPO, arXiv:2503.14476, eq. 8
    sequence_mean   1 / loss tokens of the path       GRPO, arXiv:2402.03300, eq. 3
"""

from typing import Literal, NamedTuple

from torch import Tensor

Aggregation = Literal["token_mean", "sequence_mean"]

MAX_LOG_RATIO = 20.0


class PolicyLoss(NamedTuple):
    """What `policy_loss` returns, all [B, T].

    Attributes:
        loss: the token's loss.
        ratio: r = π / π_old.
        clipped: share of |A⁺| + |A⁻| whose gradient clipping took away.
    """

    loss: Tensor
    ratio: Tensor
    clipped: Tensor


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    positive_advantages: Tensor,
    negative_advantages: Tensor,
    *,
    clip_param: float,
    clip_param_high: float | None = None,
    dual_clip: float | None = None,
) -> PolicyLoss:
    """Clipped surrogate loss of each token, over all paths that hold it.

        r = exp(log π - log π_old)
        L = -min(r·Â, clip(r, 1 - ε, 1 + ε_high)·Â)       PPO, arXiv:1707.06347, eq. 7
                                   ε_high ≠ ε: DAPO, arXiv:2503.14476, section 3.1
        Â < 0:  L = min(L, -c·Â)             dual clip, arXiv:1912.09729, section 5.2

    For a positive Â that is -Â·min(r, 1 + ε_high), for a negative one
    -Â·min(max(r, 1 - ε), c). Both are linear in Â, so paths that share a token may
    add up their advantages by sign (ARPO's soft attribution, exactly):

        L = -A⁺·min(r, 1 + ε_high) - A⁻·min(max(r, 1 - ε), c)

    The log ratio is limited to ±20, so that r cannot overflow.

    Args:
        logprobs: [B, T] log π of the current policy, carries the gradient.
        old_logprobs: [B, T] log π_old.
        positive_advantages: [B, T] A⁺ >= 0.
        negative_advantages: [B, T] A⁻ <= 0.
        clip_param: ε.
        clip_param_high: ε_high; None means ε.
        dual_clip: c > 1; None turns the dual clip off.

    Returns:
        The loss, the ratio and where it was clipped.
    """
    low, high = 1 - clip_param, 1 + (clip_param_high or clip_param)
    log_ratio = (logprobs - old_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = log_ratio.exp()
    loss = -positive_advantages * ratio.clamp(max=high)
    loss = loss - negative_advantages * ratio.clamp(min=low, max=dual_clip)
    held = ratio < low
    if dual_clip is not None:
        held = held | (ratio > dual_clip)
    size = positive_advantages - negative_advantages
    clipped = (ratio > high) * positive_advantages - held * negative_advantages
    return PolicyLoss(loss, ratio.detach(), clipped / size.where(size > 0, 1.0))


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Estimate of KL(π ‖ π_ref) from the sampled tokens, never negative.

        k3 = exp(Δ) - Δ - 1,  Δ = log π_ref - log π
                              Schulman, "Approximating KL Divergence" (2020), k3;
                              GRPO, arXiv:2402.03300, eq. 4

    Args:
        logprobs: [B, T] log π, carries the gradient.
        ref_logprobs: [B, T] log π_ref.

    Returns:
        [B, T].
    """
    delta = (ref_logprobs - logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return delta.exp() - delta - 1


def importance_weights(
    old_logprobs: Tensor, rollout_logprobs: Tensor, *, cap: float
) -> Tensor:
    """Truncated importance weight between the learner's and the sampler's policy.

        w = min(exp(log π_old - log π_rollout), C)
              Yao et al., "Your Efficient RL Framework Secretly Brings You Off-Policy
              RL Training" (2025); truncation: Ionides, "Truncated Importance
              Sampling" (2008)

    It corrects for an engine that computes other probabilities than the learner with
    the same weights. It multiplies the policy loss and carries no gradient.

    Args:
        old_logprobs: [B, T] the learner's, before the first step.
        rollout_logprobs: [B, T] the sampler's.
        cap: C, at least 1.

    Returns:
        [B, T] in (0, C].
    """
    return (old_logprobs - rollout_logprobs).detach().exp().clamp(max=cap)
