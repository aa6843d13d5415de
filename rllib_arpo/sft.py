"""`SFT`: the cold start, on the same RLModule, Learners and checkpoints as ARPO.

Traces are trees with one leaf. Only what the model is to write carries loss; tool
results never do. EnvRunners serve evaluation alone, so a cold start is measured with
the very rollouts that reinforcement learning starts from.
"""

from collections.abc import Callable, Sequence
from typing import Any, Self

from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig, NotProvided
from ray.rllib.utils.annotations import override
from ray.rllib.utils.metrics import LEARNER_UPDATE_TIMER

from rllib_arpo.arpo import ARPO
from rllib_arpo.config import ARPOConfig
from rllib_arpo.data.cursor import TaskCursor
from rllib_arpo.errors import DataError
from rllib_arpo.tree import RolloutTree

TraceSource = Callable[[], Sequence[RolloutTree]] | Sequence[RolloutTree]


class SFTConfig(ARPOConfig):
    """Settings of `SFT`; the paper's for its cold start: lr 7e-6, batch 128."""

    def __init__(self, algo_class: type | None = None) -> None:
        super().__init__(algo_class=algo_class or SFT)
        self.train_traces: TraceSource | None = None
        self.lr = 7e-6
        self.train_batch_size_per_learner = 128
        self.minibatch_size = 128
        self.dual_clip = None

    @override(ARPOConfig)
    def environment(
        self, env: Any = NotProvided, *, train_traces: Any = NotProvided, **kwargs: Any
    ) -> Self:
        """As `ARPOConfig.environment`, and what to imitate.

        Args:
            env: the environment, for evaluation.
            train_traces: `RolloutTree`s with one leaf each, or a picklable function
                that returns them (called in the driver).
            **kwargs: see `ARPOConfig.environment`.
        """
        super().environment(env, **kwargs)
        return self._set(train_traces=train_traces)

    @override(ARPOConfig)
    def build_learner_connector(
        self,
        input_observation_space: Any,
        input_action_space: Any,
        device: Any = None,
    ) -> Any:
        from rllib_arpo.learner.connectors import build_learner_pipeline

        return build_learner_pipeline(
            self, input_observation_space, input_action_space, with_advantages=False
        )

    @override(AlgorithmConfig)
    def get_default_learner_class(self) -> type:
        from rllib_arpo.learner.sft_learner import SFTTorchLearner

        return SFTTorchLearner


class SFT(ARPO):
    """Teaches a language model to write like given traces."""

    config: SFTConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    @classmethod
    @override(Algorithm)
    def get_default_config(cls) -> SFTConfig:
        return SFTConfig()

    @override(ARPO)
    def _make_cursor(self, config: ARPOConfig) -> TaskCursor | None:
        assert isinstance(config, SFTConfig)
        traces = config.train_traces
        if traces is None:
            return None
        traces = traces() if callable(traces) else traces
        if not traces:
            raise DataError("`train_traces` holds no trace.")
        return TaskCursor(traces, seed=config.seed or 0)

    @override(ARPO)
    def training_step(self) -> None:
        """Update on the next traces; the runners get weights when they evaluate."""
        if self._cursor is None:
            raise DataError(
                "There is nothing to imitate: set `.environment(train_traces=...)` to "
                "a list of trees or a function that returns one."
            )
        with self._timed(LEARNER_UPDATE_TIMER):
            # The cursor is over traces here.
            batch: list[Any] = self._cursor.next(self.config.total_train_batch_size)
            self._update(batch)

    @override(Algorithm)
    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        self.sync_weights()
        return super().evaluate(*args, **kwargs)
