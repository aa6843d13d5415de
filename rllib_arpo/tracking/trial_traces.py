"""Trees of a sweep's trials on their way to MLflow, in the results that Tune gets.

    trial: TrialTraces ──result──> the Tuner's process: TuneMLflowCallback ──> MLflow

Trials need no MLflow, and their machines need not reach its server.
"""

from collections.abc import Mapping
from typing import Any

from ray.rllib.callbacks.callbacks import RLlibCallback

from rllib_arpo.runs import record_of
from rllib_arpo.tracking.mlflow import iteration_traces

# In a result; `TuneMLflowCallback` takes it out before Tune writes the result.
TRACES = "mlflow_traces"


class TrialTraces(RLlibCallback):
    """Puts traces of an iteration's first trees into its result.

    Args:
        num_traced_trees: per iteration.
    """

    def __init__(self, num_traced_trees: int = 1) -> None:
        super().__init__()
        self._num_traced_trees = num_traced_trees

    def on_train_result(
        self,
        *,
        algorithm: Any,
        metrics_logger: Any = None,
        result: dict[str, Any],
        **kwargs: Any,
    ) -> None:
        """Add the traces of an iteration."""
        trees = getattr(algorithm, "saved_trees", ())[: self._num_traced_trees]
        if trees:
            record = record_of(result, stage=type(algorithm).__name__)
            result[TRACES] = iteration_traces(trees, record)


def with_traces(space: Mapping[str, Any]) -> dict[str, Any]:
    """A search space whose trials send traces, if they are RLlib algorithms."""
    if "callbacks" not in space:
        return dict(space)
    given = space["callbacks"]
    callbacks = given if isinstance(given, list) else [given]
    return {**space, "callbacks": [*callbacks, TrialTraces]}
