"""Sums over micro-batches and over learners.

A step's figures are sums over its loss tokens; they are added up on the device, read
once, and merged over learners. A learner without rows takes part with nothing.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

BUCKET_NUMBERS = 2**24


class TokenLosses(NamedTuple):
    """Losses and figures of one micro-batch.

    Attributes:
        loss: [B, T], carries the gradient; entries outside the loss mask are ignored.
        metrics: [B, T] each; logged as the mean over all loss tokens of the update,
            each with its weight: a token that paths share counts for all of them.
        maxima: [B, T] each; logged as the maximum over them.
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    maxima: dict[str, Tensor]


@dataclass(kw_only=True)
class StepTotals:
    """Figures of one optimizer step.

    Attributes:
        loss: the exact loss of the step.
        num_tokens: loss tokens.
        weight: Σ W over them, what losses and metrics are divided by.
        sums: sum of each metric over them, each token with its weight.
        maxima: maximum of each.
        grad_norm: before clipping; not finite if any learner's was not.
        num_row_tokens: tokens of all rows, padding excluded.
    """

    loss: float = 0.0
    num_tokens: int = 0
    weight: float = 0.0
    sums: dict[str, float] = field(default_factory=dict)
    maxima: dict[str, float] = field(default_factory=dict)
    grad_norm: float = 0.0
    num_row_tokens: int = 0

    def add(self, other: "StepTotals") -> None:
        """Add the figures of another learner, or of another step."""
        self.loss += other.loss
        self.num_tokens += other.num_tokens
        self.weight += other.weight
        self.num_row_tokens += other.num_row_tokens
        for name, value in other.sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        for name, value in other.maxima.items():
            self.maxima[name] = max(self.maxima.get(name, value), value)
        # `max` would drop a NaN.
        if not other.grad_norm <= self.grad_norm:
            self.grad_norm = other.grad_norm


def summarize(
    steps: Sequence[StepTotals], *, first_step_only: Collection[str] = ()
) -> dict[str, float]:
    """One number per metric for the steps of an update that were taken.

    Args:
        steps: in order; those whose gradient was not finite do not count.
        first_step_only: metrics that compare the sampler with the learner; later
            steps differ because the learner learned.

    Returns:
        Means over loss tokens, maxima, and total_loss, grad_norm (means over steps),
        num_tokens_trained; empty when no step was taken.
    """
    taken = [step for step in steps if math.isfinite(step.grad_norm)]
    if not taken:
        return {}
    update = StepTotals()
    for step in taken:
        update.add(step)
    values = {name: value / update.weight for name, value in update.sums.items()}
    for name in first_step_only:
        if name in taken[0].sums:
            values[name] = taken[0].sums[name] / taken[0].weight
    return (
        values
        | update.maxima
        | {
            "total_loss": update.loss / len(taken),
            "grad_norm": sum(step.grad_norm for step in taken) / len(taken),
            "num_tokens_trained": update.num_tokens,
        }
    )


class MicrobatchSums:
    """Adds up micro-batches on the device, without waiting for it.

    Attributes:
        num_row_tokens: tokens of their rows, padding excluded.
    """

    def __init__(self) -> None:
        self.num_row_tokens = 0
        self._losses: list[Tensor] = []
        self._sums: list[Tensor] = []
        self._maxima: list[Tensor] = []
        self._names: tuple[list[str], list[str]] = ([], [])

    def add(self, loss: Tensor, token_losses: TokenLosses, weights: Tensor) -> None:
        """Take one micro-batch's loss [] and its figures; `weights` are [B, T]."""
        mask = weights > 0
        chosen_weights = weights[mask]
        self._names = list(token_losses.metrics), list(token_losses.maxima)
        self._losses.append(loss.detach())
        for tensors, sums in (
            (token_losses.metrics, self._sums),
            (token_losses.maxima, self._maxima),
        ):
            if tensors:
                chosen = torch.stack([t.detach()[mask] for t in tensors.values()])
                sums.append(
                    chosen @ chosen_weights if sums is self._sums else chosen.amax(-1)
                )

    def totals(self, num_tokens: int, weight: float, grad_norm: Tensor) -> StepTotals:
        """Read everything at once."""
        totals = StepTotals(
            num_tokens=num_tokens,
            weight=weight,
            grad_norm=float(grad_norm),
            num_row_tokens=self.num_row_tokens,
        )
        if self._losses:
            totals.loss = float(torch.stack(self._losses).sum())
        if self._sums:
            values = torch.stack(self._sums).sum(0).tolist()
            totals.sums = dict(zip(self._names[0], values, strict=True))
        if self._maxima:
            values = torch.stack(self._maxima).amax(0).tolist()
            totals.maxima = dict(zip(self._names[1], values, strict=True))
        return totals


def gather(value: T, *, distributed: bool) -> list[T]:
    """Every learner's value, in the order of ranks."""
    if not distributed:
        return [value]
    values: list[T] = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def sum_gradients(parameters: Sequence[torch.nn.Parameter]) -> None:
    """Sum gradients over learners in buckets; a missing one counts as zero."""
    bucket: list[Tensor] = []
    size = 0
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        bucket.append(parameter.grad)
        size += parameter.numel()
        if size >= BUCKET_NUMBERS:
            _sum_bucket(bucket)
            bucket, size = [], 0
    if bucket:
        _sum_bucket(bucket)


def _sum_bucket(bucket: list[Tensor]) -> None:
    flat = torch.cat([gradient.flatten() for gradient in bucket])
    dist.all_reduce(flat)
    parts = flat.split([gradient.numel() for gradient in bucket])
    for gradient, part in zip(bucket, parts, strict=True):
        gradient.copy_(part.view_as(gradient))
