"""Runs of a second or two on the almanac, and what tests ask of them."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from ray.rllib.core import COMPONENT_LEARNER, COMPONENT_RL_MODULE, DEFAULT_MODULE_ID

from rllib_arpo import ARPO, ARPOConfig, RolloutTree, SFTConfig, Task, Trajectory
from rllib_arpo.envs.almanac import AlmanacEnv, AlmanacWorld, Split
from rllib_arpo.envs.almanac_expert import AlmanacExpert

NUM_TRAIN_TASKS = 16
NUM_EVAL_TASKS = 4


@dataclass(frozen=True)
class ColdStart:
    """What the cold start of the session left behind."""

    losses: list[float]
    model: str
    checkpoint: str


def tasks(split: Split, num: int) -> list[Task]:
    return AlmanacWorld().tasks(split, num)


def traces(model: str, num: int) -> Sequence[RolloutTree]:
    env = AlmanacEnv({"tokenizer": model})
    return AlmanacExpert(AlmanacWorld()).traces(
        num,
        dialogue=env.dialogue,  # type: ignore[arg-type]
        seed=0,
        clean_fraction=1.0,
    )


def token_sum_reward(trajectory: Trajectory) -> float:
    """Differs between rollouts of any model, however untrained."""
    return float(sum(len(turn.text) for turn in trajectory.turns) % 5)


def arpo_config(model: str, **env_config: Any) -> ARPOConfig:
    return (
        ARPOConfig()
        .environment(
            env=AlmanacEnv,
            env_config={
                "max_response_tokens": 48,
                "reward_fn": token_sum_reward,
                **env_config,
            },
            train_tasks=partial(tasks, "train", NUM_TRAIN_TASKS),
            eval_tasks=partial(tasks, "test", NUM_EVAL_TASKS),
        )
        .rl_module(model_config={"model": model})
        .tree_rollout(
            group_size=4,
            num_initial_rollouts=2,
            branch_rule="bernoulli",
            entropy_probe_tokens=4,
        )
        .training(lr=1e-3, train_batch_size_per_learner=4, minibatch_size=2)
        .evaluation(evaluation_duration=NUM_EVAL_TASKS)
        .env_runners(num_env_runners=0)
        .learners(num_learners=0)
        .debugging(seed=0, deterministic=True, log_level="ERROR")
    )


def sft_config(model: str) -> SFTConfig:
    return (
        SFTConfig()
        .environment(
            env=AlmanacEnv,
            train_traces=partial(traces, model, 400),
            eval_tasks=partial(tasks, "test", NUM_EVAL_TASKS),
        )
        .rl_module(model_config={"model": model})
        .training(
            train_batch_size_per_learner=160,
            minibatch_size=16,
            optimizer="muon",
            lr=5e-3,
            muon_lr=0.02,
            weight_decay=0.0,
        )
        .evaluation(evaluation_duration=NUM_EVAL_TASKS)
        .env_runners(num_env_runners=0)
        .learners(num_learners=0)
        .debugging(seed=0, deterministic=True, log_level="ERROR")
    )


@contextmanager
def running(config: ARPOConfig) -> Iterator[ARPO]:
    algorithm = config.build_algo()
    try:
        yield algorithm
    finally:
        algorithm.stop()


def learner_weights(algorithm: ARPO) -> dict[str, np.ndarray]:
    """A copy: arrays of a local learner may be views of its parameters."""
    state = algorithm.learner_group.get_state()
    module = state[COMPONENT_LEARNER][COMPONENT_RL_MODULE][DEFAULT_MODULE_ID]
    return {name: np.array(array) for name, array in module.items()}


def engine_weights(env_runner: Any) -> dict[str, np.ndarray]:
    """What the runner's engine generates with."""
    return {
        name: parameter.detach().float().cpu().numpy().copy()
        for name, parameter in env_runner.engine._runner.model.named_parameters()
    }


def optimizer_state(algorithm: ARPO) -> Any:
    return algorithm.learner_group.get_state()[COMPONENT_LEARNER]["optimizer"]


def learned(result: Mapping[str, Any]) -> dict[str, Any]:
    return result["learners"][DEFAULT_MODULE_ID]


def same(left: Any, right: Any) -> bool:
    """Whether two nested states are equal to the bit."""
    if isinstance(left, Mapping):
        return left.keys() == right.keys() and all(
            same(left[name], right[name]) for name in left
        )
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    if hasattr(left, "tobytes") and hasattr(right, "tobytes"):
        return left.tobytes() == right.tobytes()
    if hasattr(left, "numpy"):
        return left.numpy().tobytes() == right.numpy().tobytes()
    return left == right


def token_ids(trees: Sequence[RolloutTree]) -> list[list[list[int]]]:
    return [[s.token_ids.tolist() for s in tree.segments] for tree in trees]
