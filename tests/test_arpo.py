"""ARPO in one process: RLlib's ways in, checkpoints, and what goes wrong."""

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import gymnasium
import numpy as np
import pytest
from ray import tune
from ray.rllib.callbacks.callbacks import RLlibCallback

from rllib_arpo import ARPO, ARPOConfig, RolloutTree, Trajectory
from rllib_arpo.envs.almanac import AlmanacEnv
from rllib_arpo.envs.spaces import TokenSequence
from rllib_arpo.errors import ConfigError, DataError, RewardError, ToolOutageError
from rllib_arpo.evaluation import evaluate
from rllib_arpo.metrics import (
    DYNAMIC_SAMPLING_ROUNDS,
    NUM_TOOL_CALLS,
    REWARD_MEAN,
    TOOL_FAILURE_SHARE,
)
from rllib_arpo.rl_module import CausalLMRLModule
from tests.tiny_runs import (
    NUM_EVAL_TASKS,
    arpo_config,
    engine_weights,
    learned,
    learner_weights,
    optimizer_state,
    running,
    same,
    token_ids,
    token_sum_reward,
)

pytestmark = pytest.mark.usefixtures("ray_session")


def own_numbers(result: dict[str, Any]) -> dict[str, float]:
    """Every metric of ours that does not measure time."""
    sampled, trained = result["env_runners"], learned(result)
    return {
        name: float(value)
        for group in (sampled, trained)
        for name, value in group.items()
        if np.ndim(value) == 0
        and not isinstance(value, dict)
        and "latency" not in name
        and name != "num_trainable_parameters"
    }


@pytest.fixture(scope="module")
def trained(cold_start):
    """An algorithm after two iterations, with both results; tests only read it."""
    with running(arpo_config(cold_start.model)) as algorithm:
        yield algorithm, [algorithm.train() for _ in range(2)]


def test_two_iterations_train_and_measure(trained, cold_start) -> None:
    algorithm, results = trained
    for result in results:
        numbers = own_numbers(result)
        assert all(np.isfinite(value) for value in numbers.values()), numbers
        assert numbers["num_optimizer_steps"] == 2 * result["training_iteration"]
        assert numbers["num_skipped_steps"] == 0
        assert numbers["grad_norm"] > 0
        # 4 trees of 4 leaves.
        assert result["env_runners"]["num_episodes"] == 4
        assert numbers[NUM_TOOL_CALLS] > 0
        # Rows repeat the segments that a tree's leaves share.
        assert numbers["num_tokens_trained"] >= numbers["num_tokens_sampled"]
    steps = [result["num_env_steps_sampled_lifetime"] for result in results]
    assert 0 < steps[0] < steps[1]
    assert not same(learner_weights(algorithm), folder_weights(cold_start.model))


def folder_weights(model: str) -> dict[str, np.ndarray]:
    """The weights of a model folder, as a learner names them."""
    space = TokenSequence(2)
    return CausalLMRLModule(
        observation_space=space, action_space=space, model_config={"model": model}
    ).get_state()


def test_sampler_and_learner_agree_on_every_token(cold_start) -> None:
    config = arpo_config(cold_start.model).training(minibatch_size=4)
    with running(config) as algorithm:
        numbers = learned(algorithm.train())
    assert numbers["sampler_logprob_difference"] < 1e-4
    assert numbers["ratio_mean"] == pytest.approx(1.0, abs=1e-4)
    assert numbers["ratio_max"] == pytest.approx(1.0, abs=1e-3)


def test_sampler_and_learner_agree_after_an_update_too(trained) -> None:
    _, results = trained
    assert learned(results[1])["sampler_logprob_difference"] < 1e-4


def test_the_engine_holds_the_learners_weights(trained) -> None:
    algorithm, _ = trained
    held = engine_weights(algorithm.env_runner_group.local_env_runner)
    for name, array in learner_weights(algorithm).items():
        np.testing.assert_array_equal(held[name], array, err_msg=name)


def test_evaluation_is_greedy_on_held_out_tasks_and_leaves_training_alone(
    cold_start,
) -> None:
    def config(interval: int | None) -> ARPOConfig:
        return arpo_config(cold_start.model).evaluation(
            evaluation_interval=interval,
            evaluation_config=ARPOConfig.overrides(temperature=0.0),
        )

    with running(config(None)) as algorithm:
        plain = [algorithm.train() for _ in range(2)]
        weights = learner_weights(algorithm)
    with running(config(1)) as algorithm:
        evaluated = [algorithm.train() for _ in range(2)]
        again = algorithm.evaluate()["env_runners"]
        assert same(weights, learner_weights(algorithm))
    for before, after in zip(plain, evaluated, strict=True):
        assert same(own_numbers(before), own_numbers(after))
        assert "evaluation" not in before or not before["evaluation"]
        numbers = after["evaluation"]["env_runners"]
        assert numbers["num_episodes"] == NUM_EVAL_TASKS
        # A greedy choice is certain.
        assert numbers["entropy_elsewhere"] == 0
        assert numbers["branches_per_tree"] == 0
    last = evaluated[-1]["evaluation"]["env_runners"]
    assert again[REWARD_MEAN] == last[REWARD_MEAN]
    assert again["response_tokens"] == last["response_tokens"]


def test_any_tasks_can_be_evaluated_and_the_same_seed_answers_the_same(trained) -> None:
    algorithm, _ = trained
    chosen = algorithm.eval_tasks[1:3]
    first = evaluate(algorithm, chosen, num_samples=3, seed=5)
    second = evaluate(algorithm, chosen, num_samples=3, seed=5)
    assert [tree.task for tree in first.trees] == list(chosen)
    assert [len(tree.leaves) for tree in first.trees] == [3, 3]
    assert token_ids(first.trees) == token_ids(second.trees)
    other = evaluate(algorithm, chosen, num_samples=3, seed=6)
    assert token_ids(first.trees) != token_ids(other.trees)


class Recorder(RLlibCallback):
    seen: ClassVar[list[str]] = []

    def on_train_result(self, *, algorithm, result, **kwargs) -> None:
        self.seen.append(f"result {result['training_iteration']}")
        result["mine"] = 42

    def on_sample_end(self, *, env_runner, samples, metrics_logger, **kwargs) -> None:
        self.seen.append(f"sampled {len(samples)}")
        metrics_logger.log_value("trees_seen", len(samples), window=1)

    def on_environment_created(self, *, env, env_context, **kwargs) -> None:
        self.seen.append(f"{type(env).__name__} {env_context.worker_index}")


def test_a_share_of_no_calls_is_not_left_over_from_an_iteration_before(trained) -> None:
    algorithm, _ = trained
    trees = evaluate(algorithm, algorithm.eval_tasks, num_samples=2).trees
    silent = [
        replace(t, segments=[replace(s, tool_call=None) for s in t.segments])
        for t in trees
    ]

    def logged(trees: list[RolloutTree]) -> set[str]:
        algorithm.log_trees(trees, ("of_this_test",))
        found = set(algorithm.metrics.peek(("of_this_test",)))
        algorithm.metrics.reduce()
        return found

    assert TOOL_FAILURE_SHARE in logged(trees)
    assert TOOL_FAILURE_SHARE not in logged(silent)
    assert TOOL_FAILURE_SHARE in logged(trees)


def test_callbacks_fire_and_may_add_metrics(almanac_model) -> None:
    Recorder.seen.clear()
    with running(arpo_config(almanac_model).callbacks(Recorder)) as algorithm:
        result = algorithm.train()
    assert Recorder.seen == ["AlmanacEnv 0", "sampled 4", "result 1"]
    assert result["mine"] == 42
    assert result["env_runners"]["trees_seen"] == 4


def test_callback_functions_fire_too(almanac_model) -> None:
    seen: list[str] = []
    config = arpo_config(almanac_model).callbacks(
        on_environment_created=lambda **kwargs: seen.append("environment"),
        on_sample_end=lambda **kwargs: seen.append("sample"),
        on_train_result=lambda **kwargs: seen.append("result"),
    )
    with running(config) as algorithm:
        algorithm.train()
    assert seen == ["environment", "sample", "result"]


def test_a_runner_samples_by_itself_when_asked_as_rllib_asks(trained) -> None:
    algorithm, _ = trained
    runner = algorithm.env_runner_group.local_env_runner
    trees = runner.sample(num_episodes=2, explore=False)
    assert len(trees) == 2
    assert all(
        float(segment.entropies.sum()) == 0 for t in trees for segment in t.segments
    )


def broken_reward(trajectory: Trajectory) -> float:
    raise KeyError("no such field")


def test_an_error_of_the_reward_function_stops_training_as_itself(
    almanac_model,
) -> None:
    config = arpo_config(almanac_model, reward_fn=broken_reward)
    with (
        running(config) as algorithm,
        pytest.raises(RewardError, match=r"broken_reward.*KeyError.*no such field"),
    ):
        algorithm.train()


def reward_that_fails_once(trajectory: Trajectory) -> float:
    """In the middle of the second iteration of four trees with four leaves."""
    rewarded.append(trajectory.task.task_id)
    if len(rewarded) == 4 * 4 + 3:
        raise KeyError("no such field")
    return token_sum_reward(trajectory)


rewarded: list[str] = []


def test_an_iteration_that_was_cut_short_has_taken_no_tasks(almanac_model) -> None:
    rewarded.clear()
    config = arpo_config(almanac_model, reward_fn=reward_that_fails_once)
    with running(config) as algorithm:
        algorithm.train()
        before = algorithm.get_state()["task_cursor"]
        with pytest.raises(RewardError):
            algorithm.train()
        state = algorithm.get_state()
    assert same(before, state["task_cursor"])
    assert state["num_trees_started"] == 4


def test_missing_data_is_named_before_anything_runs(almanac_model, tmp_path) -> None:
    config = arpo_config(almanac_model)
    with pytest.raises(DataError, match=r"nothing\.parquet"):
        config.copy().environment(
            train_tasks=str(tmp_path / "nothing.parquet")
        ).build_algo()
    with pytest.raises(DataError, match=r"`eval_tasks` holds no task"):
        config.copy().environment(eval_tasks=[]).build_algo()
    with running(config.copy().environment(train_tasks=None)) as algorithm:
        assert algorithm.evaluate()["env_runners"]["num_episodes"] == NUM_EVAL_TASKS
        with pytest.raises(DataError, match="nothing to train on"):
            algorithm.train()


def test_a_folder_without_a_model_is_named(tmp_path) -> None:
    with pytest.raises(ConfigError, match=str(tmp_path)):
        arpo_config(str(tmp_path)).build_algo()


class SilentTool:
    """Never answers."""

    description = "for tests"

    def __init__(self, name: str) -> None:
        self.name = name

    async def call(self, arguments: str) -> str:
        return await asyncio.Future()

    def fork(self):
        return self


class RaisingTool(SilentTool):
    """Cannot reach what it needs."""

    async def call(self, arguments: str) -> str:
        raise ConnectionRefusedError("no server")


class SilentToolsEnv(AlmanacEnv):
    def make_tools(self, task):
        return [SilentTool(tool.name) for tool in super().make_tools(task)]


class RaisingToolsEnv(AlmanacEnv):
    def make_tools(self, task):
        return [RaisingTool(tool.name) for tool in super().make_tools(task)]


@pytest.mark.parametrize("env", [SilentToolsEnv, RaisingToolsEnv])
def test_training_stops_when_most_tool_calls_fail(cold_start, env) -> None:
    config = (
        arpo_config(cold_start.model, tool_timeout_s=0.01, max_response_tokens=128)
        .environment(env=env)
        .training(train_batch_size_per_learner=16)
    )
    with (
        running(config) as algorithm,
        pytest.raises(ToolOutageError, match=r"`max_tool_failure_share` \(50%\)"),
    ):
        algorithm.train()


def test_the_check_for_an_outage_can_be_switched_off(cold_start) -> None:
    config = (
        arpo_config(cold_start.model, tool_timeout_s=0.01)
        .environment(env=SilentToolsEnv)
        .tree_rollout(max_tool_failure_share=None)
    )
    with running(config) as algorithm:
        assert algorithm.train()["env_runners"][TOOL_FAILURE_SHARE] == 1.0


class EchoEnv(gymnasium.Env):
    """A user's own: one turn, rewarded for odd tokens; knows nothing of tools."""

    stop = ()
    remaining_tokens = 6

    def __init__(self, context) -> None:
        self.nan_for = context.get("nan_for")
        self.observation_space = self.action_space = TokenSequence(context["vocab"])
        self.task = None

    def reset(self, *, seed=None, options=None):
        self.task = options["task"]
        return np.array([5, 6, 7], np.int32), {}

    def step(self, action):
        reward = float(np.mean(action % 2))
        if self.nan_for == self.task.task_id:
            reward = float("nan")
        return np.zeros(0, np.int32), reward, True, False, {}


def echo_config(model: str, **env_config: Any) -> ARPOConfig:
    tune.register_env("echo", EchoEnv)
    vocab = len(folder_weights(model)["model.embed_tokens.weight"])
    config = arpo_config(model)
    config.env_config = {}
    return config.environment("echo", env_config={"vocab": vocab, **env_config})


def test_a_registered_env_of_the_users_own_trains(almanac_model) -> None:
    with running(echo_config(almanac_model)) as algorithm:
        numbers = own_numbers(algorithm.train())
    assert 0 < numbers[REWARD_MEAN] < 1
    assert numbers["grad_norm"] > 0
    # 4 trees, 4 leaves, 6 tokens each: one turn and no stop string.
    assert numbers["num_tokens_trained"] <= 96


def test_a_nan_reward_skips_the_step_and_is_counted(almanac_model) -> None:
    config = echo_config(almanac_model).training(minibatch_size=4)
    with running(config) as algorithm:
        algorithm.train()
        weights, moments = learner_weights(algorithm), optimizer_state(algorithm)
        first = algorithm._cursor.next(1)[0]
    with running(
        config.copy().environment(
            env_config={**config.env_config, "nan_for": first.task_id}
        )
    ) as algorithm:
        algorithm.train()
        assert same(weights, learner_weights(algorithm))
        numbers = learned(algorithm.train())
        assert (numbers["num_optimizer_steps"], numbers["num_skipped_steps"]) == (1, 1)
        assert same(weights, learner_weights(algorithm))
        assert same(moments, optimizer_state(algorithm))


def reward_of_some_tasks(trajectory: Trajectory) -> float:
    """No variance in tasks of an even number."""
    if int(trajectory.task.task_id.rsplit("/", 1)[-1].rsplit("-", 1)[-1]) % 2 == 0:
        return 0.0
    return float(sum(map(ord, "".join(turn.text for turn in trajectory.turns))))


def test_dynamic_sampling_replaces_groups_without_variance(almanac_model) -> None:
    config = arpo_config(almanac_model, reward_fn=reward_of_some_tasks)
    with running(config) as algorithm:
        plain = algorithm.train()
    assert 0 < learned(plain)["equal_reward_groups"] < 1
    config = config.copy().training(
        dynamic_sampling=True, max_dynamic_sampling_rounds=8
    )
    with running(config) as algorithm:
        result = algorithm.train()
    sampled, trained = result["env_runners"], learned(result)
    assert trained["equal_reward_groups"] == 0
    assert sampled[DYNAMIC_SAMPLING_ROUNDS] > 0
    # Means are over all trees of the iteration, replaced ones included.
    replaced = sampled["num_episodes"] - 4
    assert replaced > 0
    assert sampled["degenerate_group_share"] == replaced / sampled["num_episodes"]


def test_a_restored_run_goes_on_as_if_it_had_never_stopped(
    cold_start, tmp_path: Path
) -> None:
    config = arpo_config(cold_start.model).training(
        optimizer="muon", lr_schedule="cosine", lr_total_steps=9
    )
    with running(config) as algorithm:
        algorithm.train()
        saved = learner_weights(algorithm), optimizer_state(algorithm)
        folder = algorithm.save_to_path(str(tmp_path / "checkpoint"))
        expected = own_numbers(algorithm.train())
        weights, moments = learner_weights(algorithm), optimizer_state(algorithm)
        algorithm.train()

        # An older checkpoint, into the algorithm that went on.
        algorithm.restore_from_path(folder)
        held = engine_weights(algorithm.env_runner_group.local_env_runner)
        assert same(saved, (learner_weights(algorithm), optimizer_state(algorithm)))
        assert all(same(held[name], array) for name, array in saved[0].items())
        assert same(own_numbers(algorithm.train()), expected)
        assert same(weights, learner_weights(algorithm))

    restored = ARPO.from_checkpoint(folder)
    try:
        held = engine_weights(restored.env_runner_group.local_env_runner)
        assert restored.iteration == 1
        assert same(saved, (learner_weights(restored), optimizer_state(restored)))
        assert all(same(held[name], array) for name, array in saved[0].items())
        assert same(own_numbers(restored.train()), expected)
        assert same(weights, learner_weights(restored))
        assert same(moments, optimizer_state(restored))
    finally:
        restored.stop()


def test_another_runs_checkpoint_of_the_same_iteration_reaches_all_engines(
    almanac_model, tmp_path: Path
) -> None:
    config = arpo_config(almanac_model).evaluation(evaluation_num_env_runners=1)
    with running(config.copy().training(lr=1e-2)) as other:
        other.train()
        folder = other.save_to_path(str(tmp_path / "checkpoint"))
        saved = learner_weights(other)
    with running(config) as algorithm:
        algorithm.train()
        algorithm.evaluate()
        algorithm.restore_from_path(folder)
        algorithm.evaluate()
        runners = algorithm.env_runner_group, algorithm.eval_env_runner_group
        for group in runners:
            for held in group.foreach_env_runner(engine_weights):
                assert all(same(held[name], array) for name, array in saved.items())


def test_other_data_cannot_be_resumed_with(almanac_model, tmp_path) -> None:
    config = arpo_config(almanac_model)
    with running(config) as algorithm:
        folder = algorithm.save_to_path(str(tmp_path / "checkpoint"))
        fewer = algorithm.eval_tasks
    with (
        running(config.copy().environment(train_tasks=fewer)) as algorithm,
        pytest.raises(DataError, match="16 tasks, the data holds 4"),
    ):
        algorithm.restore_from_path(folder)


def test_the_trained_model_is_a_hugging_face_folder(trained, tmp_path) -> None:
    algorithm, _ = trained
    folder = algorithm.save_pretrained(tmp_path / "model")
    assert same(folder_weights(str(folder)), learner_weights(algorithm))
    assert (folder / "tokenizer.json").exists()
