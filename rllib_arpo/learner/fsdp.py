"""FSDP2: a model whose weights are spread over the learners.

Each learner keeps a part of every parameter, of its gradient and of its optimizer
state. A layer is put together for its forward and its backward pass and taken apart
again; gradients are summed as they are handed out.

1. Whoever computes or reads whole weights needs all learners, in the same order and
   equally often. So micro-batches are counted over learners, and a learner that has
   none left takes part with a blank one.
2. Gradients are summed, not averaged: the loss is divided by the count of the whole
   step already.
3. What is saved and sent is whole, under the same names as without FSDP2. Only the
   first learner keeps it.
"""

from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from rllib_arpo.arrays import to_numpy, to_tensor
from rllib_arpo.errors import ConfigError
from rllib_arpo.learner.packing import (
    LOSS_MASK,
    POSITION_IDS,
    PREDICTORS,
    SUBTREE_ENDS,
    TOKEN_IDS,
)
from rllib_arpo.learner.scoring import TokenScorer


def shard(scorer: TokenScorer, device: torch.device) -> None:
    """Spread a scorer's weights over all learners; all of them call it.

    The unit is a layer; embeddings, last norm and head belong to the scorer itself.
    With bfloat16 the parts are gathered as bfloat16, gradients are summed in float32,
    and what a learner keeps has the dtype that it had.

    Args:
        scorer: all learners hold the same weights.
        device: where the parts go, layer by layer.

    Raises:
        ConfigError: the model does not say what its layers are.
    """
    names = scorer.model._no_split_modules or ()
    layers = [m for m in scorer.model.modules() if type(m).__name__ in names]
    if not layers:
        raise ConfigError(
            f'learner_strategy="fsdp2" spreads a model layer by layer, but '
            f"{type(scorer.model).__name__} does not name its layers "
            '(`_no_split_modules`). Set `.learners(learner_strategy="ddp")`.'
        )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    policy = MixedPrecisionPolicy()
    if scorer.compute_dtype != torch.float32:
        policy = MixedPrecisionPolicy(
            param_dtype=scorer.compute_dtype, reduce_dtype=torch.float32
        )
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    units: list[nn.Module] = [*layers, scorer]
    for unit in units:
        fully_shard(unit, mesh=mesh, mp_policy=policy)
        sharded = cast(FSDPModule, unit)
        sharded.set_gradient_divide_factor(1.0)
        # gloo and NCCL both know a plain sum; a factor of 1 alone would ask for more.
        sharded.set_force_sum_reduction_for_comms(True)


def take_apart(scorer: TokenScorer) -> None:
    """After a forward pass that no backward pass follows: keep parts only.

    FSDP2 leaves the outermost weights whole, and would not see that an optimizer
    changes the parts.
    """
    if isinstance(scorer, FSDPModule):
        scorer.reshard()


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be spread over learners; then all of them call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def read_out(tensor: Tensor, dtype: torch.dtype | None = None) -> np.ndarray | None:
    """`to_numpy` of a tensor that may be spread over learners; then all call it.

    Returns:
        The whole; None on all learners but the first if the tensor is spread.
    """
    if not isinstance(tensor, DTensor):
        return to_numpy(tensor, dtype)
    if dtype is not None and tensor.is_floating_point():
        tensor = tensor.to(dtype)
    gathered = whole(tensor.detach())
    return to_numpy(gathered) if is_first() else None


def part_like(target: Tensor, value: np.ndarray | Tensor) -> Tensor:
    """Of a whole value the part that `target` is; nothing is communicated."""
    value = to_tensor(value)
    if not isinstance(target, DTensor):
        return value
    return distribute_tensor(
        value.to(target.device, target.dtype),
        target.device_mesh,
        target.placements,
        src_data_rank=None,
    )


def is_first() -> bool:
    """Whether this learner keeps what all have put together."""
    return not dist.is_initialized() or dist.get_rank() == 0


def blank_batch(
    *, device: torch.device | str, length: int, packed: bool
) -> dict[str, Any]:
    """A micro-batch of one row without loss, for a learner that has no other left.

    Args:
        device: where the tensors go.
        length: tokens of the row.
        packed: whether rows are trees' (see `packing`).
    """
    places = torch.arange(length, device=device)[None]
    batch = {
        TOKEN_IDS: torch.zeros_like(places),
        POSITION_IDS: places,
        LOSS_MASK: torch.zeros_like(places, dtype=torch.bool),
    }
    if packed:
        batch[PREDICTORS] = torch.full_like(places, -1)
        batch[SUBTREE_ENDS] = torch.full_like(places, length)
    return batch
