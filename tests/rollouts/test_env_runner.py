"""`ARPOEnvRunner` by itself: what RLlib and the Algorithm ask of it."""

import inspect
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from ray.rllib.core import COMPONENT_RL_MODULE, DEFAULT_MODULE_ID
from ray.rllib.env import INPUT_ENV_SINGLE_SPACES, INPUT_ENV_SPACES
from ray.rllib.utils.metrics import WEIGHTS_SEQ_NO
from ray.rllib.utils.metrics.metrics_logger import MetricsLogger
from transformers import AutoModelForCausalLM

from rllib_arpo import RolloutTree, Trajectory
from rllib_arpo.engines.engine import SamplingParams
from rllib_arpo.engines.weights import WEIGHT_PROBE, WEIGHTS_RESTORE
from rllib_arpo.errors import EngineError, RewardError, WeightSyncError
from rllib_arpo.rl_module import CausalLMRLModule
from rllib_arpo.rollouts.branching import TreeSettings, never
from rllib_arpo.rollouts.env_runner import ARPOEnvRunner
from rllib_arpo.tree import Leaf, path, path_token_ids
from tests.tiny_runs import arpo_config, engine_weights, same, tasks, token_ids
from tests.unruly_envs import UnrulyEnv

pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.fixture(scope="module")
def runner(almanac_model):
    config = arpo_config(almanac_model)
    config.validate()
    runner = ARPOEnvRunner(config=config, worker_index=0)
    yield runner
    runner.stop()


def state(weights: dict[str, np.ndarray], version: int) -> dict:
    return {COMPONENT_RL_MODULE: {DEFAULT_MODULE_ID: weights}, WEIGHTS_SEQ_NO: version}


def test_it_is_healthy_and_knows_its_spaces(runner) -> None:
    runner.assert_healthy()
    spaces = runner.get_spaces()
    expected = (runner.env.observation_space, runner.env.action_space)
    assert spaces[INPUT_ENV_SPACES] == spaces[INPUT_ENV_SINGLE_SPACES] == expected


def test_same_seeds_same_trees_whatever_else_is_asked(runner) -> None:
    chosen = tasks("train", 3)
    trees = runner.sample(tasks=chosen, seeds=[7, 8, 9])
    assert [tree.task for tree in trees] == chosen
    assert [tree.seed for tree in trees] == [7, 8, 9]
    assert token_ids(trees) == token_ids(runner.sample(tasks=chosen, seeds=[7, 8, 9]))
    assert token_ids(trees) != token_ids(runner.sample(tasks=chosen, seeds=[7, 8, 4]))


def test_settings_of_one_call_take_the_place_of_the_configs(runner) -> None:
    (tree,) = runner.sample(
        tasks=tasks("train", 1),
        seeds=[1],
        tree_settings=TreeSettings(
            group_size=3, num_initial_rollouts=3, branch_rule=never
        ),
        sampling=SamplingParams(temperature=0.0),
    )
    # Greedy rollouts are all the same.
    assert len(tree.leaves) == 3
    assert len({tree.segments[leaf.segment].text for leaf in tree.leaves}) == 1


def test_without_tasks_it_walks_over_its_own(runner) -> None:
    first = runner.sample(num_episodes=2)
    second = runner.sample(num_timesteps=2)
    names = [tree.task.task_id for tree in first + second]
    assert len(set(names)) == 4


def test_metrics_are_those_that_rllib_counts(runner) -> None:
    runner.get_metrics()
    trees = runner.sample(tasks=tasks("train", 2), seeds=[1, 2])
    metrics = MetricsLogger.peek_results(runner.get_metrics())
    assert metrics["num_episodes"] == 2
    assert metrics["num_env_steps_sampled"] == sum(map(len, trees))


def sampled_tokens(trees) -> int:
    return sum(
        len(s.token_ids) for tree in trees for s in tree.segments if s.role == "model"
    )


def test_the_engine_is_measured_by_what_it_did_since_the_last_metrics(runner) -> None:
    runner.get_metrics()
    for seeds in ([1], [2, 3]):
        trees = [
            *runner.sample(tasks=tasks("train", len(seeds)), seeds=seeds),
            *runner.sample(tasks=tasks("train", 1), seeds=[4]),
        ]
        engine = MetricsLogger.peek_results(runner.get_metrics())["engine"]
        assert engine["num_generated_tokens"] == sampled_tokens(trees)
        assert 0 < engine["step_time_s"] <= engine["sample_time_s"]


def test_the_hit_rate_is_that_of_the_prefix_cache(runner) -> None:
    runner.get_metrics()
    runner.sample(tasks=tasks("train", 2), seeds=[1, 2])
    engine = MetricsLogger.peek_results(runner.get_metrics())["engine"]
    # Every turn but the first repeats all that came before.
    assert 0 < engine["num_cached_prompt_tokens"] < engine["num_prompt_tokens"]
    assert engine["prefix_cache_hit_rate"] == pytest.approx(
        engine["num_cached_prompt_tokens"] / engine["num_prompt_tokens"]
    )


def test_weights_are_taken_upwards_and_downwards_but_not_twice(runner) -> None:
    base = engine_weights(runner)
    one = {name: array + 1 for name, array in base.items()}
    two = {name: array + 2 for name, array in base.items()}
    runner.set_state(state(two, 9))
    assert same(engine_weights(runner), two)
    # The version in place: nothing is to be loaded.
    runner.set_state(state(one, 9))
    assert same(engine_weights(runner), two)
    # After a restore the older version is the right one.
    runner.set_state(state(base, 4))
    assert same(engine_weights(runner), base)
    (tree,) = runner.sample(tasks=tasks("train", 1), seeds=[1])
    versions = {
        version for s in tree.segments for version in s.policy_versions.tolist()
    }
    assert versions == {4}


def test_weights_of_another_restore_are_taken_whatever_their_version(runner) -> None:
    base = engine_weights(runner)
    one = {name: array + 1 for name, array in base.items()}
    two = {name: array + 2 for name, array in base.items()}
    for restore, weights, held in [
        ("a", one, one),
        ("a", two, one),  # nothing is to be loaded
        ("b", two, two),  # another run's weights, of the same iteration
        ("", base, base),
    ]:
        sent = state(weights, 9)
        sent[COMPONENT_RL_MODULE][WEIGHTS_RESTORE] = restore
        runner.set_state(sent)
        assert same(engine_weights(runner), held)


def test_weights_that_do_not_fit_are_refused(runner) -> None:
    base = engine_weights(runner)
    with pytest.raises(WeightSyncError):
        runner.set_state(state({"no.such.weight": np.zeros(1, np.float32)}, 77))
    assert same(engine_weights(runner), base)


def test_weights_are_checked_by_a_probe_of_the_learner(runner, almanac_model) -> None:
    learner = CausalLMRLModule(model_config={"model": almanac_model})
    sent = state(learner.get_state(inference_only=True), 11)
    assert runner.take_weights({**sent, WEIGHT_PROBE: learner.weight_probe()}) is None
    engine = MetricsLogger.peek_results(runner.get_metrics())["engine"]
    assert engine["weight_probe_error"] < 1e-5
    # The learner has gone on, the weights have not.
    with torch.no_grad():
        learner.model.model.norm.weight.mul_(1.5)
    probe = learner.weight_probe()
    wrong = runner.take_weights({WEIGHTS_SEQ_NO: 12, WEIGHT_PROBE: probe})
    assert isinstance(wrong, WeightSyncError)
    assert "does not run the learner's weights" in str(wrong)


def test_an_engine_sleeps_and_wakes(runner) -> None:
    before = runner.sample(tasks=tasks("train", 1), seeds=[5])
    runner.sleep_engine()
    assert runner.engine.metrics()["prefix_cache_tokens"] == 0
    runner.wake_engine()
    after = runner.sample(tasks=tasks("train", 1), seeds=[5])
    assert token_ids(after) == token_ids(before)


def broken_reward(trajectory: Trajectory) -> float:
    raise ZeroDivisionError("by nothing")


def test_a_users_error_is_an_answer_and_an_engines_is_raised(almanac_model) -> None:
    config = arpo_config(almanac_model, reward_fn=broken_reward)
    runner = ARPOEnvRunner(config=config, worker_index=1)
    try:
        answer = runner.sample_and_get_metrics(tasks=tasks("train", 2), seeds=[1, 2])
        assert isinstance(answer, RewardError) and "by nothing" in str(answer)
        runner.engine.close()
        with pytest.raises(EngineError):
            runner.sample_and_get_metrics(tasks=tasks("train", 1), seeds=[1])
    finally:
        runner.stop()


def wait_until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "nothing happened in 60 s"
        time.sleep(0.01)


def harvest(runner: ARPOEnvRunner, stream: str, count: int) -> list[RolloutTree]:
    """Ask until so many trees have grown."""
    trees: list[RolloutTree] = []

    def more() -> bool:
        found = runner.finished_trees(stream=stream, wait_s=0.1)
        assert found is not None and not found.errors
        trees.extend(found.trees)
        return len(trees) >= count

    wait_until(more)
    return trees


def test_trees_of_the_background_are_those_that_sampling_gives(runner) -> None:
    chosen = tasks("train", 4)
    expected = runner.sample(tasks=chosen, seeds=[1, 2, 3, 4])
    stream = runner.open_stream()
    runner.start_trees(list(zip([1, 2, 3, 4], chosen, strict=True)), stream=stream)
    trees = {tree.seed: tree for tree in harvest(runner, stream, 4)}
    assert token_ids([trees[seed] for seed in (1, 2, 3, 4)]) == token_ids(expected)


def test_jobs_and_questions_of_another_stream_are_not_taken(runner) -> None:
    before = runner.open_stream()
    stream = runner.open_stream()
    runner.start_trees([(1, tasks("train", 1)[0])], stream=before)
    assert runner.finished_trees(stream=before, wait_s=0.0) is None
    found = runner.finished_trees(stream=stream, wait_s=0.0)
    assert found is not None
    assert (found.trees, found.num_waiting, found.num_growing) == ([], 0, 0)


def test_unfinished_trees_go_on_with_new_weights_and_every_token_says_whose_it_is(
    cold_start, tmp_path
) -> None:
    config = arpo_config(cold_start.model, signs=str(tmp_path))
    # Else a path that waits in its environment holds the engine for all others.
    config.environment(env=UnrulyEnv).debugging(deterministic=False)
    runner = ARPOEnvRunner(config=config, worker_index=1)
    try:
        first = engine_weights(runner)
        second = {name: array * 1.02 for name, array in first.items()}
        # All paths wait after their first turn.
        (tmp_path / "hold").write_text("*")
        stream = runner.open_stream()
        runner.start_trees(list(enumerate(tasks("train", 4))), stream=stream)
        wait_until(lambda: idle_after_work(runner.engine.metrics()))
        assert runner.take_weights(state(second, 1)) is None
        (tmp_path / "hold").unlink()
        trees = harvest(runner, stream, 4)
    finally:
        runner.stop()
    model = AutoModelForCausalLM.from_pretrained(cold_start.model)
    checked = set()
    for version, weights in enumerate((first, second)):
        model.load_state_dict(
            {name: torch.from_numpy(array) for name, array in weights.items()},
            strict=False,
        )
        for tree, leaf in [(t, leaf) for t in trees for leaf in t.leaves]:
            stamped, sampled = sampled_by(tree, leaf)
            ids = torch.from_numpy(path_token_ids(tree, leaf)).long()
            with torch.no_grad():
                scores = model(ids[None]).logits[0].log_softmax(-1)[:-1]
            scored = scores.gather(1, ids[1:, None])[:, 0].numpy()
            mine = stamped[1:] == version
            np.testing.assert_allclose(scored[mine], sampled[1:][mine], atol=1e-4)
            # Weights of the other version would have been told apart.
            other = stamped[1:] == 1 - version
            if other.any():
                assert np.abs(scored[other] - sampled[1:][other]).max() > 1e-3
            checked |= {version} if mine.any() else set()
    assert checked == {0, 1}


def idle_after_work(engine: dict[str, float]) -> bool:
    at_work = engine["num_running"] or engine["num_waiting"]
    return not at_work and engine["num_generated_tokens"] > 0


def sampled_by(tree: RolloutTree, leaf: Leaf) -> tuple[np.ndarray, np.ndarray]:
    """For each token of a path the version that sampled it, or -1, and its score."""
    segments = [tree.segments[i] for i in path(tree, leaf)]
    versions = [
        s.policy_versions if s.role == "model" else np.full(len(s.token_ids), -1)
        for s in segments
    ]
    logprobs = [
        s.logprobs if s.role == "model" else np.zeros(len(s.token_ids), np.float32)
        for s in segments
    ]
    return np.concatenate(versions), np.concatenate(logprobs)


def test_ray_keeps_calls_in_order() -> None:
    # It does not for a class with coroutine methods, and weights would come late.
    assert not inspect.getmembers(ARPOEnvRunner, inspect.iscoroutinefunction)
