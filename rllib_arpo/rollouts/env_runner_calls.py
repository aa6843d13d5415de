"""Calls to EnvRunners, of which any may be dead."""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayError
from ray.rllib.env.env_runner_group import EnvRunnerGroup
from ray.rllib.utils.metrics.metrics_logger import MetricsLogger

from rllib_arpo.errors import ARPOError, EngineError
from rllib_arpo.metrics import NUM_TREES_REQUEUED
from rllib_arpo.rollouts.tree_queue import Job
from rllib_arpo.tree import RolloutTree


def grow_trees(
    group: EnvRunnerGroup,
    jobs: Sequence[Job],
    *,
    wait: Callable[[], None],
    **kwargs: Any,
) -> tuple[list[RolloutTree], list[dict[str, Any]]]:
    """Grow one tree per job, spread over the EnvRunners.

    Jobs of a runner that dies are given to the others; none is lost or grown twice.

    Args:
        group: the EnvRunners.
        jobs: their seeds are all different.
        wait: called when trees are missing; returns when a runner is healthy, and
            all that are have the current weights.
        **kwargs: of `ARPOEnvRunner.sample`.

    Returns:
        One tree per job in the order of the jobs, and what is to be aggregated into
        the metrics.

    Raises:
        RewardError: a reward function failed.
    """
    todo = dict(jobs)
    grown: dict[int, RolloutTree] = {}
    stats: list[dict[str, Any]] = []
    num_requeued = 0
    while todo:
        answers = call_env_runners(
            group,
            list(todo.items()),
            local=group.num_remote_env_runners() == 0,
            **kwargs,
        )
        for trees, runner_stats in answers:
            grown |= {tree.seed: tree for tree in trees}
            stats.append(runner_stats)
        todo = {seed: task for seed, task in todo.items() if seed not in grown}
        if todo:
            num_requeued += len(todo)
            wait()
    logger = MetricsLogger(root=False)
    logger.log_value(NUM_TREES_REQUEUED, num_requeued, reduce="sum")
    return [grown[seed] for seed, _ in jobs], [*stats, logger.reduce()]


def call_env_runners(
    group: EnvRunnerGroup,
    jobs: Sequence[Job],
    *,
    local: bool,
    **kwargs: Any,
) -> list[tuple[list[RolloutTree], dict[str, Any]]]:
    """Spread jobs over the healthy runners; the dead and outdated do not answer."""
    ids = [] if local else group.healthy_env_runner_ids()
    parts = [jobs[i :: max(len(ids), 1)] for i in range(max(len(ids), 1))]
    calls = [
        {
            "seeds": [seed for seed, _ in part],
            "tasks": [task for _, task in part],
            **kwargs,
        }
        for part in parts
        if part
    ]
    if local:
        runner: Any = group.local_env_runner
        answers = [runner.sample_and_get_metrics(**calls[0])]
    elif ids:
        answers = group.foreach_env_runner(
            "sample_and_get_metrics",
            kwargs=calls,
            remote_worker_ids=ids[: len(calls)],
            local_env_runner=False,
        )
    else:
        answers = []
    for answer in answers:
        if isinstance(answer, ARPOError):
            raise answer
    return [answer for answer in answers if answer is not None]


def wait_for_env_runner(
    group: EnvRunnerGroup, *, restore: Callable[[], Any], timeout_s: float | None
) -> None:
    """Bring back runners; return as soon as one is healthy.

    Args:
        group: the EnvRunners.
        restore: looks for runners that are back, and gives them weights.
        timeout_s: how long to try; None tries for ever.

    Raises:
        EngineError: none came back.
    """
    limit = math.inf if timeout_s is None else timeout_s
    deadline = time.monotonic() + limit
    while True:
        restore()
        if group.num_healthy_remote_env_runners():
            return
        cause = cause_of_death(group)
        if cause is not None:
            raise EngineError(
                f"All EnvRunners are dead and cannot be restarted: {cause}. The "
                "last checkpoint is intact."
            )
        if time.monotonic() > deadline:
            raise EngineError(
                "All EnvRunners are dead and none came back within "
                f"`env_runner_restore_timeout_s` ({limit:g} s). Their logs say "
                "why; the last checkpoint is intact."
            )
        time.sleep(1.0)


def cause_of_death(group: EnvRunnerGroup) -> str | None:
    """Why all EnvRunners are dead for good; None while one may come back.

    Ray restarts an actor whose process died, but not one whose constructor raised.
    """
    cause = None
    for actor in group._worker_manager.actors().values():
        try:
            ray.get(actor.ping.remote(), timeout=1.0)
        except ActorDiedError as error:
            cause = str(error).strip().splitlines()[-1]
        except RayError:
            return None
        else:
            return None
    return cause
