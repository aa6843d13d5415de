"""Asynchronous training against synchronous, with tools that are slow now and then.

    synchronous    sample a batch, wait for its slowest tree, update, sync
    asynchronous   the EnvRunner goes on while the learner updates
    sampling       the asynchronous EnvRunner alone: nobody updates
    learning       the learner alone: updates on trees that are there

All in trees per second. One EnvRunner and one Learner, each a process with one
thread; the quick start's model after a short cold start, so that it calls tools; same
tasks, same tree settings. A tool call takes as long as a lognormal distribution says
(median 0.2 s, 99th percentile 3 s), drawn from the task and the call, so every mode
meets the same tools. So that neither stage is idle most of the time, the number of
epochs per batch is chosen at the start: learning a batch takes about as long as
sampling it.

The synchronous mode does not compute the importance weights that the asynchronous
one needs, and that the learning stage alone computes too.
"""

import argparse
import logging
import math
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import NormalDist, median
from typing import Any, Self

# Read by libraries when they are imported, here and in the actors.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import asyncio

import ray
from report import print_table_and_write
from transformers.utils import logging as transformers_logging

from rllib_arpo import ARPO, ARPOConfig, RolloutTree, Task
from rllib_arpo.envs.almanac import AlmanacEnv, AlmanacWorld
from rllib_arpo.envs.almanac_model import build_model, build_tokenizer
from rllib_arpo.quickstart import Settings, almanac_tasks, arpo_config, sft_config
from rllib_arpo.rollouts.branching import derive_uniform
from rllib_arpo.rollouts.tree_stream import TreeStream
from rllib_arpo.tools.tool import Tool

MEDIAN_S, P99_S = 0.2, 3.0
SIGMA = math.log(P99_S / MEDIAN_S) / NormalDist().inv_cdf(0.99)
TREES, LEAVES = 32, 8
MAX_POLICY_LAG = 4
NUM_TASKS = 4_000


class SlowTool:
    """A tool whose calls take as long as it is drawn from the task and the call."""

    def __init__(self, tool: Tool, task: Task, num_calls: int = 0) -> None:
        self.name, self.description = tool.name, tool.description
        self._tool, self._task, self._num_calls = tool, task, num_calls

    async def call(self, arguments: str) -> str:
        """Wait, then call the tool."""
        self._num_calls += 1
        drawn = derive_uniform(
            0, self._task.task_id, self.name, arguments, self._num_calls
        )
        normal = NormalDist().inv_cdf(min(max(drawn, 1e-9), 1 - 1e-9))
        await asyncio.sleep(MEDIAN_S * math.exp(SIGMA * normal))
        return await self._tool.call(arguments)

    def fork(self) -> Self:
        """A copy with a fork of the tool."""
        return type(self)(self._tool.fork(), self._task, self._num_calls)


class SlowAlmanac(AlmanacEnv):
    """The almanac with slow tools."""

    def make_tools(self, task: Task) -> Sequence[Tool]:
        """The almanac's own, slowed."""
        return [SlowTool(tool, task) for tool in super().make_tools(task)]


def cold_start(folder: Path, iterations: int) -> str:
    """The quick start's model, taught for `iterations` times 50 steps."""
    base = str(folder / "base")
    build_model(build_tokenizer(AlmanacWorld(), base), base)
    settings = Settings(folder=folder, sft_iterations=iterations)
    algorithm = sft_config(base, settings).build_algo()
    try:
        for _ in range(iterations):
            algorithm.train()
        return str(algorithm.save_pretrained(folder / "model"))
    finally:
        algorithm.stop()


def config(model: str, *, asynchronous: bool, num_epochs: int) -> ARPOConfig:
    """The same run in both modes."""
    folder = Path(model).parent
    settings = Settings(folder=folder, num_env_runners=1, num_learners=1)
    built = (
        arpo_config(model, settings)
        .environment(
            env=SlowAlmanac,
            train_tasks=partial(almanac_tasks, "train", NUM_TASKS),
        )
        .debugging(deterministic=False)
        .tree_rollout(group_size=LEAVES, num_initial_rollouts=LEAVES // 2)
        .training(
            train_batch_size_per_learner=TREES,
            minibatch_size=TREES,
            num_epochs=num_epochs,
            # So small that both modes go on with the same policy.
            lr=1e-6,
        )
    )
    if asynchronous:
        built.training(
            asynchronous=True,
            max_policy_lag=MAX_POLICY_LAG,
            tis_cap=2.0,
            old_logprobs="recompute",
        )
    return built


@contextmanager
def running(model: str, **settings: Any) -> Iterator[ARPO]:
    """An algorithm; its actors end with the block."""
    algorithm = config(model, **settings).build_algo()
    try:
        yield algorithm
    finally:
        algorithm.stop()


def stream_of(algorithm: ARPO) -> TreeStream:
    """The asynchronous mode's source of trees."""
    stream = algorithm._stream
    assert stream is not None
    return stream


def sample(algorithm: ARPO) -> list[RolloutTree]:
    """The next batch, as if it had been trained on."""
    trees = algorithm._next_batch(stream_of(algorithm))
    stream_of(algorithm).trained(trees)
    return trees


def trees_per_s(step: Any, *, warm_up: int, steps: int) -> float:
    """Of `steps` steps after `warm_up` that are not timed."""
    for _ in range(warm_up):
        step()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    return steps * TREES / (time.perf_counter() - start)


def choose_num_epochs(model: str, steps: int) -> int:
    """Epochs with which learning a batch takes as long as sampling it."""
    with running(model, asynchronous=True, num_epochs=1) as algorithm:
        sampling = trees_per_s(lambda: sample(algorithm), warm_up=2, steps=steps)
        trees = sample(algorithm)
    with running(model, asynchronous=True, num_epochs=8) as algorithm:
        learning = trees_per_s(lambda: algorithm._update(trees), warm_up=1, steps=2)
    return math.ceil(8 * learning / sampling)


def measure(model: str, num_epochs: int, steps: int) -> dict[str, float]:
    """Trees per second of each case, once."""
    speeds = {}
    with running(model, asynchronous=False, num_epochs=num_epochs) as algorithm:
        speeds["synchronous"] = trees_per_s(
            algorithm.train, warm_up=1, steps=max(steps // 2, 2)
        )
    with running(model, asynchronous=True, num_epochs=num_epochs) as algorithm:
        speeds["sampling"] = trees_per_s(
            lambda: sample(algorithm), warm_up=2, steps=steps
        )
        trees = sample(algorithm)
        results = []
        speeds["asynchronous"] = trees_per_s(
            lambda: results.append(algorithm.train()), warm_up=3, steps=steps
        )
        report_lag(results[-steps:])
    with running(model, asynchronous=True, num_epochs=num_epochs) as algorithm:
        speeds["learning"] = trees_per_s(
            lambda: algorithm._update(trees), warm_up=1, steps=max(steps // 2, 2)
        )
    return speeds


def report_lag(results: Sequence[dict[str, Any]]) -> None:
    """How old the trees were, and how many were too old."""
    sampled = [result["env_runners"] for result in results]
    lag = sum(one["policy_lag_mean"] for one in sampled) / len(sampled)
    stale = sum(one["num_trees_stale"] for one in sampled)
    print(
        f"asynchronous: tokens {lag:.1f} updates old on average, {stale:.0f} of "
        f"{len(results) * TREES} trees grown again"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--repetitions", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4, help="batches per figure")
    args = parser.parse_args()
    transformers_logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    with tempfile.TemporaryDirectory() as folder:
        model = cold_start(Path(folder), 2)
        num_epochs = choose_num_epochs(model, args.steps)
        print(f"{TREES} trees a batch, {num_epochs} epochs of each")
        rounds = [
            measure(model, num_epochs, args.steps) for _ in range(args.repetitions)
        ]
    speeds = {name: median(one[name] for one in rounds) for name in rounds[0]}
    rows = [
        {"mode": name, "trees/s": speeds[name], "s a batch": TREES / speeds[name]}
        for name in ("synchronous", "asynchronous", "sampling", "learning")
    ]
    slower = min(speeds["sampling"], speeds["learning"])
    figures = {
        "speedup_vs_sync": speeds["asynchronous"] / speeds["synchronous"],
        "fraction_of_slower_stage": speeds["asynchronous"] / slower,
    }
    print_table_and_write(rows, figures, args.json)
    ray.shutdown()


if __name__ == "__main__":
    main()
