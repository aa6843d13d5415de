"""Two learners under "ddp" and "fsdp2" train as one does."""

from concurrent.futures import ThreadPoolExecutor, wait

import numpy as np
import pytest
import torch
from ray.rllib.core import COMPONENT_OPTIMIZER

from rllib_arpo.engines.weights import WEIGHT_PROBE
from rllib_arpo.learner.training_data import TreeTrainingData
from tests.learner.helpers import forked_tree, random_tree, weights
from tests.learner.pairs import (
    group_state,
    group_weights,
    on_both,
    paired_learner,
    train,
)
from tests.tiny_runs import same

EVERYTHING = {
    "lr": 1e-3,
    "minibatch_size": 2,
    "num_epochs": 2,
    "kl_coeff": 0.1,
    "entropy_coeff": 0.01,
    "old_logprobs": "recompute",
    "tis_cap": 2.0,
    "loss_aggregation": "sequence_mean",
    "advantage_normalization": "batch",
    "max_tokens_per_microbatch": 60,
    "grad_clip": 0.5,
}
BATCHES = [
    [random_tree(seed) for seed in range(7)],  # 4 and 3 trees: two steps an epoch
    [random_tree(9)],  # fewer trees than learners
    [forked_tree(rewards=(float("nan"), 1.0)), random_tree(1)],  # skipped by both
    [random_tree(seed) for seed in range(5)],
]
COUNTS = (
    *("num_optimizer_steps", "num_skipped_steps", "num_tokens_trained"),
    *("tokens_processed", "tokens_unique"),
)
MEANS = ("total_loss", "grad_norm", "entropy", "kl", "tokens_processed_per_unique")


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("packing", ["tree", "paths"])
def test_two_learners_equal_one(tiny, pair, strategy, packing) -> None:
    settings = {**EVERYTHING, "packing": packing}
    one = paired_learner(tiny, **settings)
    two = pair.build(tiny, strategy, **settings)
    for trees in BATCHES:
        (local,) = train(one, trees)
        for remote in train(two, trees):
            for name in (*COUNTS, *MEANS):
                if name in local:
                    assert remote[name] == pytest.approx(
                        local[name], rel=1e-4, nan_ok=True
                    ), name
    # 2 epochs of 2, 1, 1 (skipped) and 2 steps.
    assert (local["num_optimizer_steps"], local["num_skipped_steps"]) == (10, 2)
    assert_close(group_weights(two), weights(one))


def assert_close(one, two, tolerance: float = 1e-5) -> None:
    assert one.keys() == two.keys()
    for name in one:
        np.testing.assert_allclose(one[name], two[name], atol=tolerance, err_msg=name)


def test_each_learner_holds_half_of_everything(tiny, pair) -> None:
    two = pair.build(tiny, "fsdp2", **EVERYTHING)
    train(two, BATCHES[0])

    def held(learner) -> tuple[int, ...]:
        (named,) = learner.named_optimizers
        moments = [s["exp_avg"] for s in named.optimizer.state.values()]
        reference = learner.language_model.reference.parameters()
        gradients = [p.grad for p in learner.language_model.model.parameters()]
        whole = sum(p.numel() for p in learner.language_model.model.parameters())
        return whole, *(
            sum(t.to_local().numel() for t in tensors)
            for tensors in (named.parameters, moments, gradients, list(reference))
        )

    for whole, *parts in on_both(two, held):
        assert parts == [whole // 2] * 4


LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "up_proj"]}


@pytest.mark.parametrize(
    ("model_config", "settings"),
    [
        ({"gradient_checkpointing": True}, {}),
        ({"lora": LORA}, {}),
        ({"lora": LORA, "gradient_checkpointing": True}, {"packing": "paths"}),
        # Muon rounds to bfloat16 inside, and a last bit there is 1e-2 of its step.
        ({}, {"optimizer": "muon", "muon_lr": 2e-4}),
    ],
)
def test_fsdp2_equals_one_learner(tiny, pair, model_config, settings) -> None:
    settings = {**EVERYTHING, **settings}
    one = paired_learner(tiny, model_config=model_config, **settings)
    two = pair.build(tiny, "fsdp2", model_config=model_config, **settings)
    for trees in BATCHES[:2]:
        train(one, trees), train(two, trees)
    assert_close(group_weights(two), weights(one))


def dtype_of_gathered_weights(learner) -> set[torch.dtype]:
    seen: set[torch.dtype] = set()
    network = learner.language_model.model
    network.model.layers[0].mlp.up_proj.register_forward_pre_hook(
        lambda linear, _: seen.add(linear.weight.dtype)
    )
    learner.language_model.weight_probe()
    return seen


def test_fsdp2_computes_in_bfloat16_and_keeps_float32(tiny, pair) -> None:
    settings = {**EVERYTHING, "optimizer": "adamw"}
    one = paired_learner(tiny, **settings)
    two = pair.build(tiny, "fsdp2", model_config={"dtype": "bfloat16"}, **settings)
    (exact,) = train(one, BATCHES[0])
    for rounded in train(two, BATCHES[0]):
        assert rounded["total_loss"] == pytest.approx(exact["total_loss"], abs=0.02)
        assert rounded["grad_norm"] == pytest.approx(exact["grad_norm"], rel=0.1)
        assert rounded["total_loss"] != exact["total_loss"]
    assert {a.dtype for a in group_weights(two).values()} == {np.dtype(np.float32)}
    dtypes = on_both(
        two, lambda learner: {p.grad.dtype for p in learner.named_optimizers[0][2]}
    )
    assert dtypes == [{torch.float32}] * 2
    assert on_both(two, dtype_of_gathered_weights) == [{torch.bfloat16}] * 2
    assert_close(group_weights(two), weights(one), 0.01)


STRATEGIES = ["ddp", "fsdp2"]


@pytest.mark.parametrize("restored", STRATEGIES)
@pytest.mark.parametrize("saved", STRATEGIES)
def test_what_two_learners_save_two_restore(
    tiny, pair, tmp_path, saved, restored
) -> None:
    settings = {**EVERYTHING, "lr_schedule": "linear", "lr_total_steps": 20}
    group = pair.build(tiny, saved, **settings)
    train(group, BATCHES[0])
    before = group_state(group)
    group.save_to_path(str(tmp_path))
    (expected, _) = train(group, BATCHES[3])
    after = group_weights(group)

    group = pair.build(tiny, restored, **settings)
    group.restore_from_path(str(tmp_path))
    assert same(group_state(group), before)
    for got in train(group, BATCHES[3]):
        for name in ("learning_rate", "num_optimizer_steps"):
            assert got[name] == expected[name]
    assert_close(group_weights(group), after)


@pytest.mark.parametrize("saved", STRATEGIES)
def test_what_two_learners_save_one_restores(tiny, pair, tmp_path, saved) -> None:
    group = pair.build(tiny, saved, **EVERYTHING)
    train(group, BATCHES[0])
    before = group_state(group)
    group.save_to_path(str(tmp_path))
    train(group, BATCHES[3])

    one = paired_learner(tiny, **EVERYTHING)
    one.restore_from_path(str(tmp_path / "learner"))
    assert same(weights(one), before["rl_module"]["default_policy"])
    assert same(one.get_state()[COMPONENT_OPTIMIZER], before[COMPONENT_OPTIMIZER])
    train(one, BATCHES[3])
    assert_close(weights(one), group_weights(group))


def test_what_one_learner_saves_two_restore(tiny, pair) -> None:
    one = paired_learner(tiny, **EVERYTHING)
    train(one, BATCHES[0])
    group = pair.build(tiny, "fsdp2", **EVERYTHING)
    group.set_state({"learner": one.get_state()})
    train(one, BATCHES[3]), train(group, BATCHES[3])
    assert_close(group_weights(group), weights(one))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_learners_train_adapters_in_bfloat16(tiny, pair, strategy) -> None:
    settings = {**EVERYTHING, "num_epochs": 1}
    one = paired_learner(tiny, model_config={"lora": LORA}, **settings)
    config = {"lora": LORA, "dtype": "bfloat16"}
    two = pair.build(tiny, strategy, model_config=config, **settings)
    train(one, BATCHES[0]), train(two, BATCHES[0])
    assert {a.dtype for a in group_weights(two).values()} == {np.dtype(np.float32)}
    assert_close(group_weights(two), weights(one), 0.01)


class OvertakingData(TreeTrainingData):
    """While an update is on its way to the learners, another thread asks for state."""

    def shard(self, *args, **kwargs):
        # Without a lock the answer comes now; with one, not before the update's end.
        self.asked = self.pool.submit(group_weights, self.group)
        wait([self.asked], timeout=1)
        return super().shard(*args, **kwargs)


def test_calls_of_two_threads_do_not_overlap(tiny, pair) -> None:
    """Evaluation in parallel makes them; learners would wait for each other."""
    two = pair.build(tiny, "fsdp2", **EVERYTHING)
    data = OvertakingData(episodes=list(BATCHES[0]))
    with ThreadPoolExecutor() as pool:
        data.pool, data.group = pool, two
        two.update(training_data=data)
        assert_close(data.asked.result(timeout=60), group_weights(two), 0)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_all_are_asked_for_engine_state_and_one_answers(tiny, pair, strategy) -> None:
    one = paired_learner(tiny, **EVERYTHING)
    two = pair.build(tiny, strategy, **EVERYTHING)
    for _ in range(2):  # scoring the probe leaves the weights as they were
        train(one, BATCHES[0]), train(two, BATCHES[0])
        first, second = on_both(two, lambda learner: learner.engine_state())
        assert second is None
        local = one.engine_state()
        np.testing.assert_allclose(
            first[WEIGHT_PROBE].logprobs, local[WEIGHT_PROBE].logprobs, atol=1e-4
        )
        assert_close(
            first["rl_module"]["default_policy"], local["rl_module"]["default_policy"]
        )
