"""Tensors as numpy arrays and back, bfloat16 included.

Weights and optimizer states travel as numpy arrays: Ray's object store hands those
out without copying. numpy has no bfloat16 of its own, `ml_dtypes` lends it one.
"""

import ml_dtypes
import numpy as np
import torch
from torch import Tensor


def to_numpy(tensor: Tensor, dtype: torch.dtype | None = None) -> np.ndarray:
    """Copy a tensor into an array of its own; bfloat16 becomes `ml_dtypes.bfloat16`.

    Args:
        tensor: on any device.
        dtype: convert floating point tensors to this one first.
    """
    if dtype is not None and tensor.is_floating_point():
        tensor = tensor.to(dtype)
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().copy().view(ml_dtypes.bfloat16)
    return tensor.numpy().copy()


def to_tensor(array: np.ndarray | Tensor) -> Tensor:
    """The inverse of `to_numpy`; arrays from Ray's object store are read-only."""
    if isinstance(array, Tensor):
        return array
    array = np.ascontiguousarray(array)
    if not array.flags.writeable:
        array = array.copy()
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)
