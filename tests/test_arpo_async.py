"""Asynchronous training with real EnvRunner actors: order, age, and what may die.

One algorithm with two runners serves most tests, in the order of this file.
"""

import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray

from rllib_arpo import ARPO, ARPOConfig, RolloutTree
from rllib_arpo.engines.weights import WEIGHT_PROBE
from rllib_arpo.errors import ConfigError, EngineError, RewardError, WeightSyncError
from rllib_arpo.rollouts.branching import derive_seed
from rllib_arpo.rollouts.tree_stream import model_versions
from tests.tiny_runs import (
    NUM_EVAL_TASKS,
    arpo_config,
    engine_weights,
    learner_weights,
    running,
    same,
    token_ids,
)
from tests.unruly_envs import UnrulyEnv

pytestmark = [pytest.mark.usefixtures("ray_session"), pytest.mark.timeout(600)]

BATCH = 2
LAG = 2


def asynchronous(model: str, *, lag: int = LAG, **env_config: Any) -> ARPOConfig:
    return (
        arpo_config(model, **env_config)
        .env_runners(num_env_runners=1)
        .training(
            train_batch_size_per_learner=BATCH,
            minibatch_size=1,
            asynchronous=True,
            max_policy_lag=lag,
            tis_cap=2.0,
            old_logprobs="recompute",
        )
        .debugging(deterministic=lag == 0)
        .fault_tolerance(delay_between_env_runner_restarts_s=0.1)
    )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_env_runners": 0}, ["`asynchronous` (True)", "num_env_runners", "(0)"]),
        ({"max_policy_lag": -1}, ["`max_policy_lag` (-1)", ">= 0"]),
        ({"max_concurrent_trees": 0}, ["`max_concurrent_trees` (0)", "None"]),
        (
            {"tis_cap": None},
            ["`max_policy_lag` (2)", 'tis_cap=2.0, old_logprobs="recompute"'],
        ),
        (
            {"old_logprobs": "rollout"},
            ["`old_logprobs` ('rollout')", 'tis_cap=2.0, old_logprobs="recompute"'],
        ),
        ({"deterministic": True}, ["`deterministic` (True)", "`max_policy_lag` (2)"]),
        ({"dynamic_sampling": True}, ["`dynamic_sampling` (True)", "`asynchronous`"]),
        ({"tis_cap": 0.5}, ["`tis_cap` (0.5)", ">= 1"]),
    ],
)
def test_what_cannot_work_is_refused_with_the_cure(settings, words) -> None:
    config = asynchronous("model")
    for name, value in settings.items():
        setattr(config, name, value)
    with pytest.raises(ConfigError) as refused:
        config.validate()
    for word in words:
        assert word in str(refused.value)


def test_without_a_lag_no_importance_weights_are_asked_for() -> None:
    asynchronous("model", lag=0).training(
        tis_cap=None, old_logprobs="rollout"
    ).validate()


def record_batches(algorithm: ARPO) -> list[tuple[int, list[RolloutTree]]]:
    """What each update was made with, beside the version of the weights before it."""
    batches: list[tuple[int, list[RolloutTree]]] = []
    update = algorithm._update

    def recording(batch: list[RolloutTree]) -> None:
        version = algorithm._weights_seq_no
        update(batch)
        batches.append((version, batch))

    algorithm._update = recording
    return batches


def kept_jobs(algorithm: ARPO) -> list[int]:
    """Seeds of the jobs that no update was made with."""
    return [seed for seed, _ in algorithm.get_state()["jobs"]]


def begun_jobs(algorithm: ARPO) -> list[int]:
    """Seeds of all jobs, in the order in which they began."""
    seed = algorithm.config.seed
    return [derive_seed(seed, "train", n) for n in range(algorithm._num_trees_started)]


def three_iterations(config: ARPOConfig) -> Any:
    """Weights, trees and metrics of three iterations."""
    with running(config) as algorithm:
        batches = record_batches(algorithm)
        results = [algorithm.train() for _ in range(3)]
        trees = [tree for _, batch in batches for tree in batch]
        return learner_weights(algorithm), trees, results


def test_a_lag_of_zero_is_the_synchronous_algorithm(cold_start) -> None:
    config = asynchronous(cold_start.model, lag=0).training(
        train_batch_size_per_learner=4
    )
    weights, trees, results = three_iterations(
        config.copy().training(asynchronous=False)
    )
    same_weights, same_trees, same_results = three_iterations(config)
    assert len({tree.seed for tree in trees}) == 12
    assert [tree.seed for tree in trees] == [tree.seed for tree in same_trees]
    assert token_ids(trees) == token_ids(same_trees)
    assert same(weights, same_weights)
    for one, other in zip(results, same_results, strict=True):
        one, other = one["env_runners"], other["env_runners"]
        assert other["num_trees_stale"] == other["policy_lag_max"] == 0
        for name in ("num_episodes", "num_env_steps_sampled_lifetime", "reward_mean"):
            assert one[name] == other[name]


@pytest.fixture(scope="module")
def signs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("signs")


@pytest.fixture(scope="module")
def algorithm(cold_start, signs):
    config = asynchronous(cold_start.model, signs=str(signs))
    config.environment(env=UnrulyEnv).env_runners(num_env_runners=2)
    config.training(max_concurrent_trees=2)
    with running(config) as algorithm:
        yield algorithm


@pytest.fixture(scope="module")
def batches(algorithm):
    return record_batches(algorithm)


def actors(algorithm: ARPO) -> list[Any]:
    return list(algorithm.env_runner_group._worker_manager.actors().values())


def growing(algorithm: ARPO) -> set[int]:
    """Seeds of the trees that runners are growing."""
    return set().union(
        *algorithm.env_runner_group.foreach_env_runner(
            lambda runner: set(runner._queue._growing), local_env_runner=False
        )
    )


def wait_until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < deadline, "nothing happened in 240 s"
        time.sleep(0.05)


def assert_none_is_lost_or_twice(algorithm: ARPO, batches: Any) -> None:
    trained = [tree.seed for _, batch in batches for tree in batch]
    assert all(len(batch) == BATCH for _, batch in batches)
    assert sorted(trained + kept_jobs(algorithm)) == sorted(begun_jobs(algorithm))


def assert_all_get_their_turn(algorithm: ARPO, batches: Any, jobs: list[int]) -> None:
    """Train on until each of these jobs has been trained on."""
    for _ in range(4 * (LAG + 1)):
        if not set(jobs) & set(kept_jobs(algorithm)):
            break
        algorithm.train()
    assert not set(jobs) & set(kept_jobs(algorithm))
    assert_none_is_lost_or_twice(algorithm, batches)


def assert_all_run_the_learners_weights(algorithm: ARPO) -> None:
    wait_until(lambda: all_answer(algorithm))
    algorithm.restore_env_runners(algorithm.env_runner_group)
    held = algorithm.env_runner_group.foreach_env_runner(
        engine_weights, local_env_runner=False
    )
    weights = learner_weights(algorithm)
    assert len(held) == algorithm.config.num_env_runners
    assert all(same(one[name], weights[name]) for one in held for name in one)


def test_no_tree_is_lost_trained_twice_or_older_than_the_lag(algorithm, batches):
    for _ in range(4):
        sampled = algorithm.train()["env_runners"]
        assert sampled["num_episodes"] == BATCH
        assert 0 <= sampled["policy_lag_mean"] <= sampled["policy_lag_max"] <= LAG
    assert_none_is_lost_or_twice(algorithm, batches)
    # The gate: what is begun is at most the batches trained on and three ahead.
    assert algorithm._num_trees_started == (3 + LAG + 1) * BATCH
    for version, batch in batches:
        for tree in batch:
            assert version - LAG <= model_versions(tree).min()
            assert model_versions(tree).max() <= version
    assert_all_run_the_learners_weights(algorithm)


def next_task_id(algorithm: ARPO) -> str:
    cursor = algorithm._cursor
    state = cursor.get_state()
    (task,) = cursor.next(1)
    cursor.set_state(state)
    return task.task_id


def hold_next_tree(algorithm: ARPO, signs: Path) -> int:
    """Train on until a tree is stuck in its first turn; its seed."""
    (signs / "hold").write_text(next_task_id(algorithm))
    number = algorithm._num_trees_started
    algorithm.train()
    seed = begun_jobs(algorithm)[number]
    wait_until(lambda: seed in growing(algorithm))
    return seed


def test_a_tree_older_than_the_lag_is_grown_again(algorithm, batches, signs) -> None:
    seed = hold_next_tree(algorithm, signs)
    begun_at = algorithm._weights_seq_no
    for _ in range(LAG + 2):
        algorithm.train()
    (signs / "hold").unlink()
    num_stale = 0
    while seed in kept_jobs(algorithm):
        num_stale += algorithm.train()["env_runners"]["num_trees_stale"]
    assert num_stale >= 1
    (tree,) = (t for _, batch in batches for t in batch if t.seed == seed)
    assert model_versions(tree).min() > begun_at
    assert_none_is_lost_or_twice(algorithm, batches)


def test_an_evaluation_runs_the_latest_weights_beside_trees_that_grow(
    algorithm, batches, signs
) -> None:
    seed = hold_next_tree(algorithm, signs)
    evaluated = algorithm.evaluate()["env_runners"]
    assert evaluated["num_episodes"] == NUM_EVAL_TASKS
    trees = algorithm.sample_trees(
        algorithm.eval_tasks, range(NUM_EVAL_TASKS), results_key=("aside",)
    )
    assert [tree.task for tree in trees] == list(algorithm.eval_tasks)
    versions = {version for tree in trees for version in model_versions(tree).tolist()}
    assert versions == {algorithm._weights_seq_no}
    assert seed in growing(algorithm)
    (signs / "hold").unlink()
    algorithm.train()
    assert_none_is_lost_or_twice(algorithm, batches)


def test_a_checkpoint_holds_the_jobs_that_no_update_was_made_with(
    algorithm, batches, signs, tmp_path
) -> None:
    hold_next_tree(algorithm, signs)
    kept, trained = kept_jobs(algorithm), len(batches)
    folder = algorithm.save_to_path(str(tmp_path / "checkpoint"))
    (signs / "hold").unlink()
    algorithm.train()
    assert kept_jobs(algorithm) != kept
    algorithm.restore_from_path(folder)
    assert kept_jobs(algorithm) == kept
    assert_all_run_the_learners_weights(algorithm)
    del batches[trained:]
    for _ in range(2):
        algorithm.train()
    assert_none_is_lost_or_twice(algorithm, batches)


def test_an_error_of_the_reward_is_raised_and_its_job_is_kept(
    algorithm, batches, signs
) -> None:
    (signs / "broken").touch()
    with pytest.raises(RewardError, match="by nothing"):
        for _ in range(LAG + 2):
            algorithm.train()
    (signs / "broken").unlink()
    kept = kept_jobs(algorithm)
    # Trees that failed before may still be heard of, each once.
    for _ in range((LAG + 1) * BATCH):
        with suppress(RewardError):
            algorithm.train()
    algorithm.train()
    assert_all_get_their_turn(algorithm, batches, kept)


def test_weights_that_do_not_arrive_stop_the_training(algorithm, batches) -> None:
    state = algorithm._publish_weights()
    probe = state[WEIGHT_PROBE]
    wrong = replace(probe, logprobs=probe.logprobs - 1.0)
    algorithm._stream.push_weights({**state, WEIGHT_PROBE: wrong})
    with pytest.raises(WeightSyncError, match="does not run the learner's weights"):
        for _ in range(2):
            algorithm.train()
    algorithm.train()
    assert_none_is_lost_or_twice(algorithm, batches)


def test_an_interrupt_of_the_wait_for_trees_loses_no_job(
    algorithm, batches, signs, monkeypatch
) -> None:
    collect = algorithm._stream._collect
    interrupt = threading.Timer(0.5, signal.raise_signal, [signal.SIGINT])

    def collecting(*, wait_s: float) -> None:
        collect(wait_s=wait_s)
        if wait_s:
            interrupt.start()
            while True:  # no update begins before the signal is there
                collect(wait_s=wait_s)

    (signs / "hold").write_text("*")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(algorithm._stream, "_collect", collecting)
        try:
            for _ in range(LAG + 2):
                algorithm.train()
        finally:
            interrupt.cancel()
            (signs / "hold").unlink()
    assert_all_get_their_turn(algorithm, batches, kept_jobs(algorithm))


def test_jobs_of_a_runner_that_dies_in_its_environment_are_queued_again(
    algorithm, batches, signs
) -> None:
    (signs / "die").touch()
    num_requeued = 0
    while not num_requeued:
        num_requeued += algorithm.train()["env_runners"]["num_trees_requeued"]
    assert not (signs / "die").exists()
    wait_until(lambda: all_answer(algorithm))
    assert_all_get_their_turn(algorithm, batches, kept_jobs(algorithm))
    assert_all_run_the_learners_weights(algorithm)


def has_ended(actor: Any) -> bool:
    try:
        ray.get(actor.ping.remote())
    except ray.exceptions.RayActorError:
        return True
    return False


def process_of(actor: Any) -> int | None:
    """Its id, or None while there is none."""
    try:
        return ray.get(actor.apply.remote(lambda _: os.getpid()))
    except ray.exceptions.RayError:
        return None


def all_answer(algorithm: ARPO) -> bool:
    """Whether all processes are there; the algorithm does not hear of it."""
    try:
        ray.get([actor.ping.remote() for actor in actors(algorithm)])
    except ray.exceptions.RayError:
        return False
    return True


def test_when_all_runners_are_killed_training_waits_for_them(
    algorithm, batches, signs
) -> None:
    wait_until(lambda: all_answer(algorithm))
    seed = hold_next_tree(algorithm, signs)
    begun, version = algorithm._num_trees_started, algorithm._weights_seq_no
    for actor in actors(algorithm):
        ray.kill(actor, no_restart=False)
    (signs / "hold").unlink()
    num_requeued = 0
    for _ in range(LAG + 1):
        sampled = algorithm.train()["env_runners"]
        assert sampled["num_episodes"] == BATCH
        num_requeued += sampled["num_trees_requeued"]
    assert num_requeued >= 1 and seed in begun_jobs(algorithm)
    assert_all_get_their_turn(algorithm, batches, begun_jobs(algorithm)[:begun])
    wait_until(lambda: all_answer(algorithm))
    assert_all_run_the_learners_weights(algorithm)
    later = set(begun_jobs(algorithm)[begun:])
    trees = [tree for _, batch in batches for tree in batch if tree.seed in later]
    assert trees and all(model_versions(tree).min() >= version for tree in trees)


def test_a_restart_that_nobody_noticed_is_noticed(algorithm, batches) -> None:
    algorithm.train()
    actor = actors(algorithm)[0]
    killed = process_of(actor)
    ray.kill(actor, no_restart=False)
    # The one that is killed may answer once more.
    wait_until(lambda: process_of(actor) not in (None, killed))
    # Its weights are the first ones by now.
    trees = algorithm.sample_trees(
        algorithm.eval_tasks, range(NUM_EVAL_TASKS), results_key=("aside",)
    )
    versions = {version for tree in trees for version in model_versions(tree).tolist()}
    assert versions == {algorithm._weights_seq_no}
    assert_all_get_their_turn(algorithm, batches, kept_jobs(algorithm))
    assert_all_run_the_learners_weights(algorithm)


def test_stopping_does_not_wait_for_trees(algorithm, signs) -> None:
    hold_next_tree(algorithm, signs)
    runners = actors(algorithm)
    algorithm.stop()
    # Ray ends an actor some time after it was told to.
    wait_until(lambda: all(has_ended(actor) for actor in runners))


def test_without_runners_training_stops_in_time_and_can_go_on(
    almanac_model, tmp_path
) -> None:
    config = asynchronous(almanac_model, signs=str(tmp_path))
    config.environment(env=UnrulyEnv)
    config.fault_tolerance(env_runner_restore_timeout_s=2)
    with running(config) as algorithm:
        batches = record_batches(algorithm)
        (tmp_path / "closed").touch()
        (actor,) = actors(algorithm)
        ray.kill(actor, no_restart=False)
        message = r"none came back within `env_runner_restore_timeout_s` \(2 s\)"
        with pytest.raises(EngineError, match=message):
            algorithm.train()
        # The synchronous way.
        with pytest.raises(EngineError, match=message):
            algorithm.sample_trees(algorithm.eval_tasks, range(NUM_EVAL_TASKS))
        assert batches == []
        (tmp_path / "closed").unlink()
        wait_until(lambda: all_answer(algorithm))
        algorithm.train()
        assert_none_is_lost_or_twice(algorithm, batches)
