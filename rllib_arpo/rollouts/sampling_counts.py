"""What an EnvRunner counts: trees and turns as RLlib names them, and its engine."""

from collections.abc import Sequence

from ray.rllib.core import DEFAULT_AGENT_ID
from ray.rllib.utils.metrics import (
    NUM_AGENT_STEPS_SAMPLED,
    NUM_AGENT_STEPS_SAMPLED_LIFETIME,
    NUM_ENV_STEPS_SAMPLED,
    NUM_ENV_STEPS_SAMPLED_LIFETIME,
    NUM_EPISODES,
    NUM_EPISODES_LIFETIME,
)
from ray.rllib.utils.metrics.metrics_logger import MetricsLogger

from rllib_arpo.engines.engine import Engine
from rllib_arpo.metrics import (
    ENGINE_LEVELS,
    ENGINE_METRICS,
    ENGINE_SAMPLE_TIME_S,
    PREFIX_CACHE_HIT_RATE,
)
from rllib_arpo.tree import RolloutTree


def log_trees_sampled(metrics: MetricsLogger, trees: Sequence[RolloutTree]) -> None:
    """Count trees as episodes, and their turns as steps."""
    steps = sum(map(len, trees))
    for key, value, reduce in (
        (NUM_ENV_STEPS_SAMPLED, steps, "sum"),
        (NUM_ENV_STEPS_SAMPLED_LIFETIME, steps, "lifetime_sum"),
        (NUM_AGENT_STEPS_SAMPLED, {DEFAULT_AGENT_ID: steps}, "sum"),
        (NUM_AGENT_STEPS_SAMPLED_LIFETIME, {DEFAULT_AGENT_ID: steps}, "lifetime_sum"),
        (NUM_EPISODES, len(trees), "sum"),
        (NUM_EPISODES_LIFETIME, len(trees), "lifetime_sum"),
    ):
        if isinstance(value, dict):
            metrics.log_dict(value, key=key, reduce=reduce)
        else:
            metrics.log_value(
                key,
                value,
                reduce=reduce,
                with_throughput=key == NUM_ENV_STEPS_SAMPLED_LIFETIME,
            )


class EngineMeter:
    """Reads an engine's counters: what it did since the last time."""

    def __init__(self) -> None:
        self._before: dict[str, float] = {}

    def log(self, metrics: MetricsLogger, engine: Engine, sample_time_s: float) -> None:
        """Log it, to be summed over runners, and the levels as they are.

        Args:
            metrics: the runner's.
            engine: the same every time.
            sample_time_s: how long trees were growing.
        """
        counted = engine.metrics()
        done = {
            name: value - self._before.get(name, 0.0)
            for name, value in counted.items()
            if name not in ENGINE_LEVELS
        }
        self._before = counted
        for name in counted:
            key = (ENGINE_METRICS, name)
            if name in ENGINE_LEVELS:
                metrics.log_value(key, counted[name], window=1)
            else:
                metrics.log_value(key, done[name], reduce="sum")
        if prompt := done["num_prompt_tokens"]:
            rate = done["num_cached_prompt_tokens"] / prompt
            key = (ENGINE_METRICS, PREFIX_CACHE_HIT_RATE)
            metrics.log_value(key, rate, window=1)
        key = (ENGINE_METRICS, ENGINE_SAMPLE_TIME_S)
        metrics.log_value(key, sample_time_s, reduce="sum")
