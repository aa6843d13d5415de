"""Rows from trees, micro-batches from rows."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from rllib_arpo.learner.microbatches import collate, loss_tokens, split_rows
from rllib_arpo.learner.packing import pack_paths
from rllib_arpo.tree import RolloutTree, path_token_ids
from tests.learner.helpers import TASK, forked_tree, leaf, random_tree, segment


def test_every_path_is_a_row_and_only_model_tokens_carry_loss() -> None:
    table = np.array([[0, 1, 2, 3, 4], [10, 11, 12, 13, 14]], np.float32)
    columns = pack_paths([forked_tree()], [table])
    # prompt 1 2, model 3 4 5, tool 6 7, then model 8 or model 9 10
    assert columns["token_ids"].tolist() == [
        *[1, 2, 3, 4, 5, 6, 7, 8],
        *[1, 2, 3, 4, 5, 6, 7, 9, 10],
    ]
    assert columns["loss_mask"].astype(int).tolist() == [
        *[0, 0, 1, 1, 1, 0, 0, 1],
        *[0, 0, 1, 1, 1, 0, 0, 1, 1],
    ]
    assert columns["positive_advantages"].tolist() == [
        *[0, 0, 1, 1, 1, 2, 2, 3],
        *[10, 10, 11, 11, 11, 12, 12, 14, 14],
    ]
    assert not columns["negative_advantages"].any()
    assert columns["loss_weights"].tolist() == columns["loss_mask"].tolist()
    assert columns["policy_versions"].tolist() == [
        *[-1, -1, 3, 3, 3, -1, -1, 3],
        *[-1, -1, 3, 3, 3, -1, -1, 3, 3],
    ]
    assert columns["position_ids"].tolist() == [*range(8), *range(9)]
    assert columns["row_lengths"].tolist() == [8, 9]
    assert columns["tree_index"].tolist() == [0, 0]
    assert loss_tokens(columns).tolist() == [4, 5]


def test_the_first_token_of_a_row_is_never_predicted() -> None:
    tree = RolloutTree(
        task=TASK,
        segments=(segment(None, "prompt", []), segment(0, "model", [5, 6])),
        leaves=(leaf(1, 1.0),),
    )
    assert pack_paths([tree])["loss_mask"].tolist() == [False, True]


def test_no_trees_make_no_rows() -> None:
    columns = pack_paths([])
    assert len(columns["token_ids"]) == len(columns["row_lengths"]) == 0
    assert len(loss_tokens(columns)) == 0


@given(st.lists(st.integers(0, 100), max_size=4))
def test_rows_hold_the_tokens_of_their_paths(seeds: list[int]) -> None:
    trees = [random_tree(seed) for seed in seeds]
    columns = pack_paths(trees)
    ends = np.cumsum(columns["row_lengths"])
    rows = np.split(columns["token_ids"], ends)[: len(ends)]
    paths = [path_token_ids(tree, leaf) for tree in trees for leaf in tree.leaves]
    assert len(rows) == len(paths)
    for row, tokens in zip(rows, paths, strict=True):
        assert row.tolist() == tokens.tolist()


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=30),
    st.integers(1, 100),
    st.data(),
)
def test_micro_batches_hold_each_row_once_within_the_budget(
    lengths: list[int], max_tokens: int, data: st.DataObject
) -> None:
    row_lengths = np.array(lengths)
    some = data.draw(st.sets(st.integers(0, len(lengths) - 1)))
    groups = split_rows(row_lengths, np.array(sorted(some), int), max_tokens=max_tokens)
    assert sorted(row for group in groups for row in group) == sorted(some)
    for group in groups:
        padded = len(group) * row_lengths[group].max()
        assert padded <= max_tokens or len(group) == 1
        assert row_lengths[group].min() >= 0.8 * row_lengths[group].max()


def test_collate_pads_on_the_right() -> None:
    columns = pack_paths([forked_tree()])
    columns["extra"] = np.arange(17, dtype=np.float32)
    batch = collate(columns, np.array([1, 0]))
    assert batch["token_ids"].tolist() == [
        [1, 2, 3, 4, 5, 6, 7, 9, 10],
        [1, 2, 3, 4, 5, 6, 7, 8, 0],
    ]
    assert batch["loss_mask"][1].tolist() == [0, 0, 1, 1, 1, 0, 0, 1, 0]
    assert batch["extra"].tolist() == [[*range(8, 17)], [*range(8), 0]]
    # No position twice in a row: a repeated 0 would look like a second sequence.
    assert batch["position_ids"].tolist() == [[*range(9)], [*range(9)]]
    assert batch["row_lengths"].tolist() == [9, 8]
    assert batch["loss_mask"].dtype == torch.bool
