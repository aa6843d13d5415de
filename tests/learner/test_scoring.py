"""Heads are applied in pieces, whatever they do to the logits."""

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from rllib_arpo.learner import scoring
from rllib_arpo.learner.scoring import TokenScorer, score_targets

SMALL = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": None,
    "initializer_range": 0.5,
}


def batch(length: int = 9) -> dict[str, torch.Tensor]:
    ids = torch.arange(2 * length).view(2, length)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[:, 0] = False
    positions = torch.arange(length).expand(2, length)
    return {"token_ids": ids, "position_ids": positions, "loss_mask": mask}


@pytest.mark.parametrize(
    "config",
    [
        transformers.Qwen2Config(**SMALL),
        transformers.Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=0.5),
        transformers.CohereConfig(**SMALL, logit_scale=0.3),
        transformers.GraniteConfig(**SMALL, logits_scaling=3.0),
    ],
    ids=lambda config: config.model_type,
)
@pytest.mark.parametrize("limit", [2**24, 96])  # 96: three positions at a time
def test_scores_and_gradients_are_those_of_the_models_own_logits(
    config, limit, monkeypatch
) -> None:
    monkeypatch.setattr(scoring, "MAX_LOGITS", limit)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    given = batch()
    table = model(given["token_ids"], use_cache=False).logits.log_softmax(-1)
    chosen = table[:, :-1].gather(-1, given["token_ids"][:, 1:, None])[..., 0]
    chosen.sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    logprobs = TokenScorer(model, torch.float32)(given, "value")["logprobs"]
    torch.testing.assert_close(logprobs[:, 1:], chosen)
    logprobs.sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], msg=name)


def test_no_more_logits_exist_at_once_than_allowed(monkeypatch) -> None:
    monkeypatch.setattr(scoring, "MAX_LOGITS", 100)
    sizes: list[int] = []
    weight = torch.randn(11, 4, requires_grad=True)

    def head(hidden: torch.Tensor) -> torch.Tensor:
        sizes.append(len(hidden) * 11)
        return hidden @ weight.T

    logprobs, _ = score_targets(
        torch.randn(50, 4, requires_grad=True),
        torch.zeros(50, dtype=torch.int64),
        head,
        vocab_size=11,
        temperature=1.0,
        entropy="gradient",
    )
    assert max(sizes) <= 100
    made = len(sizes)
    logprobs.sum().backward()
    # Nothing was kept: the backward pass makes every piece again.
    assert len(sizes) == 2 * made == 2 * 6  # ⌈50 / 9⌉ pieces
