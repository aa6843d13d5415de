"""The machine's load, sampled while a run is tracked, under MLflow's names."""

import logging
import threading
from contextlib import suppress
from typing import Any

from rllib_arpo.errors import CheckpointError
from rllib_arpo.storage import write_whole
from rllib_arpo.tracking.mlflow_buffer import Buffer

logger = logging.getLogger(__name__)

INTERVAL_S = 10.0
STOP_S = 5.0
STEP_FILE = "system_step"


class SystemMetrics:
    """Logs the machine's load in a thread, as MLflow names it.

    The steps count samples and go on where those of the same buffer's folder ended.

    Args:
        buffer: of the run.
        interval_s: between two samples.
    """

    def __init__(self, buffer: Buffer, interval_s: float = INTERVAL_S) -> None:
        self._buffer = buffer
        self._interval_s = interval_s
        self._file = buffer.folder / STEP_FILE
        self._stopped = threading.Event()
        self._thread = threading.Thread(
            target=self._run, name="rllib_arpo-system", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """Take no more samples."""
        self._stopped.set()
        self._thread.join(STOP_S)  # a sensor may hang

    def _run(self) -> None:
        try:
            monitors = _monitors()
            step = self._next_step()
            while True:
                # Before the sample: a kill in between skips a step, and repeats none.
                with suppress(CheckpointError):  # a full disk
                    write_whole(self._file, str(step + 1))
                self._sample(monitors, step)
                step += 1
                if self._stopped.wait(self._interval_s):
                    break
        except Exception as error:  # boundary: a sensor fails
            logger.debug("the machine's load is not tracked any more: %s", error)

    def _next_step(self) -> int:
        with suppress(FileNotFoundError):
            return int(self._file.read_text())
        return 0

    def _sample(self, monitors: list[Any], step: int) -> None:
        values: dict[str, float] = {}
        for monitor in monitors:
            monitor.collect_metrics()
            values |= monitor.aggregate_metrics()
            monitor.clear_metrics()
        self._buffer.metrics(
            {f"system/{name}": value for name, value in values.items()}, step=step
        )


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
