"""A tree's row means the same as the rows of its paths, to the last digits."""

from collections.abc import Iterable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rllib_arpo.learner import microbatches, packing
from rllib_arpo.learner.packing import NO_CUTS, RowCost, pack_trees, plan_rows
from rllib_arpo.learner.torch_learner import ARPOTorchLearner
from rllib_arpo.learner.training_data import TreeTrainingData
from rllib_arpo.tree import RolloutTree, path, path_token_ids
from tests.learner.helpers import TASK, build_learner, forked_tree, leaf, segment
from tests.learner.trees import any_tree
from tests.models import save_tiny_model

CUTS = [NO_CUTS, RowCost(0.0, 12), RowCost(0.1, 1000), RowCost(10.0, 1000)]


def test_a_tree_is_one_row_with_each_segment_once() -> None:
    table = np.array([[0, 1, 2, 3, 4], [0, -2, 2, 3, -4]], np.float32)
    columns = pack_trees([forked_tree()], [table])
    # prompt 1 2, model 3 4 5, tool 6 7, then model 8 and model 9 10
    assert columns["token_ids"].tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    assert columns["position_ids"].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 7, 8]
    # Both 8 and 9 follow 7, at place 6.
    assert columns["predictors"].tolist() == [-1, 0, 1, 2, 3, 4, 5, 6, 6, 8]
    assert columns["subtree_ends"].tolist() == [10] * 7 + [8, 10, 10]
    assert columns["loss_weights"].tolist() == [0, 0, 2, 2, 2, 0, 0, 1, 1, 1]
    # 3 4 5: paths with 1 and -2, so A+ = 1/2, A- = -2/2
    assert columns["positive_advantages"][2:5].tolist() == [0.5] * 3
    assert columns["negative_advantages"][2:5].tolist() == [-1.0] * 3
    assert columns["positive_advantages"][7:].tolist() == [3, 0, 0]
    assert columns["negative_advantages"][7:].tolist() == [0, -4, -4]


def test_the_mean_over_sequences_weighs_a_token_by_the_paths_that_hold_it() -> None:
    table = np.array([[0, 1, 1, 1, 1], [0, -1, -1, -1, -1]], np.float32)
    columns = pack_trees([forked_tree()], [table], aggregation="sequence_mean")
    # paths with 3 + 1 and 3 + 2 loss tokens: 1/4 + 1/5 on the shared ones
    expected = [0, 0, 0.45, 0.45, 0.45, 0, 0, 0.25, 0.2, 0.2]
    np.testing.assert_allclose(columns["loss_weights"], expected)
    np.testing.assert_allclose(columns["positive_advantages"][2], 0.25 / 0.45)
    np.testing.assert_allclose(columns["negative_advantages"][2], -0.2 / 0.45)


def test_a_cut_repeats_the_ancestors_without_loss() -> None:
    columns = pack_trees([forked_tree()], cost=RowCost(0.0, 9))
    assert columns["row_lengths"].tolist() == [8, 9]
    assert columns["token_ids"].tolist() == [
        *[1, 2, 3, 4, 5, 6, 7, 8],
        *[1, 2, 3, 4, 5, 6, 7, 9, 10],
    ]
    assert columns["loss_weights"].tolist() == [
        *[0, 0, 2, 2, 2, 0, 0, 1],
        *[0, 0, 0, 0, 0, 0, 0, 1, 1],
    ]


def pairs_tree(prompt: int, shared: int, own: int, pairs: int) -> RolloutTree:
    segments, leaves = [segment(None, "prompt", [1] * prompt)], []
    for _ in range(pairs):
        trunk = len(segments)
        segments.append(segment(0, "model", [2] * shared))
        for _ in range(2):
            segments.append(segment(trunk, "model", [3] * own))
            leaves.append(leaf(len(segments) - 1, 0.0))
    return RolloutTree(task=TASK, segments=tuple(segments), leaves=tuple(leaves))


@pytest.mark.parametrize(
    ("attention", "lengths"),
    [
        # prompt 4, twice 3 shared and 5 own: one row of 4 + 2·(3 + 10)
        (0.0, [30]),
        # joining leaves saves 7 + a·(49 - 2·25), positive below a = 7; joining the
        # pairs saves 4 + a·(16 - 2·169), positive below a = 4/322 = .0124
        (0.012, [30]),
        (0.013, [17, 17]),
        (6.9, [17, 17]),
        (7.1, [12, 12, 12, 12]),
    ],
)
def test_rows_are_joined_as_long_as_that_costs_less(attention, lengths) -> None:
    tree = pairs_tree(4, 3, 5, 2)
    columns = pack_trees([tree], cost=RowCost(attention, 1000))
    assert columns["row_lengths"].tolist() == lengths


@given(any_tree(), st.sampled_from(CUTS))
def test_rows_are_whole_paths_and_every_leaf_is_in_one(
    tree: RolloutTree, cost: RowCost
) -> None:
    rows = plan_rows(tree, cost)
    longest = max(len(path_token_ids(tree, end)) for end in tree.leaves)
    for row in rows:
        assert len(set(row)) == len(row)
        for index in row:
            parent = tree.segments[index].parent
            assert parent is None or row.index(parent) < row.index(index)
        length = sum(len(tree.segments[i].token_ids) for i in row)
        assert length <= max(cost.max_tokens, longest)
    for end in tree.leaves:
        assert any(set(path(tree, end)) <= set(row) for row in rows)


@given(any_tree(), st.sampled_from(CUTS))
def test_what_a_token_sees_is_its_path(tree: RolloutTree, cost: RowCost) -> None:
    """The tokens that each place attends to, in order, are those above it."""
    columns = pack_trees([tree], cost=cost)
    starts = np.cumsum(columns["row_lengths"]) - columns["row_lengths"]
    for row, segments in enumerate(plan_rows(tree, cost)):
        start, place = starts[row], 0
        for index in segments:
            above = path(tree, leaf(index, 0.0))
            expected = [tree.segments[i].token_ids for i in above]
            length = len(expected[-1])
            if length:
                last = place + length - 1
                seen = [
                    key
                    for key in range(last + 1)
                    if last < columns["subtree_ends"][start + key]
                ]
                tokens = np.concatenate(expected)
                assert columns["token_ids"][start + np.array(seen)].tolist() == [
                    *tokens
                ]
                assert columns["position_ids"][start + last] == len(tokens) - 1
                before = seen[-length - 1] if length < len(seen) else -1
                assert columns["predictors"][start + place] == before
            place += length


OPTIONS = {
    "clip": {},
    "asymmetric clip, no dual clip": {"clip_param_high": 0.4, "dual_clip": None},
    "dual clip": {"dual_clip": 1.1},
    "KL": {"kl_coeff": 0.3},
    "entropy": {"entropy_coeff": 0.2},
    "importance sampling": {"tis_cap": 1.05},
    "mean over sequences": {"loss_aggregation": "sequence_mean"},
    "all": {
        "clip_param_high": 0.4,
        "dual_clip": 1.5,
        "kl_coeff": 0.3,
        "entropy_coeff": 0.2,
        "tis_cap": 1.05,
        "loss_aggregation": "sequence_mean",
        "advantage_normalization": "batch",
        "normalize_by_std": False,
    },
}


@pytest.fixture(scope="module")
def learners(tmp_path_factory):
    """Learners by family, packing and settings, each built once."""
    built: dict[str, ARPOTorchLearner] = {}
    folders: dict[str, str] = {}

    def get(family: str, dtype: torch.dtype, **given) -> ARPOTorchLearner:
        if family not in folders:
            folder = tmp_path_factory.mktemp(family)
            folders[family] = save_tiny_model(folder, family, tied=False)
        key = f"{family} {dtype} {sorted(given.items())}"
        if key not in built:
            learner = build_learner(
                folders[family], max_tokens_per_microbatch=40, **given
            )
            for number, scorer in enumerate(learner.language_model.scorers):
                if number:  # a reference that differs
                    for parameter in scorer.parameters():
                        parameter.data += 0.05 * parameter.data.sin()
                native_norms(scorer)
                scorer.to(dtype)
            built[key] = learner
        return built[key]

    return get


def native_norms(module: torch.nn.Module) -> None:
    """Norms in the model's own precision: Hugging Face's round to float32."""
    for name, child in module.named_children():
        if type(child).__name__.endswith("RMSNorm"):
            norm = torch.nn.RMSNorm(child.weight.shape, eps=child.variance_epsilon)
            norm.weight = child.weight
            setattr(module, name, norm)
        else:
            native_norms(child)


def loss_and_gradients(
    learner: ARPOTorchLearner, trees: list[RolloutTree]
) -> tuple[float, dict[str, torch.Tensor]]:
    columns = learner._run_connectors(TreeTrainingData(episodes=trees))
    columns = learner.prepare_columns(columns)
    if learner.settings.tis_cap is not None:
        # Another policy than the sampler's, else every weight is 1.
        columns[packing.OLD_LOGPROBS] = 0.97 * columns[packing.ROLLOUT_LOGPROBS]
    rows = np.flatnonzero(microbatches.loss_tokens(columns))
    total = microbatches.loss_weight(columns, rows)
    learner.language_model.zero_grad()
    loss = 0.0
    for chosen in learner._microbatches(columns, rows):
        batch, fwd_out = learner._forward(columns, chosen, learner.entropy_mode)
        token_losses = learner.compute_token_losses(batch, fwd_out)
        part = learner._weigh(batch, token_losses, total)
        part.backward()
        loss += float(part.detach())
    model = learner.language_model.model
    return loss, {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
    }


@pytest.mark.parametrize("attribution", ["soft", "hard"])
@pytest.mark.parametrize("option", OPTIONS)
@settings(max_examples=12)
@given(
    trees=st.lists(any_tree(), min_size=1, max_size=3),
    max_tokens_per_row=st.sampled_from([None, 12]),
)
def test_packed_loss_and_gradients_equal_those_of_paths(
    learners, option, attribution, trees, max_tokens_per_row
) -> None:
    given_settings = {"advantage_attribution": attribution, **OPTIONS[option]}
    paths = learners("qwen2", torch.float64, packing="paths", **given_settings)
    tree = learners(
        "qwen2",
        torch.float64,
        packing="tree",
        max_tokens_per_row=max_tokens_per_row,
        **given_settings,
    )
    expected_loss, expected = loss_and_gradients(paths, trees)
    loss, gradients = loss_and_gradients(tree, trees)
    assert abs(loss - expected_loss) <= 1e-9
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).abs().max() <= 1e-9, name


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("attribution", ["soft", "hard"])
@settings(max_examples=8, deadline=None)
@given(trees=st.lists(any_tree(), min_size=1, max_size=3))
def test_families_agree_in_single_precision(
    learners, family, attribution, trees
) -> None:
    found = [
        loss_and_gradients(
            learners(
                family,
                torch.float32,
                packing=layout,
                advantage_attribution=attribution,
                **OPTIONS["all"],
            ),
            trees,
        )
        for layout in ("paths", "tree")
    ]
    (expected_loss, expected), (loss, gradients) = found
    assert loss == pytest.approx(expected_loss, rel=1e-5, abs=1e-6)
    # Relative to the whole gradient: single entries cancel to any smallness.
    difference = [gradients[name] - expected[name] for name in expected]
    assert norm(difference) <= 1e-5 * norm(expected.values())


def norm(tensors: Iterable[torch.Tensor]) -> float:
    return float(torch.nn.utils.get_total_norm(list(tensors)))
