"""What tracking in MLflow costs a training iteration.

    plain      the quick start's reinforcement learning
    tracked    the same with `MLflowCallback` as `--mlflow` sets it: metrics, the
               machine's load and a traced tree per iteration, to a real `mlflow
               server` with sqlite on loopback
    again      `plain` once more: its difference from `plain` is noise

A round runs each case once, in an order that changes, with the same seed: the same
tokens are sampled and learned in all three, so the n-th iteration is the same work in
every case and round. Each iteration's time is the least of the rounds, which leaves out
what else the machine did; a case's is the sum of them. What the first iteration costs
once (importing MLflow, making the run, with the wait for the server) is `start_s`, and
not in the overhead. CPU time is that of the training process, with the threads that
send and sample, without the server's.
"""

import argparse
import logging
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean

# Read by libraries when they are imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import httpx2
import ray
import torch
from async_training import cold_start
from report import print_table_and_write
from transformers.utils import logging as transformers_logging

from rllib_arpo import ARPO
from rllib_arpo.quickstart import Settings, arpo_config
from rllib_arpo.tracking.attach import track
from rllib_arpo.tracking.mlflow import MLflowCallback

PLAIN, TRACKED, AGAIN = "plain", "tracked", "again"
CASES = (PLAIN, TRACKED, AGAIN)
LIMIT_S = 120.0
CONNECTION_RETRIES = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Of one case in one round, in seconds.

    Attributes:
        first: wall time of the first iteration.
        wall: of each iteration after it.
        cpu: likewise, of this process.
    """

    first: float
    wall: tuple[float, ...]
    cpu: tuple[float, ...]


@contextmanager
def mlflow_server(folder: Path) -> Iterator[str]:
    """The URI of a server that ends with the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
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
        yield uri
    finally:
        server.terminate()
        server.wait()


def measure(model: str, folder: Path, iterations: int, uri: str | None) -> Cost:
    """Train, tracked if there is a server."""
    config = arpo_config(model, Settings(folder=folder))
    if uri is not None:
        track(config, folder, uri)
    algorithm = config.build_algo()
    try:
        start = time.perf_counter()
        algorithm.train()
        flush(algorithm)
        first = time.perf_counter() - start
        clock = [(time.perf_counter(), time.process_time())]
        for _ in range(iterations):
            algorithm.train()
            clock.append((time.perf_counter(), time.process_time()))
        wall, cpu = (
            tuple(after - before for before, after in pairwise(times))
            for times in zip(*clock, strict=True)
        )
        return Cost(first=first, wall=wall, cpu=cpu)
    finally:
        algorithm.stop()
        for callback in callbacks(algorithm):
            callback.close()


def callbacks(algorithm: ARPO) -> list[MLflowCallback]:
    """Those that track."""
    found = algorithm.callbacks
    listed = found if isinstance(found, list) else [found]
    return [one for one in listed if isinstance(one, MLflowCallback)]


def flush(algorithm: ARPO) -> None:
    """Wait until the server has everything."""
    for callback in callbacks(algorithm):
        assert callback.buffer is not None
        if not callback.buffer.flush(LIMIT_S):
            raise TimeoutError(f"the MLflow server did not answer in {LIMIT_S:.0f} s")


def seconds(rounds: list[dict[str, Cost]], case: str, kind: str) -> float:
    """Of an iteration: mean of the least times."""
    times = [getattr(one[case], kind) for one in rounds]
    return fmean(map(min, zip(*times, strict=True)))


def overhead(rounds: list[dict[str, Cost]], case: str, kind: str) -> float:
    """Percent by which a case is slower than `plain`."""
    return 100 * (seconds(rounds, case, kind) / seconds(rounds, PLAIN, kind) - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--iterations", type=int, default=10, help="per case and round")
    args = parser.parse_args()
    transformers_logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    rounds: list[dict[str, Cost]] = []
    with (
        tempfile.TemporaryDirectory() as scratch,
        mlflow_server(Path(scratch)) as uri,
    ):
        model = cold_start(Path(scratch), 2)
        for number in range(args.rounds):
            order = CASES[number % len(CASES) :] + CASES[: number % len(CASES)]
            rounds.append(
                {
                    case: measure(
                        model,
                        Path(scratch) / f"{case}_{number}",
                        args.iterations,
                        uri if case == TRACKED else None,
                    )
                    for case in order
                }
            )
            print(f"round {number + 1} of {args.rounds} is over", flush=True)
    ray.shutdown()
    rows = [
        {
            "case": case,
            "s an iteration": seconds(rounds, case, "wall"),
            "CPU s": seconds(rounds, case, "cpu"),
            "overhead %": overhead(rounds, case, "wall"),
            "CPU overhead %": overhead(rounds, case, "cpu"),
        }
        for case in CASES
    ]
    figures = {
        "overhead_percent": overhead(rounds, TRACKED, "wall"),
        "noise_percent": overhead(rounds, AGAIN, "wall"),
        "cpu_overhead_percent": overhead(rounds, TRACKED, "cpu"),
        "cpu_noise_percent": overhead(rounds, AGAIN, "cpu"),
        "start_s": rounds[0][TRACKED].first - rounds[0][PLAIN].first,
    }
    print_table_and_write(rows, figures, args.json)


if __name__ == "__main__":
    main()
