"""How old a tree is."""

from dataclasses import replace

import numpy as np

from rllib_arpo.rollouts.tree_stream import age
from rllib_arpo.tree import RolloutTree
from tests.learner.helpers import TASK, forked_tree, leaf, segment


def test_a_tree_is_as_old_as_its_oldest_token() -> None:
    tree = forked_tree()  # all tokens of version 3
    assert age(tree, 5) == 2
    first = tree.segments[1]
    older = replace(first, policy_versions=np.array([3, 1, 4], np.int32))
    tree = replace(tree, segments=(tree.segments[0], older, *tree.segments[2:]))
    assert age(tree, 5) == 4


def test_a_tree_whose_prompt_fills_the_context_is_never_too_old() -> None:
    tree = RolloutTree(
        task=TASK,
        segments=(segment(None, "prompt", [1, 2]), segment(0, "model", [])),
        leaves=(leaf(1, 0.0),),
    )
    assert age(tree, 5) == 0
