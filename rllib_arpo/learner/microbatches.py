"""From rows of tokens to padded micro-batches.

Rows of similar length are put together, so that little is padding; padding appears
nowhere else.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from rllib_arpo.learner.packing import (
    LOSS_MASK,
    LOSS_WEIGHTS,
    POSITION_IDS,
    ROW_LENGTHS,
    SUBTREE_ENDS,
    TREE_INDEX,
)

# Padding costs time and memory as tokens do; a further micro-batch costs little.
MIN_FILL = 0.8


def loss_tokens(columns: Mapping[str, np.ndarray]) -> np.ndarray:
    """[R] number of loss tokens of each row."""
    lengths = columns[ROW_LENGTHS]
    row_of_token = np.repeat(np.arange(len(lengths)), lengths)
    return np.bincount(row_of_token[columns[LOSS_MASK]], minlength=len(lengths))


def loss_weight(columns: Mapping[str, np.ndarray], rows: np.ndarray) -> float:
    """Σ W over the tokens of some rows."""
    index, valid = row_index(columns[ROW_LENGTHS], rows)
    return float(columns[LOSS_WEIGHTS][index[valid]].sum())


def rows_of_trees(columns: Mapping[str, np.ndarray], trees: np.ndarray) -> np.ndarray:
    """Indices of all rows of the trees with the given numbers."""
    return np.flatnonzero(np.isin(columns[TREE_INDEX], trees))


def split_rows(
    row_lengths: np.ndarray, rows: np.ndarray, *, max_tokens: int
) -> list[np.ndarray]:
    """Group rows of similar length into micro-batches.

    Args:
        row_lengths: [R] of all rows.
        rows: [n] which of them to split.
        max_tokens: most tokens of a micro-batch, padding included. A row that is
            longer gets a micro-batch of its own.

    Returns:
        Arrays of row indices, longest rows first; every row exactly once. No row is
        shorter than `MIN_FILL` of the longest beside it.
    """
    ordered = rows[np.argsort(-row_lengths[rows], kind="stable")]
    lengths = row_lengths[ordered]
    groups: list[np.ndarray] = []
    start = 0
    while start < len(ordered):
        longest = max(int(lengths[start]), 1)
        similar = int(np.count_nonzero(lengths[start:] >= MIN_FILL * longest))
        stop = start + max(min(max_tokens // longest, similar), 1)
        groups.append(ordered[start:stop])
        start = stop
    return groups


def row_index(
    row_lengths: np.ndarray, rows: np.ndarray, *, multiple_of: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Where the tokens of padded rows stand in the flat columns.

    Returns:
        index: [B, T] position in the flat columns, 0 for padding.
        valid: [B, T] bool, False for padding.
    """
    starts = (np.cumsum(row_lengths) - row_lengths)[rows]
    longest = int(row_lengths[rows].max(initial=0))
    steps = np.arange(-(-longest // multiple_of) * multiple_of)
    valid: np.ndarray = steps < row_lengths[rows, None]
    return np.where(valid, starts[:, None] + steps, 0), valid


def collate(
    columns: Mapping[str, np.ndarray],
    rows: np.ndarray,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    multiple_of: int = 1,
) -> dict[str, Tensor]:
    """Pad some rows on the right into one micro-batch.

    Args:
        columns: flat columns as from `pack_trees`; further token columns [N] and row
            columns [R] are taken along.
        rows: [B] which rows.
        device: where the tensors go.
        dtype: of the columns of real numbers.
        multiple_of: T is padded to a multiple of it.

    Returns:
        Token columns as [B, T], zero in the padding; row columns as [B]. In the
        padding position_ids go on counting, so that no position repeats, and
        subtree_ends is T: padding sees itself, and no token sees nothing.
    """
    num_tokens = int(columns[ROW_LENGTHS].sum())
    index, valid = row_index(columns[ROW_LENGTHS], rows, multiple_of=multiple_of)
    width = int(index.shape[1])
    padding = {POSITION_IDS: np.arange(width), SUBTREE_ENDS: np.array(width)}
    batch: dict[str, Tensor] = {}
    for name, column in columns.items():
        if name in (ROW_LENGTHS, TREE_INDEX) or len(column) != num_tokens:
            values = column[rows]
        else:
            fill = padding.get(name, np.zeros((), column.dtype))
            values = np.where(valid, column[index], fill)
        tensor = torch.as_tensor(values)
        if tensor.is_floating_point():
            tensor = tensor.to(dtype)
        batch[name] = tensor.to(device)
    return batch
