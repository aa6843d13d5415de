"""Evaluation of a policy on given tasks, apart from RLlib's `evaluate()`.

`Algorithm.evaluate()` measures one setting with the config's tasks; this measures
any setting on any tasks, and returns the trees as well as the numbers.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ray.rllib.utils.metrics import ENV_RUNNER_RESULTS, EVALUATION_RESULTS

from rllib_arpo.arpo import ARPO
from rllib_arpo.engines.engine import SamplingParams
from rllib_arpo.metrics import tree_metrics
from rllib_arpo.rollouts.branching import TreeSettings, derive_seed, never
from rllib_arpo.tree import RolloutTree, Task

# Enough to keep every EnvRunner busy, few enough for a progress bar to move.
TASKS_AT_ONCE = 256


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
    num_samples: int = 1,
    seed: int = 0,
    on_progress: Callable[[int], None] = lambda more: None,
) -> Evaluation:
    """Answer every task `num_samples` times, independently.

    Args:
        algorithm: whose EnvRunners generate, with the learners' current weights.
        tasks: at least one.
        temperature: 0 is greedy.
        num_samples: leaves per task.
        seed: same seed, weights and settings, same answers.
        on_progress: called with how many more tasks are done.

    Raises:
        EngineError: no EnvRunner is left.
        RewardError: the reward function failed.
        ToolOutageError: too large a share of the tool calls failed.
    """
    algorithm.sync_weights()
    key = (EVALUATION_RESULTS, ENV_RUNNER_RESULTS)
    settings = TreeSettings(
        group_size=num_samples, num_initial_rollouts=num_samples, branch_rule=never
    )
    trees: list[RolloutTree] = []
    for first in range(0, len(tasks), TASKS_AT_ONCE):
        part = tasks[first : first + TASKS_AT_ONCE]
        trees += algorithm.sample_trees(
            part,
            [derive_seed(seed, "evaluate", first + i) for i in range(len(part))],
            tree_settings=settings,
            sampling=SamplingParams(temperature=temperature),
            results_key=key,
        )
        on_progress(len(part))
    algorithm.log_trees(trees, key)
    k = algorithm.config.entropy_probe_tokens
    return Evaluation(metrics=tree_metrics(trees, entropy_probe_tokens=k), trees=trees)
