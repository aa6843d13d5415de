"""From trees to rows of tokens.

`pack_trees` walks a tree depth first and writes each segment once; `pack_paths` gives
every trajectory a row of its own, so tokens that paths share stand in several rows.
Both mean the same loss (see `_Shares`). Rows are stored end to end ("flat columns"):

    tree          p p m m t m | m m m          p p m m t: shared by two leaves
    paths         p p m m t m | p p m m t m m m
    loss_mask     . . 1 1 . 1 | . . 1 1 . 1 1 1    [N] m: the model's own tokens
    row_lengths   6             8                  [R]

A tree may be cut into several rows. Each then repeats the ancestors that it needs;
such repeats carry no loss.
"""

import heapq
import sys
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import numpy as np

from rllib_arpo.learner.losses import Aggregation
from rllib_arpo.tree import RolloutTree, path

TOKEN_IDS = "token_ids"
POSITION_IDS = "position_ids"
LOSS_MASK = "loss_mask"
LOSS_WEIGHTS = "loss_weights"
ROLLOUT_LOGPROBS = "rollout_logprobs"
OLD_LOGPROBS = "old_logprobs"
POSITIVE_ADVANTAGES = "positive_advantages"
NEGATIVE_ADVANTAGES = "negative_advantages"
POLICY_VERSIONS = "policy_versions"
PREDICTORS = "predictors"
SUBTREE_ENDS = "subtree_ends"
ROW_LENGTHS = "row_lengths"
TREE_INDEX = "tree_index"

FlatColumns = dict[str, np.ndarray]
Packing = Literal["tree", "paths"]


class RowCost(NamedTuple):
    """What a row of T tokens costs: T + attention·T² in time, at most `max_tokens`.

    Attributes:
        attention: cost of a pair of tokens, in units of a token's linear layers; 0
            where attention skips what is masked.
        max_tokens: a longer row is made only for a single path that is longer.
    """

    attention: float
    max_tokens: int


NO_CUTS = RowCost(attention=0.0, max_tokens=sys.maxsize)


class _Shares(NamedTuple):
    """What the paths through a segment put on each of its tokens, added up.

    Path i weighs wᵢ = 1 ("token_mean") or 1/|yᵢ| ("sequence_mean"; |yᵢ| its loss
    tokens) and has the advantage Âᵢ on the segment. A token's ratio r is the same for
    all of them, so their losses on it depend on three sums only, and one token with
    these stands for all its copies exactly:

        W = Σ wᵢ     A⁺ = Σ wᵢ·max(Âᵢ, 0) / W     A⁻ = Σ wᵢ·min(Âᵢ, 0) / W

    All are [num_segments] float64.
    """

    weights: np.ndarray
    positive: np.ndarray
    negative: np.ndarray


class _Row(NamedTuple):
    """Segments of one tree, depth first; `own` says which of them carry loss."""

    tree: int
    segments: list[int]
    own: list[bool]
    shares: _Shares


def pack_paths(
    trees: Sequence[RolloutTree],
    advantages: Sequence[np.ndarray] | None = None,
    *,
    aggregation: Aggregation = "token_mean",
) -> FlatColumns:
    """Write every trajectory of every tree as its own row.

    Only tokens of "model" segments carry loss: prompt and tool tokens never do, nor
    does the first token of a path, which nothing predicts.

    Args:
        trees: whole trees; may be empty.
        advantages: per tree, [num_leaves, num_segments]: what each path puts on each
            of its segments; None writes zeros.
        aggregation: which mean the loss is.

    Returns:
        Flat columns [N] over all rows end to end: token_ids, position_ids int64,
        loss_mask bool, rollout_logprobs float32, loss_weights, positive_advantages,
        negative_advantages float64, policy_versions int32 (-1 where the model wrote
        nothing); and per row [R] int64: row_lengths, tree_index (which of `trees` it
        comes from).
    """
    rows: list[_Row] = []
    for number, tree in enumerate(trees):
        table = _table(advantages, number, tree)
        weights = _path_weights(tree, aggregation)
        for leaf_number, leaf in enumerate(tree.leaves):
            steps = path(tree, leaf)
            alone = np.zeros(len(weights), bool)
            alone[leaf_number] = True
            shares = _add_up(table, weights, alone[:, None])
            rows.append(_Row(number, steps, [True] * len(steps), shares))
    columns = _columns(trees, rows)
    del columns[PREDICTORS], columns[SUBTREE_ENDS]  # the token before; the row's end
    return columns


def pack_trees(
    trees: Sequence[RolloutTree],
    advantages: Sequence[np.ndarray] | None = None,
    *,
    aggregation: Aggregation = "token_mean",
    cost: RowCost = NO_CUTS,
) -> FlatColumns:
    """Write every segment of every tree once, and again where a cut needs it.

    Args:
        trees: as in `pack_paths`.
        advantages: as in `pack_paths`.
        aggregation: as in `pack_paths`.
        cost: where to cut.

    Returns:
        The columns of `pack_paths`, and two more [N] int64 of places in the row:
        predictors (the token whose hidden state predicts this one, -1 for none) and
        subtree_ends (tokens before that place, and only they, may attend to it; see
        `tree_attention`). position_ids count from the root of the tree.
    """
    rows: list[_Row] = []
    for number, tree in enumerate(trees):
        below = np.zeros((len(tree.leaves), len(tree.segments)), bool)
        for leaf_number, leaf in enumerate(tree.leaves):
            below[leaf_number, path(tree, leaf)] = True
        shares = _add_up(
            _table(advantages, number, tree), _path_weights(tree, aggregation), below
        )
        written: set[int] = set()
        for segments in plan_rows(tree, cost):
            own = [index not in written for index in segments]
            rows.append(_Row(number, segments, own, shares))
            written.update(segments)
    return _columns(trees, rows)


def path_lengths(tree: RolloutTree) -> list[int]:
    """[num_segments] tokens from the root to the end of each segment."""
    lengths: list[int] = []
    for segment in tree.segments:
        above = 0 if segment.parent is None else lengths[segment.parent]
        lengths.append(above + len(segment.token_ids))
    return lengths


def plan_rows(tree: RolloutTree, cost: RowCost) -> list[list[int]]:
    """Cut a tree into rows so that their cost adds up to little.

    From the leaves to the root, rows that meet at a segment are joined, shortest
    first. Two rows of D shared and x and y further tokens become one of D + x + y,
    which saves D + attention·(D² - 2xy): the shared tokens, against the pairs that a
    dense mask computes in vain.

    Args:
        tree: any tree.
        cost: of a row.

    Returns:
        Per row its segments, depth first, each with all its ancestors; every segment
        that a leaf hangs on is in at least one row.
    """
    depth = path_lengths(tree)
    open_rows: list[list[tuple[int, list[int]]]] = [[] for _ in tree.segments]
    done: list[list[int]] = []
    ends = {leaf.segment for leaf in tree.leaves}
    for index in range(len(tree.segments) - 1, -1, -1):
        rows = open_rows[index]
        if not rows and index in ends:
            rows = [(depth[index], [index])]
        joined = _join_rows(rows, depth[index], cost)
        parent = tree.segments[index].parent
        if parent is None:
            done.extend(tips for _, tips in joined)
        else:
            open_rows[parent].extend(joined)
    order = _depth_first(tree)
    return [
        sorted(_with_ancestors(tree, tips), key=order.__getitem__)
        for tips in sorted(done, key=lambda tips: min(order[tip] for tip in tips))
    ]


def _join_rows(
    rows: list[tuple[int, list[int]]], shared: int, cost: RowCost
) -> list[tuple[int, list[int]]]:
    """Join (length, tips) rows, the shortest two first, as long as that saves."""
    heap = sorted(rows)
    while len(heap) > 1:
        first, second = heapq.heappop(heap), heapq.heappop(heap)
        length = first[0] + second[0] - shared
        x, y = first[0] - shared, second[0] - shared
        saved = shared + cost.attention * (shared * shared - 2 * x * y)
        if length > cost.max_tokens or saved < 0:
            return [first, second, *heap]
        heapq.heappush(heap, (length, first[1] + second[1]))
    return heap


def _depth_first(tree: RolloutTree) -> list[int]:
    """[num_segments] the place of each segment in a depth-first walk."""
    children: list[list[int]] = [[] for _ in tree.segments]
    stack: list[int] = []
    for index, segment in enumerate(tree.segments):
        (stack if segment.parent is None else children[segment.parent]).append(index)
    order = [0] * len(tree.segments)
    stack.reverse()
    for place in range(len(order)):
        index = stack.pop()
        order[index] = place
        stack.extend(reversed(children[index]))
    return order


def _with_ancestors(tree: RolloutTree, tips: Iterable[int]) -> set[int]:
    found: set[int] = set()
    for tip in tips:
        index: int | None = tip
        while index is not None and index not in found:
            found.add(index)
            index = tree.segments[index].parent
    return found


def _table(
    advantages: Sequence[np.ndarray] | None, number: int, tree: RolloutTree
) -> np.ndarray:
    """[num_leaves, num_segments] float64 advantages of one tree."""
    if advantages is None:
        return np.zeros((len(tree.leaves), len(tree.segments)))
    return advantages[number].astype(np.float64)


def _path_weights(tree: RolloutTree, aggregation: Aggregation) -> np.ndarray:
    """[num_leaves] float64: wᵢ, 0 for a path without loss tokens."""
    counts: list[int] = []
    for leaf in tree.leaves:
        steps = [tree.segments[i] for i in path(tree, leaf)]
        written = sum(len(s.token_ids) for s in steps if s.role == "model")
        first = next((s for s in steps if len(s.token_ids)), None)
        unpredicted = first is not None and first.role == "model"
        counts.append(written - unpredicted)
    tokens = np.array(counts, np.float64)
    if aggregation == "token_mean":
        return (tokens > 0).astype(np.float64)
    return np.divide(1.0, tokens, out=np.zeros_like(tokens), where=tokens > 0)


def _add_up(table: np.ndarray, weights: np.ndarray, below: np.ndarray) -> _Shares:
    """Sums over the leaves that `below` [num_leaves, num_segments or 1] marks."""
    counted = np.where(below, weights[:, None], 0.0)
    total = np.broadcast_to(counted.sum(0), table.shape[1:])
    divisor = np.where(total > 0, total, 1.0)
    # A NaN stays one, so that the learner's finite check sees it.
    return _Shares(
        total,
        (counted * np.maximum(table, 0.0)).sum(0) / divisor,
        (counted * np.minimum(table, 0.0)).sum(0) / divisor,
    )


class _Places(NamedTuple):
    """Per segment of all rows [n]: where it stands."""

    depth: np.ndarray
    predictor: np.ndarray
    end: np.ndarray


def _places(trees: Sequence[RolloutTree], rows: Sequence[_Row]) -> _Places:
    depths: list[int] = []
    predictors: list[int] = []
    ends: list[int] = []
    for row in rows:
        segments = trees[row.tree].segments
        place: dict[int | None, int] = {}
        first = len(depths)
        start = 0
        last: list[int] = []  # place in the row of the path's last token so far
        for index in row.segments:
            length = len(segments[index].token_ids)
            above = place.get(segments[index].parent)
            depth, before = 0, -1
            if above is not None:
                parent = row.segments[above]
                depth = depths[first + above] + len(segments[parent].token_ids)
                before = last[above]
            place[index] = len(last)
            depths.append(depth)
            predictors.append(before)
            last.append(start + length - 1 if length else before)
            start += length
            ends.append(start)
        for number in range(len(last) - 1, -1, -1):
            above = place.get(segments[row.segments[number]].parent)
            if above is not None:
                ends[first + above] = max(ends[first + above], ends[first + number])
    return _Places(
        *(np.array(values, np.int64) for values in (depths, predictors, ends))
    )


def _columns(trees: Sequence[RolloutTree], rows: Sequence[_Row]) -> FlatColumns:
    segments = [segment for tree in trees for segment in tree.segments]
    lengths = np.array([len(s.token_ids) for s in segments], np.int64)
    ends = np.cumsum(lengths)
    first = np.cumsum([0, *(len(tree.segments) for tree in trees)])
    written = np.array([s.role == "model" for s in segments], bool)

    chosen = _join([first[row.tree] + np.array(row.segments) for row in rows], np.int64)
    taken = lengths[chosen]
    gather = _ranges((ends - lengths)[chosen], taken)
    row_of_step = np.repeat(np.arange(len(rows)), [len(row.segments) for row in rows])
    row_lengths = np.bincount(row_of_step, weights=taken, minlength=len(rows)).astype(
        np.int64
    )
    places = _places(trees, rows)
    predictors = _ranges(np.zeros_like(row_lengths), row_lengths) - 1
    heads = (np.cumsum(taken) - taken)[taken > 0]
    predictors[heads] = places.predictor[taken > 0]

    def spread(name: str) -> np.ndarray:
        values = [getattr(row.shares, name)[row.segments] for row in rows]
        return np.repeat(_join(values, np.float64), taken)

    carries = _join([np.array(row.own) for row in rows], np.bool_) & written[chosen]
    carries = np.repeat(carries, taken) & (predictors >= 0)
    loss_weights = np.where(carries, spread("weights"), 0.0)
    return {
        TOKEN_IDS: _join([s.token_ids for s in segments], np.int64)[gather],
        POSITION_IDS: _ranges(places.depth, taken),
        LOSS_MASK: loss_weights > 0,
        LOSS_WEIGHTS: loss_weights,
        ROLLOUT_LOGPROBS: _join(
            [_or_fill(s.logprobs, len(s.token_ids), 0.0) for s in segments], np.float32
        )[gather],
        POSITIVE_ADVANTAGES: spread("positive"),
        NEGATIVE_ADVANTAGES: spread("negative"),
        POLICY_VERSIONS: _join(
            [_or_fill(s.policy_versions, len(s.token_ids), -1) for s in segments],
            np.int32,
        )[gather],
        PREDICTORS: predictors,
        SUBTREE_ENDS: np.repeat(places.end, taken),
        ROW_LENGTHS: row_lengths,
        TREE_INDEX: np.array([row.tree for row in rows], np.int64),
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
