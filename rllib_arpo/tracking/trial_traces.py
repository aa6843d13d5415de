"""Trees of a sweep's trials on their way to MLflow, in the results that Tune gets.

    trial: TrialTraces ──result──> the Tuner's process: TuneMLflowCallback ──> MLflow

Trials need no MLflow, and their machines need not reach its server.
"""

from collections.abc import Mapping
from functools import partial
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

    def __init__(self, *args: Any, num_traced_trees: int = 1, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
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
        super().on_train_result(
            algorithm=algorithm, metrics_logger=metrics_logger, result=result, **kwargs
        )
        trees = getattr(algorithm, "saved_trees", ())[: self._num_traced_trees]
        if trees:
            record = record_of(result, stage=type(algorithm).__name__)
            result[TRACES] = iteration_traces(trees, record)


def with_traces(space: Mapping[str, Any]) -> dict[str, Any]:
    """A search space whose trials send traces, if they are RLlib algorithms.

    The callback is a part of the one that is there: Tune finds the classes of a
    restored sweep again by their place in its space, tracked or not.
    """
    given = space.get("callbacks")
    if isinstance(given, list) and given:
        return {**space, "callbacks": [_traced(given[0]), *given[1:]]}
    return {**space, "callbacks": _traced(given)} if given else dict(space)


def _traced(given: Any) -> Any:
    """A callback that is also `TrialTraces`; as it was if it is no class."""
    if isinstance(given, partial):
        return partial(_traced(given.func), *given.args, **given.keywords)
    if not isinstance(given, type) or issubclass(given, TrialTraces):
        return given
    return type(f"Traced{given.__name__}", (TrialTraces, given), {})
