"""Two EnvRunners on vLLM and one Learner: equal policies, an engine that dies.

One algorithm serves all tests, in the order of this file: starting it takes longer
than everything that is asked of it.
"""

import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from rllib_arpo import ARPO
from rllib_arpo.errors import WeightSyncError
from rllib_arpo.metrics import NUM_TREES_REQUEUED
from tests.tiny_runs import NUM_TRAIN_TASKS, arpo_config, learned, tasks

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs")


@pytest.fixture(scope="module")
def algorithm(cold_start, ray_session, logs):
    config = (
        arpo_config(cold_start.model)
        .debugging(deterministic=False)
        .engine(
            "vllm",
            engine_kwargs={"kv_cache_memory_bytes": 64 * 2**20},
            log_dir=str(logs),
        )
        .env_runners(num_env_runners=2)
        .learners(num_learners=1, num_cpus_per_learner=1)
        .fault_tolerance(delay_between_env_runner_restarts_s=0.1)
    )
    algorithm = config.build_algo()
    yield algorithm
    algorithm.stop()


def on_runners(algorithm: ARPO, function: Any) -> list[Any]:
    return algorithm.env_runner_group.foreach_env_runner(
        function, local_env_runner=False
    )


def wait_for_runners(algorithm: ARPO) -> None:
    group = algorithm.env_runner_group
    deadline = time.monotonic() + 280
    while group.num_healthy_remote_env_runners() < 2:
        assert time.monotonic() < deadline, "the runner did not come back"
        algorithm.restore_env_runners(group)
        time.sleep(0.5)


def process_ids(env_runner: Any) -> list[int]:
    """The actor's, and those of its engine."""
    me = psutil.Process()
    return [me.pid, *(child.pid for child in me.children(recursive=True))]


def test_three_iterations_train_with_a_ratio_of_one(algorithm: ARPO, logs) -> None:
    for iteration in range(1, 4):
        result = algorithm.train()
        numbers, sampled = learned(result), result["env_runners"]
        # |log r| of the first step, before the weights change.
        assert numbers["sampler_logprob_difference"] < 1e-3
        assert numbers["num_optimizer_steps"] == 2 * iteration
        assert sampled["num_episodes"] == 4
        engine = sampled["engine"]
        assert engine["num_generated_tokens"] == sampled["num_tokens_sampled"]
        assert 0 < engine["prefix_cache_hit_rate"] < 1
        assert engine["weight_probe_error"] < 1e-5
        assert "entropy_approximated_by_top_k" not in engine
    assert {file.name for file in logs.iterdir()} == {"vllm_1.log", "vllm_2.log"}


def test_every_token_is_stamped_with_the_version_that_sampled_it(
    algorithm: ARPO,
) -> None:
    before = grow(algorithm, [1, 2])
    algorithm.train()
    after = grow(algorithm, [1, 2])
    assert versions(before) == {3}
    assert versions(after) == {4}


def grow(algorithm: ARPO, seeds: list[int]) -> Any:
    questions = tasks("train", NUM_TRAIN_TASKS)[: len(seeds)]
    return algorithm.sample_trees(questions, seeds, results_key=("aside",))


def versions(trees: Any) -> set[int]:
    return {
        int(version)
        for tree in trees
        for segment in tree.segments
        if segment.role == "model"
        for version in segment.policy_versions
    }


def test_an_engine_that_dies_is_restarted_and_loses_no_task(algorithm: ARPO) -> None:
    before = on_runners(algorithm, process_ids)
    assert all(len(ids) > 1 for ids in before)
    victim, *engine = before[0]
    for process_id in engine:
        os.kill(process_id, signal.SIGKILL)
    result = algorithm.train()
    assert result["env_runners"]["num_episodes"] == 4
    assert result["env_runners"][NUM_TREES_REQUEUED] == 2
    wait_for_runners(algorithm)
    result = algorithm.train()
    assert result["env_runners"]["num_episodes"] == 4
    assert learned(result)["sampler_logprob_difference"] < 1e-3
    after = [ids[0] for ids in on_runners(algorithm, process_ids)]
    assert before[1][0] in after and victim not in after and len(after) == 2


def test_weights_that_went_wrong_stop_training(algorithm: ARPO) -> None:
    """The learner publishes other weights than those that its probe was scored by."""

    def spoil(learner: Any) -> None:
        honest = learner.engine_state

        def dishonest(*, weights: bool) -> dict[str, Any]:
            state = honest(weights=weights)
            module = state["rl_module"]["default_policy"]
            name = next(name for name in module if "down_proj" in name)
            module[name] = np.zeros_like(module[name])
            return state

        learner.engine_state = dishonest

    list(algorithm.learner_group.foreach_learner(spoil))
    with pytest.raises(WeightSyncError, match="does not run the learner's weights"):
        algorithm.train()
