"""Supervised training on the same trees, rows and optimizer steps.

A trace is a `RolloutTree` with one leaf; its "model" segments are learned, prompt and
tool segments are only read.
"""

from collections.abc import Mapping
from typing import Any

from ray.rllib.utils.annotations import override
from torch import Tensor

from rllib_arpo.learner import packing
from rllib_arpo.learner.reduction import TokenLosses
from rllib_arpo.learner.scoring import EntropyMode
from rllib_arpo.learner.torch_learner import ARPOTorchLearner


class SFTTorchLearner(ARPOTorchLearner):
    """Maximises the likelihood of the model's own tokens."""

    @property
    def temperature(self) -> float:
        """Traces are learned as they stand, without a temperature."""
        return 1.0

    @property
    def entropy_mode(self) -> EntropyMode:
        """No entropies: they are not part of the loss and cost time."""
        return "none"

    @override(ARPOTorchLearner)
    def prepare_columns(self, columns: packing.FlatColumns) -> packing.FlatColumns:
        return columns

    @override(ARPOTorchLearner)
    def compute_token_losses(
        self, batch: Mapping[str, Any], fwd_out: Mapping[str, Tensor]
    ) -> TokenLosses:
        """Negative log-likelihood, L = -log π(token)."""
        nll = -fwd_out["logprobs"]
        return TokenLosses(nll, {"negative_log_likelihood": nll}, {})
