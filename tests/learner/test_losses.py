"""Each loss, value and gradient, against numbers worked out by hand."""

import math

import pytest
import torch

from rllib_arpo.learner.losses import (
    importance_weights,
    kl_k3,
    policy_loss,
)


def policy(ratio: float, advantage: float, **settings) -> tuple[float, float, bool]:
    """Loss, its gradient with respect to log π, and whether it was clipped."""
    logprob = torch.tensor([[math.log(ratio)]], requires_grad=True)
    out = policy_loss(
        logprob,
        torch.zeros(1, 1),
        torch.tensor([[max(advantage, 0.0)]]),
        torch.tensor([[min(advantage, 0.0)]]),
        **{"clip_param": 0.2, **settings},
    )
    out.loss.sum().backward()
    return out.loss.item(), logprob.grad.item(), bool(out.clipped)


@pytest.mark.parametrize(
    ("ratio", "advantage", "settings", "loss", "gradient", "clipped"),
    [
        # r = 1: L = -Â, dL/dlogπ = -r·Â
        (1.0, 2.0, {}, -2.0, -2.0, False),
        # inside the clip range: -1.1·2
        (1.1, 2.0, {}, -2.2, -2.2, False),
        # above 1.2 with Â > 0: -1.2·2, flat
        (1.5, 2.0, {}, -2.4, 0.0, True),
        # below .8 with Â > 0 the minimum is the unclipped one: -.5·2
        (0.5, 2.0, {}, -1.0, -1.0, False),
        # below .8 with Â < 0: -.8·(-2), flat
        (0.5, -2.0, {}, 1.6, 0.0, True),
        # above 1.2 with Â < 0 the minimum is the unclipped one: -1.5·(-2)
        (1.5, -2.0, {}, 3.0, 3.0, False),
        # clip higher: 1.25 lies below 1.28, -1.25·2; 1.5 does not, -1.28·2
        (1.25, 2.0, {"clip_param_high": 0.28}, -2.5, -2.5, False),
        (1.5, 2.0, {"clip_param_high": 0.28}, -2.56, 0.0, True),
        # dual clip: Â < 0 and r = 5 > 3: -3·(-2), flat; r = 2 < 3: -2·(-2)
        (5.0, -2.0, {"dual_clip": 3.0}, 6.0, 0.0, True),
        (2.0, -2.0, {"dual_clip": 3.0}, 4.0, 4.0, False),
        # dual clip leaves Â > 0 alone
        (1.1, 2.0, {"dual_clip": 3.0}, -2.2, -2.2, False),
    ],
)
def test_policy_loss_is_clipped_where_the_papers_say(
    ratio, advantage, settings, loss, gradient, clipped
) -> None:
    assert policy(ratio, advantage, **settings) == (
        pytest.approx(loss, rel=1e-5),
        pytest.approx(gradient, rel=1e-5),
        clipped,
    )


@pytest.mark.parametrize(
    ("ratio", "loss", "gradient", "clipped"),
    [
        # paths with Â = 2 and Â = -1 share the token: A⁺ = 2, A⁻ = -1
        # r = 1.1: -2·1.1 + 1.1; d/dlogπ the same
        (1.1, -1.1, -1.1, 0.0),
        # r = 1.5: -2·1.2 + 1.5; flat but for the second: +1.5; 2 of 3 clipped
        (1.5, -0.9, 1.5, 2 / 3),
        # r = .5: -2·.5 + .8; flat but for the first: -2·.5; 1 of 3 clipped
        (0.5, -0.2, -1.0, 1 / 3),
        # r = 5: -2·1.2 + 3 (dual clip); flat
        (5.0, 0.6, 0.0, 1.0),
    ],
)
def test_a_shared_token_is_the_sum_of_its_paths(ratio, loss, gradient, clipped):
    logprob = torch.tensor([[math.log(ratio)]], requires_grad=True)
    out = policy_loss(
        logprob,
        torch.zeros(1, 1),
        torch.tensor([[2.0]]),
        torch.tensor([[-1.0]]),
        clip_param=0.2,
        dual_clip=3.0,
    )
    out.loss.sum().backward()
    assert out.loss.item() == pytest.approx(loss, rel=1e-5)
    assert logprob.grad.item() == pytest.approx(gradient, rel=1e-5)
    assert out.clipped.item() == pytest.approx(clipped, rel=1e-5)


def test_policy_loss_stays_finite_for_absurd_ratios() -> None:
    logprobs = torch.tensor([[-2000.0, 0.0]], requires_grad=True)
    out = policy_loss(
        logprobs,
        torch.tensor([[0.0, -2000.0]]),
        torch.zeros(1, 2),
        torch.tensor([[-1.0, -1.0]]),
        clip_param=0.2,
    )
    out.loss.sum().backward()
    assert out.loss.isfinite().all() and logprobs.grad.isfinite().all()


def test_k3_is_the_distance_and_its_gradient() -> None:
    # Δ = log π_ref - log π = ln 2: 2 - .6931 - 1 = .3069; d/dlogπ = 1 - exp(Δ) = -1
    logprobs = torch.tensor([[-math.log(2.0)]], requires_grad=True)
    kl = kl_k3(logprobs, torch.zeros(1, 1))
    kl.sum().backward()
    assert kl.item() == pytest.approx(1 - math.log(2.0), rel=1e-5)
    assert logprobs.grad.item() == pytest.approx(-1.0, rel=1e-5)


def test_k3_vanishes_for_equal_policies() -> None:
    same = torch.tensor([[-1.5, -0.1]])
    assert kl_k3(same, same).tolist() == [[0.0, 0.0]]


def test_importance_weights_are_capped_and_carry_no_gradient() -> None:
    # exp(ln 4) = 4 -> cap 2; exp(-ln 2) = .5
    old = torch.tensor([[math.log(4.0), -math.log(2.0)]], requires_grad=True)
    weights = importance_weights(old, torch.zeros(1, 2), cap=2.0)
    torch.testing.assert_close(weights, torch.tensor([[2.0, 0.5]]))
    assert not weights.requires_grad
