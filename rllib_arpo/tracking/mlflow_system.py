"""The machine's load, sampled while a run is tracked, under MLflow's names."""

import logging
import threading
from typing import Any

from rllib_arpo.tracking.mlflow_buffer import Buffer

logger = logging.getLogger(__name__)

INTERVAL_S = 10.0


class SystemMetrics:
    """Logs the machine's load in a thread, as MLflow names it.

    Args:
        buffer: of the run.
        interval_s: between two samples.
    """

    def __init__(self, buffer: Buffer, interval_s: float = INTERVAL_S) -> None:
        self._buffer = buffer
        self._interval_s = interval_s
        self._stopped = threading.Event()
        threading.Thread(target=self._run, daemon=True).start()

    def stop(self) -> None:
        """Take no more samples."""
        self._stopped.set()

    def _run(self) -> None:
        try:
            monitors = _monitors()
            step = 0
            while not self._stopped.is_set():
                for monitor in monitors:
                    monitor.collect_metrics()
                    values = monitor.aggregate_metrics()
                    monitor.clear_metrics()
                    self._buffer.metrics(
                        {f"system/{name}": value for name, value in values.items()},
                        step=step,
                    )
                step += 1
                self._stopped.wait(self._interval_s)
        except Exception as error:  # boundary: a sensor fails, or the buffer is closed
            logger.debug("the machine's load is not tracked any more: %s", error)


def _monitors() -> list[Any]:
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    monitors: list[Any] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    try:
        monitors.append(GPUMonitor())
    except Exception as error:  # boundary: without a GPU or its library
        logger.debug("no GPU to monitor: %s", error)
    return monitors
