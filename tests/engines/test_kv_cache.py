from itertools import chain

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from rllib_arpo.engines.kv_cache import KeysValues, PrefixTree, common_prefix


class Store:
    """Keys that are the tokens themselves, and what was asked for."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = np.array(tokens, np.int32)
        self.saved = 0

    def save(self, start: int, end: int) -> KeysValues:
        self.saved += end - start
        keys = torch.from_numpy(self.tokens[start:end].copy()).view(1, -1, 1, 1)
        return keys, -keys


def insert(tree: PrefixTree, tokens: list[int]) -> int:
    """How many tokens were new."""
    store = Store(tokens)
    tree.insert(store.tokens, store.save)
    return store.saved


def found(tree: PrefixTree, tokens: list[int]) -> list[int]:
    match = tree.match(np.array(tokens, np.int32))
    keys = [k[0, :n, 0, 0].tolist() for (k, _), n in match.edges]
    assert match.length == sum(map(len, keys))
    return list(chain(*keys))


sequences = st.lists(st.lists(st.integers(0, 2), max_size=8), max_size=12)


def test_common_prefix_counts_equal_tokens_at_the_start() -> None:
    def count(one: list[int], other: list[int]) -> int:
        return common_prefix(np.array(one), np.array(other))

    assert count([1, 2, 3], [1, 2, 4]) == 2
    assert count([1, 2], [1, 2, 4]) == 2
    assert count([3], [4]) == count([], [4]) == 0


@given(stored=sequences, asked=st.lists(st.integers(0, 2), max_size=8))
def test_the_longest_stored_prefix_is_found(
    stored: list[list[int]], asked: list[int]
) -> None:
    tree = PrefixTree(1000)
    for tokens in stored:
        insert(tree, tokens)
    prefixes = {tuple(tokens[:n]) for tokens in stored for n in range(len(tokens) + 1)}
    longest = max(n for n in range(len(asked) + 1) if (*asked[:n],) in prefixes | {()})
    assert found(tree, asked) == asked[:longest]
    # Every distinct non-empty prefix is one token of the tree.
    assert tree.num_tokens == len(prefixes - {()})


@given(stored=sequences, bound=st.integers(0, 12))
def test_the_tree_never_holds_more_than_its_bound_and_stays_a_tree(
    stored: list[list[int]], bound: int
) -> None:
    tree = PrefixTree(bound)
    for tokens in stored:
        insert(tree, tokens)
        assert tree.num_tokens <= bound
        if len(tokens) <= bound:
            assert found(tree, tokens) == tokens


def test_a_shared_prefix_is_stored_once() -> None:
    tree = PrefixTree(1000)
    assert insert(tree, [1, 2, 3, 4]) == 4
    assert insert(tree, [1, 2, 5]) == 1
    assert insert(tree, [1, 2]) == 0
    assert tree.num_tokens == 5


def test_the_least_recently_used_end_is_dropped_first() -> None:
    tree = PrefixTree(6)
    insert(tree, [1, 2, 3])
    insert(tree, [1, 2, 4])
    insert(tree, [7, 8])
    found(tree, [1, 2, 3])
    insert(tree, [9])  # 7 tokens: [.., 4] has waited longest
    assert found(tree, [1, 2, 4]) == [1, 2]
    assert found(tree, [1, 2, 3]) == [1, 2, 3]
    assert found(tree, [7, 8]) == [7, 8]
