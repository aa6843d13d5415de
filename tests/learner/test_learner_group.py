"""What a LearnerGroup of ours does beyond RLlib's."""

from tests.learner.helpers import random_tree
from tests.learner.pairs import group_state, group_weights, on_both, train
from tests.tiny_runs import same

TREES = [random_tree(seed) for seed in range(4)]


def test_both_learners_hold_the_same_weights_to_the_bit(tiny, pair) -> None:
    group = pair.build(tiny, "ddp", max_tokens_per_microbatch=40)
    train(group, TREES)
    first, second = on_both(group, lambda learner: learner.language_model.get_state())
    assert same(first, second)


def test_a_group_is_restored_to_the_bit(tiny, pair) -> None:
    group = pair.build(tiny, "ddp")
    state = group.get_state()
    train(group, TREES)
    expected = group_state(group)
    group.set_state(state)
    train(group, TREES)
    assert same(group_weights(group), expected["rl_module"]["default_policy"])


def test_trees_are_spread_by_what_their_rows_cost(tiny, pair) -> None:
    group = pair.build(tiny, "ddp")
    costs = on_both(group, lambda learner: learner.row_cost)
    assert costs[0] == costs[1] == group._row_cost()
    assert costs[0].max_tokens == 16384 and costs[0].attention > 0
    by_path = pair.build(tiny, "ddp", packing="paths")
    assert by_path._row_cost() is None
