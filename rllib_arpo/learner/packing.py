"""From trees to rows of tokens, and from rows to padded micro-batches.

`pack_paths` writes every trajectory as a row of its own: tokens that paths share
stand in several rows, so each leaf's advantage flows to all its tokens. Rows are
stored end to end ("flat columns"), padding appears only in `collate`:

    token_ids    p p m m t m | p p m m t m m m |            [N] all rows end to end
    loss_mask    . . 1 1 . 1 | . . 1 1 . 1 1 1 |            m: the model's own tokens
    row_lengths  6             8                            [R]
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from rllib_arpo.tree import RolloutTree, path

TOKEN_IDS = "token_ids"
POSITION_IDS = "position_ids"
LOSS_MASK = "loss_mask"
ROLLOUT_LOGPROBS = "rollout_logprobs"
OLD_LOGPROBS = "old_logprobs"
ADVANTAGES = "advantages"
POLICY_VERSIONS = "policy_versions"
ROW_LENGTHS = "row_lengths"
TREE_INDEX = "tree_index"

FlatColumns = dict[str, np.ndarray]


def pack_paths(
    trees: Sequence[RolloutTree], advantages: Sequence[np.ndarray] | None = None
) -> FlatColumns:
    """Write every trajectory of every tree as its own row.

    Only tokens of "model" segments carry loss: prompt and tool tokens never do, nor
    does the first token of a row, which nothing predicts.

    Args:
        trees: whole trees; may be empty.
        advantages: per tree, [num_leaves, num_segments]: what each path puts on each
            of its segments; None writes zeros.

    Returns:
        Flat columns [N] over all rows end to end: token_ids, position_ids int64,
        loss_mask bool, rollout_logprobs, advantages float32, policy_versions int32
        (-1 where the model wrote nothing); and per row [R] int64: row_lengths,
        tree_index (which of `trees` it comes from).
    """
    segments = [segment for tree in trees for segment in tree.segments]
    lengths = np.array([len(s.token_ids) for s in segments], np.int64)
    ends = np.cumsum(lengths)
    written = np.array([s.role == "model" for s in segments], bool)

    order: list[int] = []
    weights: list[np.ndarray] = []
    rows: list[tuple[int, int]] = []
    first = 0
    for number, tree in enumerate(trees):
        for leaf_number, leaf in enumerate(tree.leaves):
            steps = path(tree, leaf)
            order.extend(first + step for step in steps)
            rows.append((number, len(steps)))
            if advantages is not None:
                weights.append(advantages[number][leaf_number, steps])
        first += len(tree.segments)

    chosen = np.array(order, np.int64)
    starts = (ends - lengths)[chosen]
    gather = _ranges(starts, lengths[chosen])
    row_of_step = np.repeat(np.arange(len(rows)), [steps for _, steps in rows])
    row_lengths = np.bincount(
        row_of_step, weights=lengths[chosen], minlength=len(rows)
    ).astype(np.int64)
    row_starts = np.cumsum(row_lengths) - row_lengths

    loss_mask = np.repeat(written, lengths)[gather]
    loss_mask[row_starts[row_lengths > 0]] = False
    per_step = np.concatenate(weights) if weights else np.zeros(len(chosen), np.float32)
    return {
        TOKEN_IDS: _join([s.token_ids for s in segments], np.int64)[gather],
        POSITION_IDS: _ranges(np.zeros_like(row_starts), row_lengths),
        LOSS_MASK: loss_mask,
        ROLLOUT_LOGPROBS: _join(
            [_or_fill(s.logprobs, len(s.token_ids), 0.0) for s in segments], np.float32
        )[gather],
        ADVANTAGES: np.repeat(per_step, lengths[chosen]),
        POLICY_VERSIONS: _join(
            [_or_fill(s.policy_versions, len(s.token_ids), -1) for s in segments],
            np.int32,
        )[gather],
        ROW_LENGTHS: row_lengths,
        TREE_INDEX: np.array([number for number, _ in rows], np.int64),
    }


def _join(arrays: list[np.ndarray], dtype: type[np.generic]) -> np.ndarray:
    empty: np.ndarray = np.zeros(0, dtype)
    return np.concatenate([empty, *arrays]).astype(dtype, copy=False)


def _or_fill(values: np.ndarray, length: int, fill: float) -> np.ndarray:
    return values if len(values) == length else np.full(length, fill)


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """[Σ lengths]: start, start + 1, ... of each range, one range after the other."""
    offsets = np.cumsum(lengths) - lengths
    return np.repeat(starts - offsets, lengths) + np.arange(int(lengths.sum()))


def loss_tokens(columns: Mapping[str, np.ndarray]) -> np.ndarray:
    """[R] number of loss tokens of each row."""
    lengths = columns[ROW_LENGTHS]
    row_of_token = np.repeat(np.arange(len(lengths)), lengths)
    return np.bincount(row_of_token[columns[LOSS_MASK]], minlength=len(lengths))


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
        Arrays of row indices, longest rows first; every row exactly once.
    """
    ordered = rows[np.argsort(-row_lengths[rows], kind="stable")]
    groups: list[np.ndarray] = []
    start = 0
    while start < len(ordered):
        longest = max(int(row_lengths[ordered[start]]), 1)
        stop = start + max(max_tokens // longest, 1)
        groups.append(ordered[start:stop])
        start = stop
    return groups


def row_index(
    row_lengths: np.ndarray, rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Where the tokens of padded rows stand in the flat columns.

    Returns:
        index: [B, T] position in the flat columns, 0 for padding.
        valid: [B, T] bool, False for padding.
    """
    starts = (np.cumsum(row_lengths) - row_lengths)[rows]
    longest = int(row_lengths[rows].max(initial=0))
    steps = np.arange(longest)
    valid: np.ndarray = steps < row_lengths[rows, None]
    return np.where(valid, starts[:, None] + steps, 0), valid


def collate(
    columns: Mapping[str, np.ndarray],
    rows: np.ndarray,
    *,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """Pad some rows on the right into one micro-batch.

    Args:
        columns: flat columns as from `pack_paths`; further token columns [N] and row
            columns [R] are taken along.
        rows: [B] which rows.
        device: where the tensors go.

    Returns:
        Token columns as [B, T], zero in the padding (position_ids go on counting, so
        that no position repeats); row columns as [B].
    """
    num_tokens = int(columns[ROW_LENGTHS].sum())
    index, valid = row_index(columns[ROW_LENGTHS], rows)
    batch: dict[str, Tensor] = {}
    for name, column in columns.items():
        if name == POSITION_IDS:
            continue
        if name in (ROW_LENGTHS, TREE_INDEX) or len(column) != num_tokens:
            values = column[rows]
        else:
            values = np.where(valid, column[index], np.zeros((), column.dtype))
        batch[name] = _to_tensor(values, device)
    counted = np.arange(int(index.shape[1]))
    positions = np.where(valid, columns[POSITION_IDS][index], counted)
    batch[POSITION_IDS] = _to_tensor(positions, device)
    return batch


def _to_tensor(values: np.ndarray, device: torch.device | str) -> Tensor:
    return torch.as_tensor(values).to(device)
