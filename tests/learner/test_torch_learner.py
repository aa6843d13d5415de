"""The learner's loop: exact gradients, whole trees, restored state."""

import numpy as np
import pytest
import torch

from rllib_arpo.errors import ConfigError, DivergenceError
from rllib_arpo.learner import packing
from rllib_arpo.learner.training_data import TreeTrainingData
from tests.learner.helpers import (
    build_learner,
    forked_tree,
    random_tree,
    results,
    weights,
)
from tests.models import save_tiny_model

TREES = [random_tree(seed) for seed in range(6)]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def update(learner, trees=TREES, **settings) -> dict[str, float]:
    return results(
        learner.update(training_data=TreeTrainingData(episodes=trees), **settings)
    )


def gradients(learner) -> dict[str, np.ndarray]:
    model = learner.language_model.model
    return {name: p.grad.numpy().copy() for name, p in model.named_parameters()}


def assert_close(one: dict, two: dict, tolerance: float = 1e-5) -> None:
    assert one.keys() == two.keys()
    for name in one:
        np.testing.assert_allclose(
            one[name], two[name], atol=tolerance, rtol=tolerance, err_msg=name
        )


EVERYTHING = {
    "kl_coeff": 0.1,
    "entropy_coeff": 0.01,
    "tis_cap": 2.0,
    "old_logprobs": "recompute",
    "clip_param_high": 0.28,
}


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
def test_micro_batches_add_up_to_the_full_batch(model, aggregation) -> None:
    got = []
    for budget in (10**6, 20):
        learner = build_learner(
            model,
            minibatch_size=6,
            grad_clip=None,
            loss_aggregation=aggregation,
            max_tokens_per_microbatch=budget,
            **EVERYTHING,
        )
        metrics = update(learner)
        got.append((metrics["total_loss"], gradients(learner), metrics["ratio_mean"]))
    assert got[0][0] == pytest.approx(got[1][0], rel=1e-5)
    assert got[0][2] == pytest.approx(got[1][2], rel=1e-5)
    assert_close(got[0][1], got[1][1])


def test_the_loop_takes_the_gradient_of_rllibs_loss_hook(model) -> None:
    learner = build_learner(model, minibatch_size=6, grad_clip=None, lr=0.0)
    update(learner)
    summed = gradients(learner)
    columns = learner._run_connectors(TreeTrainingData(episodes=TREES))
    columns = learner.prepare_columns(columns)
    rows = np.arange(len(columns["row_lengths"]))
    batch, fwd_out = learner._forward(columns, rows, "value")
    learner.language_model.zero_grad()
    learner.compute_loss_for_module(
        module_id="default_policy",
        config=learner.config,
        batch=batch,
        fwd_out=fwd_out,
    ).backward()
    assert_close(summed, gradients(learner))


def test_policy_gradient_is_that_of_the_formula(model) -> None:
    """At ratio 1 the gradient is -Σ Â·∇log π / N, without clip or weights."""
    learner = build_learner(
        model, minibatch_size=6, grad_clip=None, old_logprobs="recompute", lr=0.0
    )
    update(learner)
    got = gradients(learner)
    by_path = build_learner(model, packing="paths")
    columns = by_path._run_connectors(TreeTrainingData(episodes=TREES))
    network = learner.language_model.model
    network.zero_grad()
    start, num_tokens = 0, columns["loss_mask"].sum()
    for length in columns["row_lengths"]:
        span = slice(start, start + length)
        ids = torch.from_numpy(columns["token_ids"][span])
        chosen = network(ids[None]).logits[0, :-1].log_softmax(-1)
        chosen = chosen.gather(-1, ids[1:, None])[:, 0]
        mask = torch.from_numpy(columns["loss_mask"][span])[1:]
        advantages = columns["positive_advantages"] + columns["negative_advantages"]
        advantages = torch.from_numpy(advantages[span])[1:].float()
        (-(advantages * chosen)[mask].sum() / num_tokens).backward()
        start += length
    assert_close(got, gradients(learner))


def test_hard_and_soft_agree_on_shared_tokens_at_ratio_one(model) -> None:
    got = []
    for attribution in ("soft", "hard"):
        learner = build_learner(
            model,
            minibatch_size=6,
            grad_clip=None,
            old_logprobs="recompute",
            advantage_attribution=attribution,
        )
        update(learner)
        got.append(gradients(learner))
    assert_close(*got)


def test_the_distance_to_the_sampler_is_estimated_over_the_samplers_tokens(
    model,
) -> None:
    # A sampler with q = .8, .2 draws these tokens, the learner has p = .5, .5:
    # KL(q ‖ p) = .8·ln(.8/.5) + .2·ln(.2/.5) = .37600 - .18326 = .19274
    sampler, policy = torch.tensor([[0.8, 0.2]]), torch.tensor([[0.5, 0.5]])
    zeros = torch.zeros(1, 2)
    token_losses = build_learner(model).compute_token_losses(
        {
            packing.ROLLOUT_LOGPROBS: sampler.log(),
            packing.OLD_LOGPROBS: sampler.log(),
            packing.POSITIVE_ADVANTAGES: zeros,
            packing.NEGATIVE_ADVANTAGES: zeros,
        },
        {"logprobs": policy.log(), "entropies": zeros},
    )
    estimate = token_losses.metrics["kl_to_sampler"]
    # r - ln r - 1 with r = p/q: .625 + .47000 - 1 and 2.5 - .91629 - 1
    torch.testing.assert_close(
        estimate, torch.tensor([[0.09500, 0.58371]]), rtol=1e-4, atol=0
    )
    assert float((sampler * estimate).sum()) == pytest.approx(0.19274, abs=1e-5)


def test_tool_and_prompt_tokens_are_not_learned(tmp_path) -> None:
    source = save_tiny_model(tmp_path, tied=False)
    learner = build_learner(source, sft=True, grad_clip=None, minibatch_size=1)
    update(learner, [forked_tree()])
    # Under -log softmax the head's row of a token is pulled up (its gradient goes
    # against the hidden state) only where that token is a target: 3 4 5 8 9 10.
    # A token that is never a target gets Σ π·h over the positions instead.
    head = gradients(learner)["lm_head.weight"]
    columns = packing.pack_paths([forked_tree()])
    network = build_learner(source, sft=True).language_model.model
    pushed = torch.zeros(32, 16)
    for ids, targets in (
        ([1, 2, 3, 4, 5, 6, 7, 8], [2, 3, 4, 7]),
        ([1, 2, 3, 4, 5, 6, 7, 9, 10], [2, 3, 4, 7, 8]),
    ):
        tokens = torch.tensor(ids)
        with torch.no_grad():
            hidden = network.model(tokens[None]).last_hidden_state[0]
            for target in targets:
                state = hidden[target - 1]
                pushed += network.lm_head(state).softmax(-1)[:, None] * state / 9
                pushed[tokens[target]] -= state / 9
    assert columns["loss_mask"].sum() == 9
    np.testing.assert_allclose(head, pushed, atol=1e-5)


def test_an_update_takes_epochs_times_minibatches_steps(model) -> None:
    learner = build_learner(model, num_epochs=3, minibatch_size=4)
    metrics = update(learner)  # 3 x ceil(6 / 4)
    assert metrics["num_optimizer_steps"] == 6
    columns = learner._run_connectors(TreeTrainingData(episodes=TREES))
    assert metrics["num_tokens_trained"] == 3 * columns["loss_mask"].sum()


def test_each_epoch_trains_every_row_once_in_an_order_of_its_own(model) -> None:
    learner = build_learner(model)
    columns = packing.pack_paths(TREES)
    steps = list(
        learner._minibatches(
            columns, num_trees=6, num_epochs=2, minibatch_size=3, shuffle=True
        )
    )
    assert len(steps) == 4
    for epoch in (steps[:2], steps[2:]):
        assert sorted(np.concatenate(epoch)) == list(range(24))
        for rows in epoch:  # trees are whole: 4 rows each
            assert (
                np.bincount(columns["tree_index"][rows], minlength=6).tolist().count(4)
                == 3
            )
    assert {tuple(s) for s in steps[:2]} != {tuple(s) for s in steps[2:]}


def test_same_seed_same_weights(model) -> None:
    one, two = (build_learner(model, minibatch_size=2) for _ in range(2))
    update(one), update(two)
    for name, array in weights(one).items():
        assert array.tobytes() == weights(two)[name].tobytes()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_save_then_restore_then_train_equals_train(model, optimizer) -> None:
    settings = {
        "optimizer": optimizer,
        "minibatch_size": 2,
        "lr_schedule": "cosine",
        "lr_warmup_steps": 2,
        "lr_total_steps": 12,
        "model_config": {"dtype": "bfloat16"},
    }
    learner = build_learner(model, **settings)
    update(learner)
    state = learner.get_state()
    expected = update(learner)
    restored = build_learner(model, **settings)
    restored.set_state(state)
    got = update(restored)
    assert got["num_optimizer_steps"] == 6
    assert got["learning_rate"] == expected["learning_rate"]
    for name, array in weights(learner).items():
        assert array.tobytes() == weights(restored)[name].tobytes(), name


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_restored_run_takes_its_own_weight_decay_and_betas(model, optimizer) -> None:
    saved = build_learner(model, optimizer=optimizer, minibatch_size=2)
    update(saved)
    settings = {"weight_decay": 0.3, "adam_betas": (0.8, 0.7)}
    learner = build_learner(model, optimizer=optimizer, minibatch_size=2, **settings)
    learner.set_state(saved.get_state())
    for before, after in zip(
        saved.named_optimizers, learner.named_optimizers, strict=True
    ):
        # Moments came, and the learning rate as it was.
        assert before.optimizer.state.keys() and after.optimizer.state.keys()
        for one, two in zip(
            before.optimizer.param_groups, after.optimizer.param_groups, strict=True
        ):
            assert one["lr"] == two["lr"]
            decayed = all(parameter.ndim >= 2 for parameter in two["params"])
            assert two["weight_decay"] == (0.3 if decayed else 0.0)
            if after.name == "adamw":
                assert (one["betas"], two["betas"]) == ((0.9, 0.95), (0.8, 0.7))


def test_an_older_checkpoint_can_be_restored(model) -> None:
    learner = build_learner(model)
    update(learner)
    state = learner.get_state()
    saved = weights(learner)
    update(learner)
    learner.set_state(state)
    assert learner._weights_seq_no == 1
    for name, array in weights(learner).items():
        assert array.tobytes() == saved[name].tobytes()


def test_state_written_to_a_folder_comes_back(model, tmp_path) -> None:
    learner = build_learner(model, optimizer="muon")
    update(learner)
    learner.save_to_path(str(tmp_path))
    restored = build_learner(model, optimizer="muon")
    restored.restore_from_path(str(tmp_path))
    assert restored.num_optimizer_steps == learner.num_optimizer_steps == 2
    update(learner), update(restored)
    for name, array in weights(learner).items():
        assert array.tobytes() == weights(restored)[name].tobytes()


def test_engines_are_told_of_every_restore(model, tmp_path) -> None:
    learner = build_learner(model)
    learner.save_to_path(str(tmp_path))

    def told() -> str:
        return learner.engine_state()["rl_module"]["restore"]

    names = [told()]
    update(learner)
    assert names == [told()] == [""]
    learner.set_state(learner.get_state())
    names.append(told())
    learner.restore_from_path(str(tmp_path))
    names.append(told())
    weights_alone = tmp_path / "rl_module"
    learner.restore_from_path(str(weights_alone), component="rl_module")
    names.append(told())
    assert len(set(names)) == 4
    # What is saved holds weights alone.
    assert learner.get_state()["rl_module"].keys() == {"default_policy"}


def test_a_checkpoint_of_another_optimizer_is_refused(model) -> None:
    state = build_learner(model, optimizer="muon").get_state()
    with pytest.raises(ConfigError, match="muon"):
        build_learner(model).set_state(state)


def test_a_step_that_is_not_finite_is_skipped(model) -> None:
    learner = build_learner(model, minibatch_size=1)
    before = weights(learner)
    broken = forked_tree(rewards=(float("nan"), 1.0))
    metrics = update(learner, [broken])
    assert metrics["num_skipped_steps"] == 1
    assert metrics["num_optimizer_steps"] == 0
    for name, array in weights(learner).items():
        assert array.tobytes() == before[name].tobytes()
    metrics = update(learner, [broken, forked_tree()])
    assert metrics["num_skipped_steps"] == 2
    assert metrics["num_optimizer_steps"] == 1
    assert np.isfinite(metrics["policy_loss"])
    assert all(np.isfinite(array).all() for array in weights(learner).values())


def test_training_stops_when_too_many_steps_in_a_row_are_not_finite(model) -> None:
    learner = build_learner(model, minibatch_size=1, max_skipped_steps=2)
    broken = forked_tree(rewards=(float("nan"), 1.0))
    # Skipped, skipped, taken: the count starts anew.
    update(learner, [broken]), update(learner, [broken])
    update(learner, [forked_tree()])
    update(learner, [broken]), update(learner, [broken])
    before = weights(learner)
    with pytest.raises(DivergenceError, match=r"max_skipped_steps` \(2\)"):
        update(learner, [broken])
    for name, array in weights(learner).items():
        assert array.tobytes() == before[name].tobytes()


def test_tokens_are_counted_once_for_an_epoch(model) -> None:
    # One tree of 10 tokens (2 + 3 + 2 + 1 + 2), its two paths of 8 and 9.
    counts = {
        "tree": {"tokens_processed": 10, "tokens_processed_per_unique": 1.0},
        "paths": {"tokens_processed": 17, "tokens_processed_per_unique": 1.7},
    }
    for layout, expected in counts.items():
        learner = build_learner(model, num_epochs=3, packing=layout)
        metrics = update(learner, [forked_tree()])
        assert metrics["tokens_unique"] == 10
        for name, value in expected.items():
            assert metrics[name] == pytest.approx(value)
    learner = build_learner(model, max_tokens_per_row=8)  # rows of 8 and 9 tokens
    assert update(learner, [forked_tree()])["tokens_processed_per_unique"] == 1.7


def test_bfloat16_takes_steps_that_bfloat16_cannot_hold(model) -> None:
    learner = build_learner(
        model, lr=2e-7, weight_decay=0.0, model_config={"dtype": "bfloat16"}
    )
    before = weights(learner)
    sent_before = learner.language_model.get_state(inference_only=True)
    update(learner)
    sent = learner.language_model.get_state(inference_only=True)
    for name, array in weights(learner).items():
        assert array.dtype == np.float32
        if array.ndim == 2:
            # About 1e-6 of a weight near 0.2; bfloat16 has steps of 4e-3 of it.
            assert (array != before[name]).mean() > 0.5, name
            assert (sent[name] == sent_before[name]).mean() > 0.99, name


def test_a_bfloat16_loss_is_near_that_of_float32(model) -> None:
    exact = update(build_learner(model))
    rounded = update(build_learner(model, model_config={"dtype": "bfloat16"}))
    assert rounded["total_loss"] == pytest.approx(exact["total_loss"], abs=0.02)
    assert rounded["grad_norm"] == pytest.approx(exact["grad_norm"], rel=0.1)
    assert rounded["total_loss"] != exact["total_loss"]


def test_a_batch_without_trees_changes_nothing(model) -> None:
    learner = build_learner(model)
    before = weights(learner)
    assert update(learner, [])["num_optimizer_steps"] == 0
    for name, array in weights(learner).items():
        assert array.tobytes() == before[name].tobytes()


def test_gradients_are_clipped_to_their_norm(model) -> None:
    learner = build_learner(model, minibatch_size=6, grad_clip=1e-3)
    metrics = update(learner)
    norm = np.sqrt(sum((g**2).sum() for g in gradients(learner).values()))
    assert norm == pytest.approx(1e-3, rel=1e-3)
    assert metrics["grad_norm"] > 1e-2


def test_the_learning_rate_follows_optimizer_steps(model) -> None:
    learner = build_learner(
        model, minibatch_size=2, lr=0.1, lr_schedule="linear", lr_total_steps=6
    )
    # The third step was taken at p = 2/6.
    assert update(learner)["learning_rate"] == pytest.approx(0.1 * 4 / 6)
    # The last of the six steps was taken at p = 5/6.
    update(learner)
    (named,) = learner.named_optimizers
    assert named.optimizer.param_groups[0]["lr"] == pytest.approx(0.1 / 6)


def test_the_sampler_and_the_learner_are_compared_before_the_first_step(model) -> None:
    learner = build_learner(model, num_epochs=4, lr=0.1)
    trees = [forked_tree()]
    columns = packing.pack_paths(trees)
    scores = learner._score_rows({**columns})
    mask = columns["loss_mask"]
    expected = np.abs(scores - columns["rollout_logprobs"])[mask].mean()
    metrics = update(learner, trees)
    assert metrics["sampler_logprob_difference"] == pytest.approx(expected, rel=1e-4)


def test_recomputed_old_logprobs_start_at_ratio_one(model) -> None:
    learner = build_learner(model, minibatch_size=6, old_logprobs="recompute")
    metrics = update(learner)
    assert metrics["ratio_mean"] == pytest.approx(1.0, abs=1e-5)
    assert metrics["ratio_max"] == pytest.approx(1.0, abs=1e-4)
    assert metrics["clip_fraction"] == 0


def test_training_raises_the_probability_of_what_was_rewarded(model) -> None:
    # The trees' own logprobs are made up; against them the second leaf is clipped.
    learner = build_learner(
        model, minibatch_size=1, num_epochs=10, old_logprobs="recompute"
    )
    tree = forked_tree(rewards=(1.0, 0.0))
    columns = packing.pack_paths([tree])
    before = learner._score_rows(columns)
    update(learner, [tree])
    change = learner._score_rows(columns) - before
    assert change[7] > 0  # token 8, of the leaf with reward 1
    assert change[15] + change[16] < 0  # tokens 9 and 10, of the leaf with reward 0


def test_supervised_training_learns_the_models_own_tokens(model) -> None:
    learner = build_learner(model, sft=True, minibatch_size=1, num_epochs=30)
    metrics = update(learner, [forked_tree()])
    (first,) = (update(build_learner(model, sft=True), [forked_tree()]),)
    assert metrics["negative_log_likelihood"] < first["negative_log_likelihood"]
    columns = packing.pack_paths([forked_tree()])
    scores = learner._score_rows(columns)
    # After the shared trunk token 8 or 9 follows: neither can be above one half.
    assert np.exp(scores[2:5]).min() > 0.9


def test_batch_normalization_uses_the_statistics_that_were_sent(model) -> None:
    learner = build_learner(model, advantage_normalization="batch", packing="paths")
    data = TreeTrainingData(episodes=[forked_tree()], reward_mean=2.0, reward_std=0.5)
    columns = learner._run_connectors(data)
    # rewards 1 and 0: (1 - 2) / .5 = -2, (0 - 2) / .5 = -4
    np.testing.assert_allclose(
        columns["negative_advantages"], [-2] * 8 + [-4] * 9, rtol=1e-5
    )


def test_the_objective_is_the_weighted_sum_of_its_terms(model) -> None:
    learner = build_learner(
        model, kl_coeff=0.5, entropy_coeff=0.25, tis_cap=2.0, dual_clip=None
    )
    ln2 = float(np.log(2.0))
    token = {  # one token: log π = log π_old = -1, A = 3
        "logprobs": torch.tensor([[-1.0]]),
        "entropies": torch.tensor([[1.2]]),
        "ref_logprobs": torch.tensor([[-1.0 + ln2]]),
    }
    batch = {
        packing.OLD_LOGPROBS: torch.tensor([[-1.0]]),
        packing.ROLLOUT_LOGPROBS: torch.tensor([[-1.0 + ln2]]),
        packing.POSITIVE_ADVANTAGES: torch.tensor([[3.0]]),
        packing.NEGATIVE_ADVANTAGES: torch.tensor([[0.0]]),
    }
    got = learner.compute_token_losses(batch, token)
    # w = exp(-ln 2) = .5: .5 * (-3) + .5 * (2 - ln 2 - 1) - .25 * 1.2
    assert got.loss.item() == pytest.approx(-1.5 + 0.5 * (1 - ln2) - 0.3, rel=1e-5)
    assert got.metrics["kl"].item() == pytest.approx(1 - ln2, rel=1e-5)
    assert got.metrics["tis_fraction_capped"].item() == 0
    batch[packing.ROLLOUT_LOGPROBS] = torch.tensor([[-1.0 - 2 * ln2]])
    # exp(2 ln 2) = 4 is cut to 2: 2 * (-3)
    got = learner.compute_token_losses(batch, token)
    assert got.loss.item() == pytest.approx(-6 + 0.5 * (1 - ln2) - 0.3, rel=1e-5)
    assert got.metrics["tis_fraction_capped"].item() == 1
