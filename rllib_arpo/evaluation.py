"""Evaluation of a policy on given tasks, apart from RLlib's `evaluate()`.

`Algorithm.evaluate()` measures one setting with the config's tasks; this measures
any setting on any tasks, and returns the trees as well as the numbers.

`answer_tasks` is for benchmarks: one tree per answer, whose seed depends on the task,
the seed and the number of the answer alone. So an answer does not depend on which
others were asked for, nor on where a killed run was resumed.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ray.rllib.utils.metrics import ENV_RUNNER_RESULTS, EVALUATION_RESULTS

from rllib_arpo.arpo import ARPO
from rllib_arpo.engines.engine import SamplingParams
from rllib_arpo.metrics import refuse_outage, tree_metrics
from rllib_arpo.predictions import Prediction, Wanted, prediction_of
from rllib_arpo.rollouts.branching import TreeSettings, derive_seed, never
from rllib_arpo.tree import RolloutTree, Task

# Enough to keep every EnvRunner busy, few enough for a progress bar to move.
TASKS_AT_ONCE = 256
RESULTS_KEY = (EVALUATION_RESULTS, ENV_RUNNER_RESULTS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What an evaluation gave.

    Attributes:
        metrics: see `tree_metrics`.
        trees: one per task, with `num_samples` independent leaves.
    """

    metrics: Mapping[str, float]
    trees: Sequence[RolloutTree]


def evaluate(
    algorithm: ARPO,
    tasks: Sequence[Task],
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    num_samples: int = 1,
    seed: int = 0,
    on_progress: Callable[[int], None] = lambda more: None,
) -> Evaluation:
    """Answer every task `num_samples` times, independently.

    Args:
        algorithm: whose EnvRunners generate, with the learners' current weights.
        tasks: at least one.
        temperature: 0 is greedy.
        top_p: nucleus; 1 keeps all tokens.
        num_samples: leaves per task.
        seed: same seed, weights and settings, same answers.
        on_progress: called with how many more tasks are done.

    Raises:
        EngineError: no EnvRunner is left.
        RewardError: the reward function failed.
        ToolOutageError: too large a share of the tool calls failed.
    """
    algorithm.sync_weights()
    trees: list[RolloutTree] = []
    for first in range(0, len(tasks), TASKS_AT_ONCE):
        part = tasks[first : first + TASKS_AT_ONCE]
        trees += algorithm.sample_trees(
            part,
            [derive_seed(seed, "evaluate", first + i) for i in range(len(part))],
            tree_settings=_independent(num_samples),
            sampling=SamplingParams(temperature=temperature, top_p=top_p),
            results_key=RESULTS_KEY,
        )
        on_progress(len(part))
    algorithm.log_trees(trees, RESULTS_KEY)
    k = algorithm.config.entropy_probe_tokens
    return Evaluation(metrics=tree_metrics(trees, entropy_probe_tokens=k), trees=trees)


def answer_tasks(
    algorithm: ARPO,
    wanted: Sequence[Wanted],
    *,
    sampling: SamplingParams,
    at_once: int = TASKS_AT_ONCE,
) -> Iterator[list[Prediction]]:
    """Give answers, some at a time, in the order in which they are wanted.

    Args:
        algorithm: whose EnvRunners generate, with the learners' current weights.
        wanted: all different.
        sampling: how to sample.
        at_once: answers under way at a time, over all EnvRunners.

    Yields:
        The next `at_once` answers.

    Raises:
        EngineError: no EnvRunner is left.
        RewardError: the reward function failed.
        ToolOutageError: too large a share of the tool calls failed; these answers
            are not given, for they say nothing about the model.
    """
    algorithm.sync_weights()
    config = algorithm.config
    limit = _max_tool_calls(algorithm)
    for first in range(0, len(wanted), at_once):
        part = wanted[first : first + at_once]
        trees = algorithm.sample_trees(
            [one.task for one in part],
            [
                derive_seed(one.seed, "benchmark", one.task.task_id, one.sample)
                for one in part
            ],
            tree_settings=_independent(1),
            sampling=sampling,
            results_key=RESULTS_KEY,
        )
        k = config.entropy_probe_tokens
        metrics = tree_metrics(trees, entropy_probe_tokens=k)
        refuse_outage(metrics, config.max_tool_failure_share)
        yield [
            prediction_of(tree, seed=one.seed, sample=one.sample, max_tool_calls=limit)
            for tree, one in zip(trees, part, strict=True)
        ]


def _independent(num_leaves: int) -> TreeSettings:
    return TreeSettings(
        group_size=num_leaves, num_initial_rollouts=num_leaves, branch_rule=never
    )


def _max_tool_calls(algorithm: ARPO) -> int | None:
    """The environment's limit, None where it has none."""
    group = algorithm.env_runner_group
    if group.num_remote_env_runners() == 0:
        return _limit_of(group.local_env_runner)
    limits = group.foreach_env_runner(_limit_of, local_env_runner=False)
    return next((limit for limit in limits if limit is not None), None)


def _limit_of(env_runner: Any) -> int | None:
    return getattr(env_runner.env, "max_tool_calls", None)
