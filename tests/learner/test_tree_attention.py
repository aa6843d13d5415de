"""Masks of trees, and which models may have them."""

import shutil

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers import AutoModelForCausalLM

from rllib_arpo.errors import ConfigError
from rllib_arpo.learner import microbatches
from rllib_arpo.learner.packing import NO_CUTS, pack_trees
from rllib_arpo.learner.tree_attention import (
    BLOCK,
    attention_cost,
    block_mask,
    dense_mask,
    use_tree_attention,
)
from rllib_arpo.tree import RolloutTree
from tests.learner.helpers import (
    TASK,
    build_learner,
    forked_tree,
    leaf,
    random_tree,
    segment,
)
from tests.models import save_tiny_model, tiny_model

CPU = torch.device("cpu")


def test_the_dense_mask_shows_each_token_its_ancestors() -> None:
    # prompt 0 1, then 2 3 and 4, both behind the prompt
    ends = torch.tensor([[5, 5, 4, 4, 5]])
    seen = dense_mask(ends, torch.float32)[0, 0] == 0
    assert seen.int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 0, 0, 1],
    ]
    assert dense_mask(ends, torch.float32)[0, 0, 0, 1] == -torch.inf


@st.composite
def large_ends(draw: st.DrawFn) -> torch.Tensor:
    """[2, T] subtree_ends of trees over several blocks, padded."""
    trees = []
    for _ in range(2):
        lengths = draw(st.lists(st.integers(1, 200), min_size=2, max_size=6))
        segments = [segment(None, "prompt", [1] * lengths[0])]
        for number, length in enumerate(lengths[1:]):
            parent = draw(st.integers(0, number))
            segments.append(segment(parent, "model", [1] * length))
        tips = set(range(len(segments))) - {s.parent for s in segments}
        leaves = tuple(leaf(tip, 0.0) for tip in sorted(tips))
        trees.append(RolloutTree(task=TASK, segments=tuple(segments), leaves=leaves))
    columns = pack_trees(trees, cost=NO_CUTS)
    rows = torch.arange(2).numpy()
    return microbatches.collate(columns, rows, multiple_of=BLOCK)["subtree_ends"]


@given(large_ends())
def test_the_block_mask_is_the_one_that_the_kernel_would_find(ends) -> None:
    length = ends.shape[1]
    built = block_mask(ends)

    def seen(row, head, query, key):
        return (key <= query) & (query < ends[row, key])

    found = create_block_mask(seen, 2, 1, length, length, device="cpu")
    assert built.to_dense().tolist() == found.to_dense().tolist()
    assert built.full_kv_num_blocks.tolist() == found.full_kv_num_blocks.tolist()


def test_block_and_dense_mask_give_the_same_attention() -> None:
    torch.manual_seed(0)
    ends = torch.full((1, 3 * BLOCK), 3 * BLOCK)
    ends[:, 100:200] = 200
    q, k, v = torch.randn(3, 1, 2, 3 * BLOCK, 16)
    dense = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=dense_mask(ends, q.dtype)
    )
    torch.testing.assert_close(
        flex_attention(q, k, v, block_mask=block_mask(ends)), dense
    )


def test_tokens_do_not_see_other_branches(tmp_path) -> None:
    tiny_model().save_pretrained(tmp_path)
    learner = build_learner(str(tmp_path))
    scores = []
    for token in (8, 30):
        tree = forked_tree()
        other = segment(2, "model", [token])
        tree = RolloutTree(
            task=TASK,
            segments=(*tree.segments[:3], other, tree.segments[4]),
            leaves=tree.leaves,
        )
        scores.append(learner._score_rows(pack_trees([tree])))
    # 8 or 30 stands at place 7, before 9 and 10 of the other branch.
    assert scores[0][7] != scores[1][7]
    assert scores[0][8:].tobytes() == scores[1][8:].tobytes()


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_supported_families_pass_the_check(family) -> None:
    use_tree_attention(tiny_model(family), CPU)


SMALL = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 32}


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (
            transformers.MistralConfig(**SMALL, **HEADS, sliding_window=8),
            "sliding",
        ),
        (
            transformers.BloomConfig(
                vocab_size=32, hidden_size=16, n_layer=2, n_head=2
            ),
            "does not take a mask",
        ),
        (
            transformers.MptConfig(vocab_size=32, d_model=16, n_layers=2, n_heads=2),
            "does not heed a mask",
        ),
        (transformers.MambaConfig(**SMALL), "linear_attention"),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_a_model_that_cannot_attend_to_ancestors_is_refused(config, reason) -> None:
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(ConfigError, match=f'{reason}.*packing="paths"'):
        use_tree_attention(model, CPU)


def test_a_learner_of_such_a_model_says_so_when_it_is_built(tmp_path) -> None:
    config = transformers.MistralConfig(
        **SMALL, **HEADS, sliding_window=8, pad_token_id=None
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match='packing="paths"'):
        build_learner(str(tmp_path))
    build_learner(str(tmp_path), packing="paths")


def test_attention_costs_in_proportion_to_its_share_of_the_work() -> None:
    model = tiny_model(hidden_size=16, num_heads=2, num_layers=2, tied=True)
    # Per pair 2 · 2 heads · 8 · 2 layers = 64 numbers multiplied; per token the
    # matrices: 2 · (4·16² + 3·16·32) + 32·16 = 5632. 1.5 · 64 / 5632
    assert attention_cost(model) == pytest.approx(1.5 * 64 / 5632)
    untied = tiny_model(hidden_size=16, num_heads=2, num_layers=2, tied=False)
    assert attention_cost(untied) == attention_cost(model)


@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs c++")
def test_block_masks_reach_the_model_through_transformers(tmp_path) -> None:
    """FlexAttention has no backward pass on a CPU; tests/gpu has the gradients."""
    learner = build_learner(save_tiny_model(tmp_path))
    columns = pack_trees([random_tree(i, length=60) for i in range(3)])
    dense = learner._score_rows(columns)
    probe = learner.language_model.weight_probe()
    learner.language_model.model.set_attn_implementation("flex_attention")
    assert attention_cost(learner.language_model.model) == 0
    np.testing.assert_allclose(learner._score_rows(columns), dense, atol=1e-5)
    flex_probe = learner.language_model.weight_probe()
    np.testing.assert_allclose(flex_probe.logprobs, probe.logprobs, atol=1e-5)
