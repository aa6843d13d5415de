"""Rows of trees on a GPU: FlexAttention against paths, bfloat16, memory."""

import numpy as np
import pytest
import torch

from rllib_arpo.learner import microbatches, packing
from rllib_arpo.learner.torch_learner import ARPOTorchLearner
from rllib_arpo.learner.training_data import TreeTrainingData
from rllib_arpo.tree import RolloutTree
from tests.learner.helpers import TASK, build_learner, leaf, segment
from tests.models import save_tiny_model


def large_tree(seed: int, *, trunk: int = 150, own: int = 150) -> RolloutTree:
    """A prompt of 200 tokens and four pairs of leaves that share `trunk` tokens."""
    rng = np.random.default_rng(seed)

    def model(parent: int, length: int):
        return segment(
            parent,
            "model",
            rng.integers(0, 64, length).tolist(),
            -rng.uniform(3, 5, length),
        )

    segments = [segment(None, "prompt", rng.integers(0, 64, 200).tolist())]
    leaves = []
    for _ in range(4):
        shared = len(segments)
        segments.append(model(0, trunk))
        for _ in range(2):
            segments.append(model(shared, own))
            leaves.append(leaf(len(segments) - 1, float(rng.integers(0, 3))))
    return RolloutTree(task=TASK, segments=tuple(segments), leaves=tuple(leaves))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    return save_tiny_model(
        folder, vocab_size=64, hidden_size=128, num_heads=4, max_positions=65_536
    )


def on_gpu(model: str, **settings) -> ARPOTorchLearner:
    return build_learner(model, num_gpus_per_learner=1, **settings)


def gradients(
    learner: ARPOTorchLearner, trees: list[RolloutTree]
) -> tuple[float, torch.Tensor]:
    columns = learner._run_connectors(TreeTrainingData(episodes=trees))
    columns = learner.prepare_columns(columns)
    rows = np.arange(len(columns[packing.ROW_LENGTHS]))
    total = microbatches.loss_weight(columns, rows)
    learner.language_model.zero_grad()
    loss = 0.0
    for chosen in learner._microbatches(columns, rows):
        batch, fwd_out = learner._forward(columns, chosen, learner.entropy_mode)
        part = learner._weigh(
            batch, learner.compute_token_losses(batch, fwd_out), total
        )
        part.backward()
        loss += float(part.detach())
    parameters = learner.language_model.scorer.parameters()
    return loss, torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])


@pytest.mark.parametrize("attribution", ["soft", "hard"])
def test_flex_attention_gives_the_gradients_of_paths(model, attribution) -> None:
    settings = {
        "advantage_attribution": attribution,
        "kl_coeff": 0.1,
        "entropy_coeff": 0.1,
        "tis_cap": 2.0,
    }
    trees = [large_tree(seed) for seed in range(2)]
    paths = on_gpu(model, packing="paths", **settings)
    tree = on_gpu(model, packing="tree", **settings)
    assert tree.language_model.model.config._attn_implementation == "flex_attention"
    (expected_loss, expected), (loss, found) = (
        gradients(learner, trees) for learner in (paths, tree)
    )
    assert loss == pytest.approx(expected_loss, rel=1e-4)
    assert (found - expected).norm() <= 1e-3 * expected.norm()


def test_bfloat16_stays_near_single_precision(model) -> None:
    trees = [large_tree(seed) for seed in range(2)]
    found = [
        gradients(on_gpu(model, model_config={"dtype": dtype}), trees)
        for dtype in ("float32", "bfloat16")
    ]
    (expected_loss, expected), (loss, got) = found
    assert loss == pytest.approx(expected_loss, abs=0.02)
    assert torch.nn.functional.cosine_similarity(got, expected, dim=0) > 0.98


def test_a_long_row_takes_memory_in_proportion_to_its_length(model) -> None:
    """A mask or scores of T×T numbers would grow fourfold with twice the tokens."""
    peaks = []
    learner = on_gpu(
        model, max_tokens_per_microbatch=65_536, model_config={"dtype": "bfloat16"}
    )
    for length in (1300, 2600):
        trees = [large_tree(0, trunk=length, own=length)]
        gradients(learner, trees)  # compiles
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        gradients(learner, trees)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < 2.5 * peaks[0]
