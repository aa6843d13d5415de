"""Log-probabilities and entropies of given tokens under a causal language model.

    token_ids ─ layers (mask: causal, or ancestors only) ─► hidden states [B, T, D]
    hidden state before each loss token ─ head, in pieces ─► logprobs, entropies

1. Only positions that predict a loss token pass the head.
2. The head's [T, V] logits never exist at once: pieces of them are made, read and
   thrown away, and made again in the backward pass.
"""

import contextlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from rllib_arpo.learner.tree_attention import attention_mask
from rllib_arpo.pretrained import head_is_plain

# Logits are made in pieces of at most this many numbers (64 MB in float32).
MAX_LOGITS = 2**24

EntropyMode = Literal["none", "value", "gradient"]
Head = Callable[[Tensor], Tensor]


class TokenScorer(nn.Module):
    """A causal language model that scores given tokens.

    Args:
        model: the model, whose weights it shares.
        compute_dtype: bfloat16 runs under autocast, whatever the weights are stored in.
    """

    def __init__(self, model: PreTrainedModel, compute_dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model
        self.compute_dtype = compute_dtype
        self.head_is_plain = head_is_plain(model)

    def forward(
        self, batch: Mapping[str, Any], entropy: EntropyMode = "value"
    ) -> dict[str, Tensor]:
        """Score the loss tokens under the distribution that the engine samples from.

        Args:
            batch: token_ids, position_ids [B, T] int64 and loss_mask [B, T] bool;
                rows of trees also have predictors and subtree_ends [B, T] int64 (see
                `packing`), without which a row is one path. "temperature" (default 1)
                divides the logits.
            entropy: whether to compute entropies, and with gradient.

        Returns:
            [B, T] float32 tensors (float64 for a float64 model), zero outside the
            loss mask: logprobs of the tokens given those before them; entropies in
            nats, unless "none".
        """
        ids: Tensor = batch["token_ids"]
        rows, columns = batch["loss_mask"].nonzero(as_tuple=True)
        if "subtree_ends" in batch:
            before = batch["predictors"][rows, columns]
        else:
            before = columns - 1
        with self._autocast(ids.device):
            inputs = {
                "input_ids": ids,
                "position_ids": batch["position_ids"],
                "attention_mask": self._mask(batch),
                "use_cache": False,
            }
            hidden = self.model.base_model(**inputs).last_hidden_state
            head: Head = partial(_own_head, self.model)
            if self.head_is_plain:
                head = cast(Head, self.model.get_output_embeddings())
            logprobs, entropies = score_targets(
                hidden[rows, before],
                ids[rows, columns],
                head,
                vocab_size=self.model.config.get_text_config().vocab_size,
                temperature=float(batch.get("temperature", 1.0)),
                entropy=entropy,
            )
        blank = torch.zeros(ids.shape, dtype=logprobs.dtype, device=ids.device)
        out = {"logprobs": blank.index_put((rows, columns), logprobs)}
        if entropies is not None:
            out["entropies"] = blank.index_put((rows, columns), entropies)
        return out

    def _mask(self, batch: Mapping[str, Any]) -> Any:
        if "subtree_ends" not in batch:
            return None  # padding stands on the right: causal attention keeps it out
        dtype = self.compute_dtype
        if dtype == torch.float32:
            dtype = next(self.model.parameters()).dtype
        return attention_mask(self.model, batch["subtree_ends"], dtype)

    def _autocast(self, device: torch.device) -> contextlib.AbstractContextManager:
        if self.compute_dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(device.type, dtype=self.compute_dtype)


class _Given(nn.Module):
    """Stands in for the body of a model: its output is known."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        given: Any = hidden
        self.output = BaseModelOutputWithPast(last_hidden_state=given)

    def forward(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPast:
        return self.output


def _own_head(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Logits of some hidden states as the model makes them, scaled or capped."""
    body = model.base_model
    model._modules[model.base_model_prefix] = _Given(hidden[None])
    try:
        return model(inputs_embeds=hidden[None], use_cache=False).logits[0]
    finally:
        model._modules[model.base_model_prefix] = body


def score_targets(
    hidden: Tensor,
    targets: Tensor,
    head: Head,
    *,
    vocab_size: int,
    temperature: float,
    entropy: EntropyMode,
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of given tokens and entropy, from hidden states.

        log π(y) = z_y/τ - log Σ_j exp(z_j/τ),  H = -Σ_j π_j log π_j,  z = head(h)

    Args:
        hidden: [n, D], one state before each target.
        targets: [n] int64.
        head: [m, D] -> [m, V] logits.
        vocab_size: V, to choose the size of pieces.
        temperature: τ > 0.
        entropy: whether to compute H, and with gradient.

    Returns:
        [n] logprobs, and [n] entropies or None; float32, or float64 if logits are.
    """
    size = max(MAX_LOGITS // vocab_size, 1)
    if len(targets) <= size:
        return _score(hidden, targets, head, temperature, entropy)
    parts = [
        checkpoint(
            _score, part, wanted, head, temperature, entropy, use_reentrant=False
        )
        for part, wanted in zip(hidden.split(size), targets.split(size), strict=True)
    ]
    logprobs = torch.cat([part[0] for part in parts])
    if entropy == "none":
        return logprobs, None
    return logprobs, torch.cat([cast(Tensor, part[1]) for part in parts])


def _score(
    hidden: Tensor,
    targets: Tensor,
    head: Head,
    temperature: float,
    entropy: EntropyMode,
) -> tuple[Tensor, Tensor | None]:
    logits = head(hidden)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if temperature != 1:
        logits = logits / temperature
    table = logits.log_softmax(-1)
    chosen = table.gather(-1, targets[:, None]).squeeze(-1)
    if entropy == "none":
        return chosen, None
    # Last, so that a backward pass which needs no entropies does not make them again.
    with torch.set_grad_enabled(entropy == "gradient" and torch.is_grad_enabled()):
        return chosen, -(table.exp() * table).sum(-1)
