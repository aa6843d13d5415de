"""Optimizers and the learning rate of each step.

AdamW for everything, or Muon for the matrices inside the layers with AdamW for the
rest. The learning rate is a pure function of the number of optimizer steps done, so
that one integer restores the schedule. RLlib's own schedules count environment steps.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from rllib_arpo.arrays import to_tensor
from rllib_arpo.errors import ConfigError
from rllib_arpo.learner.fsdp import part_like, read_out, whole

OptimizerName = Literal["adamw", "muon"]
Schedule = Literal["constant", "linear", "cosine"]

MUON_MOMENTUM = 0.95


class NamedOptimizer(NamedTuple):
    """An optimizer, the parameters it owns and its learning rate at factor 1."""

    name: str
    optimizer: torch.optim.Optimizer
    parameters: list[nn.Parameter]
    peak_lr: float


def build_optimizers(
    model: PreTrainedModel,
    *,
    optimizer: OptimizerName,
    lr: float,
    muon_lr: float,
    weight_decay: float,
    adam_betas: tuple[float, float],
) -> list[NamedOptimizer]:
    """Optimizers that own every trainable parameter of `model` exactly once.

    Norms and biases (fewer than two dimensions) are not decayed. With "muon" (Jordan
    et al. 2024; learning rate matched to AdamW's update size, Liu et al.,
    arXiv:2502.16982, eq. 4) the matrices inside the layers go to Muon, embeddings and
    head stay with AdamW.

    Args:
        model: the Hugging Face model.
        optimizer: "adamw" or "muon".
        lr: AdamW's learning rate.
        muon_lr: Muon's learning rate.
        weight_decay: decoupled weight decay of both.
        adam_betas: AdamW's β₁, β₂.

    Raises:
        ConfigError: no such optimizer.
    """
    if optimizer not in ("adamw", "muon"):
        raise ConfigError(f"optimizer is {optimizer!r}: expected 'adamw' or 'muon'")
    trainable = [p for p in model.parameters() if p.requires_grad]
    matrices: list[nn.Parameter] = []
    if optimizer == "muon":
        outer = _embedding_ids(model)
        matrices = [p for p in trainable if p.ndim == 2 and id(p) not in outer]
    inner = {id(p) for p in matrices}
    rest = [p for p in trainable if id(p) not in inner]
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    built: list[NamedOptimizer] = []
    if groups:
        adamw = torch.optim.AdamW(
            groups, lr=lr, betas=(adam_betas[0], adam_betas[1]), fused=True
        )
        built.append(NamedOptimizer("adamw", adamw, rest, lr))
    if matrices:
        muon = WholeMatrixMuon(
            matrices,
            lr=muon_lr,
            weight_decay=weight_decay,
            momentum=MUON_MOMENTUM,
            adjust_lr_fn="match_rms_adamw",
        )
        built.append(NamedOptimizer("muon", muon, matrices, muon_lr))
    return built


class WholeMatrixMuon(torch.optim.Muon):
    """Muon for matrices that may be spread over learners.

    What it does to a matrix cannot be done to a part of one. So each update is put
    together for as long as its step takes; momentum stays spread.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """As Muon's."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if not isinstance(parameter, DTensor):
                    return super().step(closure)
                if parameter.grad is not None:
                    self._step_spread(parameter, group)
        return None

    def _step_spread(self, parameter: DTensor, group: dict[str, Any]) -> None:
        gradient: Any = parameter.grad
        state: dict[str, Any] = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        momentum: Tensor = state["momentum_buffer"]
        momentum.lerp_(gradient, 1 - group["momentum"])
        update = gradient.lerp(momentum, group["momentum"])
        step = nn.Parameter(torch.zeros(parameter.shape, device=parameter.device))
        step.grad = whole(update)
        # Zero plus one step: what is left to do is the learning rate's alone.
        torch.optim.Muon(
            [step],
            lr=group["lr"],
            weight_decay=0.0,
            momentum=0.0,
            adjust_lr_fn=group["adjust_lr_fn"],
        ).step()
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(part_like(parameter, step.detach()))


def _embedding_ids(model: PreTrainedModel) -> set[int]:
    outer = {
        id(p)
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for p in module.parameters()
    }
    head = model.get_output_embeddings()
    return outer | ({id(p) for p in head.parameters()} if head is not None else set())


def learning_rate_factor(
    step: int,
    *,
    schedule: Schedule,
    warmup_steps: int,
    total_steps: int | None,
) -> float:
    """What the peak learning rates are multiplied with in one step.

        step < W     (step + 1) / W
        linear       1 - p            p = (step - W) / (total - W), at most 1
        cosine       (1 + cos πp) / 2

    Args:
        step: optimizer steps done so far.
        schedule: shape after the warm-up.
        warmup_steps: W.
        total_steps: where linear and cosine reach 0, warm-up included.

    Returns:
        A number in [0, 1]; the first step's is never 0.

    Raises:
        ConfigError: no such schedule, or `total_steps` is missing.
    """
    if schedule not in ("constant", "linear", "cosine"):
        raise ConfigError(
            f"lr_schedule is {schedule!r}: expected 'constant', 'linear' or 'cosine'"
        )
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    if total_steps is None:
        raise ConfigError(
            f"lr_schedule {schedule!r} needs `lr_total_steps`: the number of optimizer "
            "steps after which the learning rate is 0"
        )
    progress = min((step - warmup_steps) / max(total_steps - warmup_steps, 1), 1.0)
    if schedule == "linear":
        return 1.0 - progress
    return (1.0 + math.cos(math.pi * progress)) / 2


def set_learning_rate(
    built: list[NamedOptimizer],
    step: int,
    *,
    schedule: Schedule,
    warmup_steps: int,
    total_steps: int | None,
) -> None:
    """Set every learning rate for one step (see `learning_rate_factor`)."""
    factor = learning_rate_factor(
        step, schedule=schedule, warmup_steps=warmup_steps, total_steps=total_steps
    )
    for named in built:
        for group in named.optimizer.param_groups:
            group["lr"] = named.peak_lr * factor


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's state dict with numpy arrays in place of tensors.

    Of tensors that are spread over learners all must ask, and the first gets the
    whole, the others None.
    """
    return _map_leaves(optimizer.state_dict(), torch.Tensor, read_out)


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> None:
    """Take back what `optimizer_state` gave, or of whole tensors one's own part.

    Settings stay those that the optimizer was built with: a run may go on with
    another weight decay. Only the learning rate comes back, until the next step.
    """
    built_with = [
        {name: value for name, value in group.items() if name not in ("params", "lr")}
        for group in optimizer.param_groups
    ]
    state = _map_leaves(state, np.ndarray, to_tensor)
    owned = [p for group in optimizer.param_groups for p in group["params"]]
    parts = {
        index: {
            name: part_like(owned[index], value)
            if isinstance(value, torch.Tensor) and value.shape == owned[index].shape
            else value
            for name, value in values.items()
        }
        for index, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": parts})
    for group, settings in zip(optimizer.param_groups, built_with, strict=True):
        group.update(settings)


def _map_leaves(value: Any, kind: type, function: Callable[[Any], Any]) -> Any:
    if isinstance(value, kind):
        return function(value)
    if isinstance(value, dict):
        return {key: _map_leaves(v, kind, function) for key, v in value.items()}
    if isinstance(value, list):
        return [_map_leaves(v, kind, function) for v in value]
    return value
