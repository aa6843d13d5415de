"""The cold start: imitation on the same module, learner and checkpoints as ARPO."""

import numpy as np
import pytest

from rllib_arpo import SFT
from rllib_arpo.cli_traces import export_traces_of_run
from rllib_arpo.data.traces import load_traces
from rllib_arpo.errors import ConfigError, DataError
from rllib_arpo.learner.packing import LOSS_MASK, pack_paths
from rllib_arpo.metrics import TOOL_CALLS_PER_TRAJECTORY
from rllib_arpo.rewards.reward import paper_reward
from rllib_arpo.runs import Run, train
from rllib_arpo.tree import path
from tests.tiny_runs import (
    arpo_config,
    engine_weights,
    learned,
    learner_weights,
    optimizer_state,
    running,
    same,
    sft_config,
    traces,
)

pytestmark = pytest.mark.usefixtures("ray_session")


def test_the_loss_falls(cold_start) -> None:
    # A uniform guess among about 700 tokens costs ln 700 = 6.6.
    assert cold_start.losses[0] < 6.6
    assert cold_start.losses[-1] < 0.3 * cold_start.losses[0]
    assert cold_start.losses[-1] < 1.0


def test_only_what_the_model_is_to_write_carries_loss(almanac_model) -> None:
    for trace in traces(almanac_model, 20):
        (leaf,) = trace.leaves
        segments = [trace.segments[index] for index in path(trace, leaf)]
        written = np.concatenate(
            [np.full(len(s.token_ids), s.role == "model") for s in segments]
        )
        assert any(s.role == "tool" for s in segments) or len(segments) == 2
        np.testing.assert_array_equal(pack_paths([trace])[LOSS_MASK], written)


def test_the_number_of_trained_tokens_is_that_of_the_models_own(almanac_model) -> None:
    chosen = traces(almanac_model, 6)
    config = (
        sft_config(almanac_model)
        .environment(train_traces=chosen)
        .training(train_batch_size_per_learner=6, minibatch_size=3)
    )
    with running(config) as algorithm:
        numbers = learned(algorithm.train())
    own = sum(len(s.token_ids) for t in chosen for s in t.segments if s.role == "model")
    assert numbers["num_tokens_trained"] == own
    assert numbers["num_optimizer_steps"] == 2


def test_arpo_starts_from_the_exported_weights(cold_start) -> None:
    restored = SFT.from_checkpoint(cold_start.checkpoint)
    try:
        taught = learner_weights(restored)
        assert restored.iteration == len(cold_start.losses)
    finally:
        restored.stop()
    with running(arpo_config(cold_start.model)) as algorithm:
        assert same(learner_weights(algorithm), taught)
        held = engine_weights(algorithm.env_runner_group.local_env_runner)
        assert all(same(held[name], array) for name, array in taught.items())
        sampled = algorithm.train()["env_runners"]
    assert sampled[TOOL_CALLS_PER_TRAJECTORY] > 0.5


def test_a_restored_cold_start_goes_on_to_the_bit(almanac_model, tmp_path) -> None:
    config = sft_config(almanac_model).training(
        train_batch_size_per_learner=32, lr_schedule="linear", lr_total_steps=9
    )
    with running(config) as algorithm:
        algorithm.train()
        folder = algorithm.save_to_path(str(tmp_path / "checkpoint"))
        expected = learned(algorithm.train())["negative_log_likelihood"]
        after = learner_weights(algorithm), optimizer_state(algorithm)
    restored = SFT.from_checkpoint(folder)
    try:
        assert learned(restored.train())["negative_log_likelihood"] == expected
        assert same(after, (learner_weights(restored), optimizer_state(restored)))
    finally:
        restored.stop()


def test_evaluation_uses_what_has_just_been_learned(almanac_model) -> None:
    config = sft_config(almanac_model).training(train_batch_size_per_learner=32)
    with running(config) as algorithm:
        algorithm.train()
        assert algorithm.evaluate()["env_runners"]["num_episodes"] == 4
        held = engine_weights(algorithm.env_runner_group.local_env_runner)
        for name, array in learner_weights(algorithm).items():
            np.testing.assert_array_equal(held[name], array, err_msg=name)


def test_nothing_to_imitate_is_refused(almanac_model) -> None:
    config = sft_config(almanac_model)
    with pytest.raises(DataError, match="`train_traces` holds no trace"):
        config.copy().environment(train_traces=[]).build_algo()
    with (
        running(config.copy().environment(train_traces=None)) as algorithm,
        pytest.raises(DataError, match="nothing to imitate"),
    ):
        algorithm.train()


def test_what_a_run_earned_is_taught_again(cold_start, tmp_path) -> None:
    """Rejection sampling: sample, keep what was well formed, imitate it."""
    run = Run(tmp_path / "run")
    config = (
        arpo_config(cold_start.model, reward_fn=paper_reward, max_response_tokens=160)
        .tree_rollout(group_size=8, num_initial_rollouts=4)
        .reporting(num_saved_trees=None)
    )
    with running(config) as algorithm:
        train(
            algorithm,
            run,
            num_iterations=2,
            stage="ARPO",
            on_iteration=lambda record: None,
        )
    file = tmp_path / "traces.jsonl"
    said = export_traces_of_run(run.folder, file, min_reward=0.0, max_per_task=None)
    assert f"to {file}, from 64 trajectories of 8 trees." in said
    taught = load_traces(file, cold_start.model, ("search", "python"))
    assert len(taught) >= 1
    for trace in taught:
        (leaf,) = trace.leaves
        assert leaf.answer is not None
    config = (
        sft_config(cold_start.model)
        .environment(train_traces=taught)
        .training(train_batch_size_per_learner=len(taught), minibatch_size=len(taught))
    )
    with running(config) as algorithm:
        losses = [
            learned(algorithm.train())["negative_log_likelihood"] for _ in range(6)
        ]
    assert losses[-1] < losses[0]


def test_a_run_without_trees_has_nothing_to_export(tmp_path) -> None:
    for folder in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(ConfigError, match="holds no trees"):
            export_traces_of_run(
                folder, tmp_path / "out.jsonl", min_reward=1.0, max_per_task=None
            )
