"""The driver's side of asynchronous training: jobs out, batches of trees in.

    tasks ─► waiting ─► an EnvRunner's queue ─► ready ─► a batch ─► trained
                ▲              │ it died            │ too old
                └──────────────┴────────────────────┘

1. A job is kept until its tree has been trained on, so that none is lost, whatever
   happens to runners, to this process, or in between; one tree per job counts.
2. At most (max_policy_lag + 1) batches of jobs are kept at a time (the gate of AReaL,
   arXiv:2505.24298, section 5.1). So a tree is older than the lag only if others that
   began after it overtook it; it is then grown again.
3. Runners are called directly: RLlib drops a request without a word when too many are
   under way. A runner that was restarted does not know the stream's name.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import methodcaller
from typing import Any

import numpy as np
import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError
from ray.rllib.env.env_runner_group import EnvRunnerGroup
from ray.rllib.utils.metrics.metrics_logger import MetricsLogger

from rllib_arpo.errors import WeightSyncError
from rllib_arpo.metrics import (
    NUM_JOBS_GROWING,
    NUM_JOBS_WAITING,
    NUM_TREES_REQUEUED,
    NUM_TREES_STALE,
    POLICY_LAG_MAX,
    POLICY_LAG_MEAN,
)
from rllib_arpo.rollouts.sampling_counts import log_trees_sampled
from rllib_arpo.rollouts.tree_queue import Harvest, Job
from rllib_arpo.tree import RolloutTree, Task

# A runner that waits for a tree takes no weights meanwhile.
POLL_S = 0.2
# How often dead runners are looked after while others deliver.
RESTORE_INTERVAL_S = 1.0


@dataclass(slots=True, eq=False)
class _Runner:
    """An EnvRunner that takes part.

    Attributes:
        actor: its handle.
        stream: as the runner calls this stream.
        jobs: seed -> task, handed to it and not finished.
        poll: the question under way.
        calls: answered before the next poll is; they say nothing if all goes well.
        num_waiting, num_growing: of its jobs, when last asked.
    """

    actor: ActorHandle
    stream: str
    jobs: dict[int, Task] = field(default_factory=dict)
    poll: ray.ObjectRef | None = None
    calls: list[ray.ObjectRef] = field(default_factory=list)
    num_waiting: int = 0
    num_growing: int = 0


class TreeStream:
    """Trees of a stream of jobs, grown while the driver does other things.

    Args:
        group: the EnvRunners, all of them remote.
        next_jobs: gives as many new jobs as it is asked for.
        restore: looks for runners that are back, and gives them weights.
        wait: returns when a runner is healthy, or raises EngineError.
        batch_size: trees of a batch.
        max_policy_lag: see `ARPOConfig.training`.
    """

    def __init__(
        self,
        group: EnvRunnerGroup,
        *,
        next_jobs: Callable[[int], Sequence[Job]],
        restore: Callable[[], Any],
        wait: Callable[[], None],
        batch_size: int,
        max_policy_lag: int,
    ) -> None:
        self._group, self._manager = group, group._worker_manager
        self._next_jobs, self._restore, self._wait = next_jobs, restore, wait
        self._batch_size, self._max_policy_lag = batch_size, max_policy_lag
        # All jobs that are not trained on yet, in the order in which they came.
        self._jobs: dict[int, Task] = {}
        self._waiting: deque[int] = deque()
        self._ready: dict[int, RolloutTree] = {}
        self._runners: dict[int, _Runner] = {}
        self._pings: dict[int, ray.ObjectRef] = {}
        self._pushes: list[ray.ObjectRef] = []
        self._restored_at = -RESTORE_INTERVAL_S
        self._stats: list[dict[str, Any]] = []
        self._counts: Counter[str] = Counter()

    def batch(self, version: int) -> list[RolloutTree]:
        """The next trees to train on, of at most the lag, in the order of their jobs.

        They count as trained when `trained` says so; until then the next call gives
        them again.

        Args:
            version: of the learner's weights.

        Raises:
            EngineError: no runner came back in `env_runner_restore_timeout_s`, or one
                does not run the learner's weights.
            RewardError: a reward function failed.
        """
        room = (self._max_policy_lag + 1) * self._batch_size - len(self._jobs)
        for seed, task in self._next_jobs(room) if room > 0 else ():
            self._jobs[seed] = task
            self._waiting.append(seed)
        self._collect(wait_s=0)  # what has grown during the update
        while True:
            self._join_runners()
            self._hand_out()
            self._drop_stale(version)
            if len(self._ready) >= self._batch_size:
                break
            self._collect(wait_s=RESTORE_INTERVAL_S)
        place = {seed: number for number, seed in enumerate(self._jobs)}
        chosen = sorted([*self._ready][: self._batch_size], key=place.__getitem__)
        return [self._ready[seed] for seed in chosen]

    def trained(self, trees: Sequence[RolloutTree]) -> None:
        """Forget the jobs of trees that an update was made with."""
        for tree in trees:
            del self._ready[tree.seed], self._jobs[tree.seed]

    def push_weights(self, state: Mapping[str, Any]) -> None:
        """Send weights to all runners; each takes them when its engine's step is done.

        Waits for what was sent the last time, not for these.

        Raises:
            WeightSyncError: the last weights did not arrive.
        """
        self._check_pushes(wait=True)
        call = methodcaller("take_weights", state=dict(state))
        actors = self._manager.actors()
        self._pushes = [
            actors[number].apply.remote(call)
            for number in self._group.healthy_env_runner_ids()
        ]

    def stats(self, trees: Sequence[RolloutTree], version: int) -> list[dict[str, Any]]:
        """What is to be aggregated into the metrics since the last call.

        Args:
            trees: what is trained on; they count as this iteration's.
            version: of the learner's weights.
        """
        lags = np.concatenate([version - model_versions(tree) for tree in trees])
        runners = self._runners.values()
        logger = MetricsLogger(root=False)
        log_trees_sampled(logger, trees)
        for name in (NUM_TREES_REQUEUED, NUM_TREES_STALE):
            logger.log_value(name, self._counts[name], reduce="sum")
        for name, value in (
            (POLICY_LAG_MEAN, float(lags.mean()) if len(lags) else 0.0),
            (POLICY_LAG_MAX, float(lags.max(initial=0))),
            (NUM_JOBS_WAITING, sum(runner.num_waiting for runner in runners)),
            (NUM_JOBS_GROWING, sum(runner.num_growing for runner in runners)),
        ):
            logger.log_value(name, value, window=1)
        stats, self._stats = [*self._stats, logger.reduce()], []
        self._counts.clear()
        return stats

    def get_state(self) -> list[Job]:
        """All jobs that are not trained on."""
        return list(self._jobs.items())

    def set_state(self, jobs: Sequence[Job]) -> None:
        """Forget all jobs and trees, and begin with these jobs."""
        self._jobs = dict(jobs)
        self._waiting = deque(self._jobs)
        self._ready, self._runners, self._stats = {}, {}, []
        self._counts.clear()

    def _join_runners(self) -> None:
        """Let all healthy runners take part; bring back the others."""
        healthy = set(self._group.healthy_env_runner_ids())
        for number in self._runners.keys() - healthy:
            self._lose(number)
        if len(healthy) < self._group.num_remote_env_runners():
            if not healthy:
                self._wait()
            elif time.monotonic() > self._restored_at + RESTORE_INTERVAL_S:
                self._restored_at = time.monotonic()
                self._restore_those_that_answer(healthy)
            healthy = set(self._group.healthy_env_runner_ids())
        actors = self._manager.actors()
        new = {
            number: actors[number].apply.remote(methodcaller("open_stream"))
            for number in sorted(healthy - self._runners.keys())
        }
        for number, answer in new.items():
            try:
                stream: Any = ray.get(answer)
            except RayError:
                self._manager.set_actor_state(number, healthy=False)
            else:
                self._runners[number] = _Runner(actors[number], stream)

    def _restore_those_that_answer(self, healthy: set[int]) -> None:
        """`restore` waits for the dead, so it is called when one lives."""
        for number, actor in self._manager.actors().items():
            if number in healthy:
                continue
            if number not in self._pings:
                self._pings[number] = actor.ping.remote()
            ping = self._pings[number]
            if not ray.wait([ping], timeout=0)[0]:
                continue
            del self._pings[number]
            try:
                ray.get(ping)
            except RayError:
                continue
            self._restore()
            return

    def _hand_out(self) -> None:
        """Give waiting jobs to the runners that have the fewest."""
        new: dict[int, list[Job]] = {}
        while self._waiting and self._runners:
            seed = self._waiting[0]
            number = min(self._runners, key=lambda n: (len(self._runners[n].jobs), n))
            self._runners[number].jobs[seed] = self._jobs[seed]
            new.setdefault(number, []).append((seed, self._jobs[seed]))
            self._waiting.popleft()
        for number, jobs in new.items():
            runner = self._runners[number]
            call = methodcaller("start_trees", jobs, stream=runner.stream)
            runner.calls.append(runner.actor.apply.remote(call))

    def _collect(self, *, wait_s: float) -> None:
        """Wait for a runner's answer, and take in what has grown."""
        self._check_pushes(wait=False)
        for runner in self._runners.values():
            if runner.poll is None:
                call = methodcaller(
                    "finished_trees", stream=runner.stream, wait_s=POLL_S
                )
                runner.poll = runner.actor.apply.remote(call)
        polls = {runner.poll: n for n, runner in self._runners.items()}
        if not polls:
            return
        done, _ = ray.wait([*polls], timeout=wait_s)
        for poll in done:
            number = polls[poll]
            try:
                harvest = ray.get(poll)
            except RayError:
                harvest = None
            if harvest is None:
                self._manager.set_actor_state(number, healthy=False)
                self._lose(number)
            else:
                self._take(self._runners[number], harvest)

    def _take(self, runner: _Runner, harvest: Harvest) -> None:
        runner.num_waiting = harvest.num_waiting
        runner.num_growing = harvest.num_growing
        if harvest.stats is not None:
            self._stats.append(harvest.stats)
        for tree in harvest.trees:
            self._ready[tree.seed] = tree
            runner.jobs.pop(tree.seed, None)
        for seed in harvest.errors:
            self._waiting.appendleft(seed)
            del runner.jobs[seed]
        runner.calls.clear()
        # Last: an interrupt before it asks for the same answer again.
        runner.poll = None
        for error in harvest.errors.values():
            raise error

    def _lose(self, number: int) -> None:
        """Take a runner's jobs back: it is dead, or another process by now."""
        runner = self._runners.pop(number)
        self._counts[NUM_TREES_REQUEUED] += len(runner.jobs)
        self._waiting.extendleft(reversed(runner.jobs))

    def _drop_stale(self, version: int) -> None:
        """Have trees that are older than the lag grown again."""
        stale = [
            seed
            for seed, tree in self._ready.items()
            if age(tree, version) > self._max_policy_lag
        ]
        for seed in stale:
            del self._ready[seed]
        self._waiting.extendleft(reversed(stale))
        self._counts[NUM_TREES_STALE] += len(stale)

    def _check_pushes(self, *, wait: bool) -> None:
        done, self._pushes = ray.wait(
            self._pushes,
            num_returns=max(len(self._pushes), 1),
            timeout=None if wait else 0,
        )
        for push in done:
            try:
                error: WeightSyncError | None = ray.get(push)
            except RayError:
                continue  # the runner is dead, and gets weights when it is back
            if error is not None:
                # The other runners got the same weights: the caller is told once.
                self._pushes = []
                raise error


def age(tree: RolloutTree, version: int) -> int:
    """Updates between the tree's oldest token and `version`; 0 if it has no token."""
    return version - int(model_versions(tree).min(initial=version))


def model_versions(tree: RolloutTree) -> np.ndarray:
    """[T] int32: the versions of the weights that sampled the model's tokens."""
    return np.concatenate(
        [s.policy_versions for s in tree.segments if s.role == "model"]
    )
