"""Two EnvRunners and two Learners: whole trees, equal weights, runners that die.

One algorithm serves all tests, in the order of this file: starting it takes longer
than everything that is asked of it.
"""

import os
import time
from typing import Any

import numpy as np
import pytest
import ray
from ray.rllib.core import DEFAULT_MODULE_ID

from rllib_arpo import ARPO, RolloutTree, Task
from rllib_arpo.envs.almanac import AlmanacEnv
from rllib_arpo.errors import EngineError
from rllib_arpo.metrics import NUM_TREES_REQUEUED
from rllib_arpo.rollouts.tree_stream import model_versions
from tests.tiny_runs import (
    NUM_TRAIN_TASKS,
    arpo_config,
    engine_weights,
    learned,
    learner_weights,
    running,
    same,
    token_ids,
)

pytestmark = pytest.mark.timeout(600)

TREES_PER_LEARNER = 2


class MortalEnv(AlmanacEnv):
    """Kills the first process that starts a rollout while the file `trap` is there."""

    def __init__(self, config: Any = None) -> None:
        settings = dict(config or {})
        self.trap = settings.pop("trap")
        super().__init__(settings)

    def reset(self, *, seed=None, options=None):
        try:
            os.remove(self.trap)
        except FileNotFoundError:
            return super().reset(seed=seed, options=options)
        os._exit(1)


@pytest.fixture(scope="module")
def trap(tmp_path_factory):
    return tmp_path_factory.mktemp("trap") / "set"


@pytest.fixture(scope="module")
def algorithm(cold_start, ray_session, trap):
    config = (
        arpo_config(cold_start.model, trap=str(trap))
        .environment(env=MortalEnv)
        .training(train_batch_size_per_learner=TREES_PER_LEARNER, minibatch_size=1)
        .env_runners(num_env_runners=2)
        .learners(num_learners=2, num_cpus_per_learner=1)
        .fault_tolerance(delay_between_env_runner_restarts_s=0.1)
    )
    algorithm = config.build_algo()
    yield algorithm
    algorithm.stop()


def weights_of_learners(algorithm: ARPO) -> list[dict[str, np.ndarray]]:
    results = algorithm.learner_group.foreach_learner(
        lambda learner: learner.module[DEFAULT_MODULE_ID].get_state()
    )
    return [result.get() for result in results]


def weights_of_runners(algorithm: ARPO) -> list[dict[str, np.ndarray]]:
    return algorithm.env_runner_group.foreach_env_runner(
        engine_weights, local_env_runner=False
    )


def all_equal(algorithm: ARPO, *, num_runners: int = 2) -> bool:
    first, second = weights_of_learners(algorithm)
    runners = weights_of_runners(algorithm)
    return (
        len(runners) == num_runners
        and same(first, second)
        and all(same(held[name], first[name]) for held in runners for name in first)
    )


def grow(algorithm: ARPO, tasks: list[Task], seeds: list[int]) -> list[RolloutTree]:
    """Trees whose counts do not enter the next iteration's."""
    return algorithm.sample_trees(tasks, seeds, results_key=("aside",))


def record_trees(learner: Any) -> None:
    """Make a learner remember which trees it trained on, and on how many tokens."""
    learner.seen = []
    original = learner._run_connectors

    def recording(data: Any) -> Any:
        columns = original(data)
        learner.seen.append(
            (
                [
                    (tree.seed, len(tree.leaves), len(model_versions(tree)))
                    for tree in data.trees
                ],
                int(columns["loss_mask"].sum()),
            )
        )
        return columns

    learner._run_connectors = recording


def test_a_runner_that_cannot_start_says_why(almanac_model, ray_session) -> None:
    config = arpo_config(almanac_model).env_runners(num_env_runners=1)
    config.engine(engine_kwargs={"max_model_len": 10**6})
    with pytest.raises(EngineError, match=r"No EnvRunner could start: .*1000000"):
        config.build_algo()


def test_all_hold_the_same_weights_from_the_start(algorithm) -> None:
    assert algorithm.env_runner_group.local_env_runner is None
    assert all_equal(algorithm)


def test_a_tree_is_never_split_and_no_token_is_trained_twice(algorithm) -> None:
    list(algorithm.learner_group.foreach_learner(record_trees))
    result = algorithm.train()
    seen = [
        answer.get()
        for answer in algorithm.learner_group.foreach_learner(
            lambda learner: learner.seen
        )
    ]
    shards = [trees for ((trees, _),) in seen]
    assert [len(trees) for trees in shards] == [TREES_PER_LEARNER] * 2
    seeds = [seed for trees in shards for seed, *_ in trees]
    assert len(set(seeds)) == 2 * TREES_PER_LEARNER
    # Each learner has its trees whole, and each token of the model once.
    assert all(leaves == 4 for trees in shards for _, leaves, _ in trees)
    assert [tokens for ((_, tokens),) in seen] == [
        sum(tokens for *_, tokens in trees) for trees in shards
    ]
    numbers = learned(result)
    # 2 trees a learner, 1 a step.
    assert numbers["num_optimizer_steps"] == 2
    assert numbers["sampler_logprob_difference"] < 1e-4
    sampled = result["env_runners"]
    assert sampled["num_episodes"] == 4
    # Counters of both engines.
    assert sampled["engine"]["num_generated_tokens"] == sampled["num_tokens_sampled"]


def test_all_hold_the_same_weights_after_an_update(algorithm, cold_start) -> None:
    assert all_equal(algorithm)
    steps = [
        answer.get()
        for answer in algorithm.learner_group.foreach_learner(
            lambda learner: learner.num_optimizer_steps
        )
    ]
    assert steps == [2, 2]


def test_tasks_are_spread_over_both_runners_in_whole_trees(algorithm) -> None:
    tasks = list(algorithm.eval_tasks)
    before = algorithm.env_runner_group.foreach_env_runner(
        lambda runner: runner.num_env_steps_sampled_lifetime, local_env_runner=False
    )
    trees = grow(algorithm, tasks, [10, 11, 12, 13])
    after = algorithm.env_runner_group.foreach_env_runner(
        lambda runner: runner.num_env_steps_sampled_lifetime, local_env_runner=False
    )
    assert [tree.task for tree in trees] == tasks
    assert [tree.seed for tree in trees] == [10, 11, 12, 13]
    assert all(len(tree.leaves) == 4 for tree in trees)
    turns = [len(tree) for tree in trees]
    # The first runner has the first and third task, the other the rest.
    assert [b - a for a, b in zip(before, after, strict=True)] == [
        turns[0] + turns[2],
        turns[1] + turns[3],
    ]


def test_who_grows_a_tree_does_not_change_it(algorithm) -> None:
    tasks = list(algorithm.eval_tasks)
    four = grow(algorithm, tasks, [10, 11, 12, 13])
    one = grow(algorithm, tasks[:1], [10])
    assert token_ids(one) == token_ids(four[:1])


def test_a_runner_that_dies_while_sampling_loses_no_task(algorithm, trap) -> None:
    tasks = list(algorithm.eval_tasks)
    expected = token_ids(grow(algorithm, tasks, [20, 21, 22, 23]))
    trap.touch()
    trees = grow(algorithm, tasks, [20, 21, 22, 23])
    assert not trap.exists()
    assert [tree.task for tree in trees] == tasks
    assert token_ids(trees) == expected


def restarted(algorithm: ARPO) -> None:
    """Wait until both runners are back."""
    deadline = time.monotonic() + 240
    while algorithm.env_runner_group.num_healthy_remote_env_runners() < 2:
        assert time.monotonic() < deadline, "no runner came back"
        algorithm.restore_env_runners(algorithm.env_runner_group)
        time.sleep(0.1)


def test_an_iteration_in_which_a_runner_dies_is_whole(algorithm, trap) -> None:
    restarted(algorithm)
    assert all_equal(algorithm)
    position = algorithm._cursor.get_state()
    trap.touch()
    result = algorithm.train()
    assert not trap.exists()
    # Its two trees, grown by the other: none lost, none twice.
    assert result["env_runners"][NUM_TREES_REQUEUED] == 2
    assert result["env_runners"]["num_episodes"] == 4
    assert tasks_taken(algorithm, position) == 4


def tasks_taken(algorithm: ARPO, since: Any) -> int:
    state = algorithm._cursor.get_state()
    epochs = state["epoch"] - since["epoch"]
    return epochs * NUM_TRAIN_TASKS + state["position"] - since["position"]


def test_a_runner_that_died_comes_back_with_the_current_weights(algorithm) -> None:
    restarted(algorithm)
    assert all_equal(algorithm)


def test_a_runner_killed_between_iterations_leaves_no_empty_one(algorithm) -> None:
    position = algorithm._cursor.get_state()
    (actor, *_) = algorithm.env_runner_group._worker_manager.actors().values()
    ray.kill(actor, no_restart=False)
    result = algorithm.train()
    assert result["env_runners"]["num_episodes"] == 4
    assert tasks_taken(algorithm, position) == 4
    restarted(algorithm)
    assert all_equal(algorithm)


def test_restoring_gives_all_of_them_the_weights_of_the_checkpoint(
    algorithm, tmp_path
) -> None:
    saved = learner_weights(algorithm)
    folder = algorithm.save_to_path(str(tmp_path / "checkpoint"))
    algorithm.train()
    assert not same(saved, learner_weights(algorithm))
    algorithm.restore_from_path(folder)
    assert same(saved, learner_weights(algorithm))
    assert all_equal(algorithm)


class DoomedEnv(AlmanacEnv):
    """Kills the process of its first rollout, and cannot be made again."""

    def __init__(self, config: Any = None) -> None:
        settings = dict(config or {})
        self.grave = settings.pop("grave")
        if os.path.exists(self.grave):
            raise ConnectionRefusedError("no licence server")
        super().__init__(settings)

    def reset(self, *, seed=None, options=None):
        open(self.grave, "w").close()
        os._exit(1)


def test_why_no_runner_comes_back_is_named(almanac_model, ray_session, tmp_path):
    config = (
        arpo_config(almanac_model, grave=str(tmp_path / "grave"))
        .environment(env=DoomedEnv)
        .env_runners(num_env_runners=1)
        .fault_tolerance(delay_between_env_runner_restarts_s=0.1)
    )
    with (
        running(config) as algorithm,
        pytest.raises(EngineError, match="ConnectionRefusedError: no licence server"),
    ):
        algorithm.train()
