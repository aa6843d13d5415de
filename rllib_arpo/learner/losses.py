"""The losses, as pure functions of per-token tensors.

Every function returns one value per token; `token_weights` holds the whole business
of masking and averaging. Its normaliser is a number given from outside (counted over
all micro-batches and learners), so that the gradients of micro-batches simply add up
to the gradient of the full batch.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Aggregation = Literal["token_mean", "sequence_mean"]

MAX_LOG_RATIO = 20.0


class PolicyLoss(NamedTuple):
    """What `policy_loss` returns, all [B, T].

    Attributes:
        loss: the token's loss.
        ratio: r = π / π_old.
        clipped: True where clipping took the gradient away.
    """

    loss: Tensor
    ratio: Tensor
    clipped: Tensor


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    clip_param: float,
    clip_param_high: float | None = None,
    dual_clip: float | None = None,
) -> PolicyLoss:
    """Clipped surrogate loss of each token.

        r = exp(log π - log π_old)
        L = -min(r·Â, clip(r, 1 - ε, 1 + ε_high)·Â)       PPO, arXiv:1707.06347, eq. 7
                                   ε_high ≠ ε: DAPO, arXiv:2503.14476, section 3.1
        Â < 0:  L = min(L, -c·Â)             dual clip, arXiv:1912.09729, section 5.2

    The log ratio is limited to ±20, so that r cannot overflow.

    Args:
        logprobs: [B, T] log π of the current policy, carries the gradient.
        old_logprobs: [B, T] log π_old.
        advantages: [B, T] Â.
        clip_param: ε.
        clip_param_high: ε_high; None means ε.
        dual_clip: c > 1; None turns the dual clip off.

    Returns:
        The loss, the ratio and where it was clipped.
    """
    high = clip_param if clip_param_high is None else clip_param_high
    log_ratio = (logprobs - old_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = log_ratio.exp()
    free = -ratio * advantages
    held = -ratio.clamp(1 - clip_param, 1 + high) * advantages
    loss = torch.maximum(free, held)
    clipped = held > free
    if dual_clip is not None:
        ceiling = torch.where(advantages < 0, -dual_clip * advantages, torch.inf)
        clipped = clipped | (loss > ceiling)
        loss = torch.minimum(loss, ceiling)
    return PolicyLoss(loss, ratio.detach(), clipped)


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


def token_weights(
    loss_mask: Tensor, *, aggregation: Aggregation, normalizer: float
) -> Tensor:
    """Weight of each token in the loss Σ w·L.

        token_mean      w = m / N        N loss tokens     DAPO, arXiv:2503.14476, eq. 8
        sequence_mean   w = m / (S·|y|)  S rows with loss tokens, |y| those of the row
                                         GRPO, arXiv:2402.03300, eq. 3

    Args:
        loss_mask: [B, T] bool, m; a row must be whole.
        aggregation: which mean.
        normalizer: N or S of the whole optimizer step, over all its micro-batches
            and learners.

    Returns:
        [B, T] float32; the weights of one optimizer step add up to 1.
    """
    mask = loss_mask.float()
    if aggregation == "token_mean":
        return mask / normalizer
    return mask / (mask.sum(-1, keepdim=True).clamp(min=1) * normalizer)
