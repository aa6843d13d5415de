"""How many answers became traces, for `/metrics`."""

from collections.abc import Callable, Iterable, Mapping

from prometheus_client.metrics_core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector


class TraceNumbers(Collector):
    """Reads the numbers when it is asked for them.

    Args:
        counts: gives outcome -> number of answers.
    """

    def __init__(self, counts: Callable[[], Mapping[str, int]]) -> None:
        self._counts = counts

    def collect(self) -> Iterable[Metric]:
        """One family with the label `outcome`."""
        family = CounterMetricFamily(
            "rllib_arpo_traces",
            "Answers for MLflow; dropped: too many waited for it to take them.",
            labels=["outcome"],
        )
        for outcome, number in self._counts().items():
            family.add_metric([outcome], number)
        yield family
