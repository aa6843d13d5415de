"""Calls to EnvRunners, of which any may be dead."""

from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayError
from ray.rllib.env.env_runner_group import EnvRunnerGroup

from rllib_arpo.errors import ARPOError
from rllib_arpo.tree import RolloutTree, Task


def call_env_runners(
    group: EnvRunnerGroup,
    jobs: Sequence[tuple[int, Task]],
    *,
    local: bool,
    **kwargs: Any,
) -> list[tuple[list[RolloutTree], dict[str, Any]]]:
    """Spread (seed, task) pairs over the healthy runners; the dead do not answer."""
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
    return answers


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
