"""What tracking in MLflow costs a training iteration, counted in tracked trainings.

The quick start's reinforcement learning, tracked as `--mlflow` does it: metrics, the
machine's load and a traced tree per iteration, to a real `mlflow server` with sqlite on
loopback. Per iteration:

    callback       wall time of the main thread in `MLflowCallback`: training waits
    threads        CPU time of all Python threads that began with tracking: they send
                   and sample beside training, and what waits for them or for an
                   interpreter that they hold is at most this
    overhead       callback + threads, of the iteration's wall time: an upper bound,
                   which is reached where no core is free

Counted is what the iterations after the first one log, until the server has all of it.
Not counted are what tracking costs once, before the second iteration (`start_s` of the
main thread, `start_cpu_s` of the threads, which import MLflow), the end of the run, and
the server, which is on a machine of its own in use (`server_cpu_percent` of a core).
Tracked and plain trainings are not compared: two plain ones differ by more than what
is looked for.
"""

import argparse
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

# Read by libraries when they are imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import httpx2
import psutil
import ray
import torch
from async_training import cold_start
from report import print_table_and_write
from transformers.utils import logging as transformers_logging

from rllib_arpo.quickstart import Settings, arpo_config
from rllib_arpo.serving.front import free_ports
from rllib_arpo.tracking.attach import track
from rllib_arpo.tracking.mlflow import MLflowCallback

LIMIT_S = 120.0
CONNECTION_RETRIES = 12


class TimedCallback(MLflowCallback):
    """Counts what it costs to be called, and what the threads cost that it starts."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.seconds = 0.0
        self._others = set(threading.enumerate())

    def on_train_result(self, **call: Any) -> None:
        if self.buffer is None:
            self._others = set(threading.enumerate())
        start = time.perf_counter()
        super().on_train_result(**call)
        self.seconds += time.perf_counter() - start

    def cpu(self) -> dict[threading.Thread, float]:
        """CPU seconds of each of its threads so far."""
        return {
            thread: time.clock_gettime(time.pthread_getcpuclockid(thread.ident))
            for thread in set(threading.enumerate()) - self._others
            if thread.ident is not None
        }

    def flush(self) -> None:
        assert self.buffer is not None
        if not self.buffer.flush(LIMIT_S):
            raise TimeoutError(f"the MLflow server did not answer in {LIMIT_S:.0f} s")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Of one training; seconds are those of all iterations after the first.

    Attributes:
        wall: of the iterations.
        callback: of the main thread.
        threads: CPU by the names of the threads.
        server: CPU of the server.
        start: of the main thread in the first iteration's callback.
        start_cpu: of the threads until all of the first iteration is sent.
    """

    wall: float
    callback: float
    threads: Mapping[str, float]
    server: float
    start: float
    start_cpu: float

    @property
    def overhead_percent(self) -> float:
        return 100 * (self.callback + sum(self.threads.values())) / self.wall


@contextmanager
def mlflow_server(folder: Path) -> Iterator[tuple[str, psutil.Process]]:
    """The URI of a server that ends with the block, and its process."""
    (port,) = free_ports(1)
    words = [
        *(sys.executable, "-m", "mlflow", "server", "--workers", "1"),
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}"),
        *("--artifacts-destination", str(folder / "artifacts")),
    ]
    uri = f"http://127.0.0.1:{port}"
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen(
            words,
            cwd=folder,
            stdout=log,
            stderr=log,
            env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        )
    try:
        transport = httpx2.HTTPTransport(retries=CONNECTION_RETRIES)
        with httpx2.Client(transport=transport, timeout=LIMIT_S) as client:
            client.get(f"{uri}/health").raise_for_status()
        yield uri, psutil.Process(server.pid)
    finally:
        server.terminate()
        server.wait()


def cpu_of(server: psutil.Process) -> float:
    """CPU seconds so far, with those of its workers."""
    times = [one.cpu_times() for one in (server, *server.children(recursive=True))]
    return sum(one.user + one.system for one in times)


def measure(
    model: str, folder: Path, iterations: int, uri: str, server: psutil.Process
) -> Cost:
    """Train, tracked."""
    config = arpo_config(model, Settings(folder=folder))
    track(config, folder, uri)
    *others, tracking = config.callbacks_class
    config.callbacks([*others, partial(TimedCallback, **tracking.keywords)])
    algorithm = config.build_algo()
    (callback,) = (one for one in algorithm.callbacks if isinstance(one, TimedCallback))
    try:
        algorithm.train()
        callback.flush()
        start, start_cpu = callback.seconds, callback.cpu()
        served, began = cpu_of(server), time.perf_counter()
        for _ in range(iterations):
            algorithm.train()
        wall = time.perf_counter() - began
        callback.flush()
        threads: dict[str, float] = {}
        for thread, cpu in callback.cpu().items():
            cpu -= start_cpu.get(thread, 0.0)
            threads[thread.name] = threads.get(thread.name, 0.0) + cpu
        return Cost(
            wall=wall,
            callback=callback.seconds - start,
            threads=threads,
            server=cpu_of(server) - served,
            start=start,
            start_cpu=sum(start_cpu.values()),
        )
    finally:
        algorithm.stop()
        callback.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=40, help="per round")
    args = parser.parse_args()
    transformers_logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    costs: list[Cost] = []
    with (
        tempfile.TemporaryDirectory() as scratch,
        mlflow_server(Path(scratch)) as (uri, server),
    ):
        model = cold_start(Path(scratch), 2)
        for number in range(args.rounds):
            folder = Path(scratch) / f"round_{number}"
            costs.append(measure(model, folder, args.iterations, uri, server))
            print(f"round {number + 1} of {args.rounds} is over", flush=True)
    ray.shutdown()
    rows = [
        {
            "round": number,
            "iteration s": cost.wall / args.iterations,
            "callback ms": 1000 * cost.callback / args.iterations,
            **{
                f"{name} ms": 1000 * cpu / args.iterations
                for name, cpu in sorted(cost.threads.items())
            },
            "overhead %": cost.overhead_percent,
        }
        for number, cost in enumerate(costs, start=1)
    ]
    overheads = [cost.overhead_percent for cost in costs]
    figures = {
        "overhead_percent": fmean(overheads),
        "overhead_percent_least": min(overheads),
        "overhead_percent_most": max(overheads),
        "callback_percent": fmean(100 * cost.callback / cost.wall for cost in costs),
        "server_cpu_percent": fmean(100 * cost.server / cost.wall for cost in costs),
        "iteration_s": fmean(cost.wall / args.iterations for cost in costs),
        "start_s": costs[0].start,
        "start_cpu_s": costs[0].start_cpu,
    }
    print_table_and_write(rows, figures, args.json)


if __name__ == "__main__":
    main()
