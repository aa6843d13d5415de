"""`ARPO`: Agentic Reinforced Policy Optimization as an RLlib Algorithm.

One training step is: sample trees on the EnvRunners, update on the Learners, give
the new weights back. The Algorithm owns the tasks: it hands them out, and hands them
out again when the runner that had them is gone. With `asynchronous` the EnvRunners
work through the next tasks meanwhile, and nobody waits for the slowest tree.

ARPO: arXiv:2507.19849. With `branch_rule="never"` this is GRPO (arXiv:2402.03300).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.core.learner.learner_group import LearnerGroup
from ray.rllib.env.env_runner_group import EnvRunnerGroup
from ray.rllib.utils.annotations import override
from ray.rllib.utils.metrics import (
    ENV_RUNNER_RESULTS,
    ENV_RUNNER_SAMPLING_TIMER,
    EVALUATION_RESULTS,
    LEARNER_RESULTS,
    LEARNER_UPDATE_TIMER,
    NUM_ENV_STEPS_SAMPLED_LIFETIME,
    SYNCH_WORKER_WEIGHTS_TIMER,
    TIMERS,
)
from ray.rllib.utils.metrics.metrics_logger import MetricsLogger
from ray.tune import PlacementGroupFactory

from rllib_arpo.alarms import ALARMS, Watch
from rllib_arpo.checkpoints import Checkpoints
from rllib_arpo.config import ARPOConfig
from rllib_arpo.data.cursor import Cursor
from rllib_arpo.data.sources import make_cursor, resolve_tasks
from rllib_arpo.engines.engine import SamplingParams
from rllib_arpo.errors import ConfigError, DataError, EngineError
from rllib_arpo.learner.training_data import TreeTrainingData
from rllib_arpo.metrics import (
    DYNAMIC_SAMPLING_ROUNDS,
    SOMETIMES,
    refuse_outage,
    tree_metrics,
)
from rllib_arpo.rollouts.branching import TreeSettings, derive_seed
from rllib_arpo.rollouts.env_runner_calls import (
    cause_of_death,
    grow_trees,
    wait_for_env_runner,
)
from rllib_arpo.rollouts.tree_queue import Job
from rllib_arpo.rollouts.tree_stream import TreeStream
from rllib_arpo.tree import RolloutTree, Task
from rllib_arpo.weight_sync import WeightSync


class ARPO(WeightSync, Checkpoints, Algorithm):
    """Trains a tool-using language model on trees of rollouts."""

    # RLlib declares them as what they are before `setup`.
    config: ARPOConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    evaluation_config: ARPOConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    env_runner_group: EnvRunnerGroup  # pyright: ignore[reportIncompatibleVariableOverride]
    learner_group: LearnerGroup  # pyright: ignore[reportIncompatibleVariableOverride]

    @classmethod
    @override(Algorithm)
    def get_default_config(cls) -> ARPOConfig:
        return ARPOConfig()

    @classmethod
    @override(Algorithm)
    def default_resource_request(cls, config: Any) -> Any:
        """As RLlib's, but a config that cannot work is left to its own trial.

        Tune asks for all trials in one process, where an error would end the sweep.
        """
        try:
            return super().default_resource_request(config)
        except ConfigError:
            return PlacementGroupFactory([{"CPU": 1}])

    @override(Algorithm)
    def __repr__(self) -> str:
        # Ray asks for it when a trial's config is refused, before there is one.
        refused = self.config is None
        return type(self).__name__ if refused else super().__repr__()

    @override(Algorithm)
    def setup(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, config: ARPOConfig
    ) -> None:
        # Data first: a wrong file must not cost the start of a cluster.
        self._cursor = self._make_cursor(config)
        self.eval_tasks: Sequence[Task] = (
            resolve_tasks(config.eval_tasks, setting="eval_tasks")
            if config.eval_tasks is not None
            else ()
        )
        self._num_trees_started = 0
        self._watch = Watch.of(config)
        # The first `num_saved_trees` of the last iteration.
        self.saved_trees: Sequence[RolloutTree] = ()
        try:
            super().setup(config)
        except IndexError:
            # RLlib asks the EnvRunners for their spaces, and takes the first answer.
            cause = cause_of_death(self.env_runner_group)
            if cause is None:
                raise
            raise EngineError(f"No EnvRunner could start: {cause}") from None
        self._stream = self._open_stream() if config.asynchronous else None
        self.sync_weights()

    def _make_cursor(self, config: ARPOConfig) -> Cursor | None:
        if config.train_tasks is None:
            return None
        return make_cursor(
            config.train_tasks, seed=config.seed or 0, setting="train_tasks"
        )

    @override(Algorithm)
    def step(self) -> dict[str, Any]:
        """As RLlib's; the result also tells what goes wrong, see `alarms.py`."""
        result = super().step()
        result[ALARMS] = self._watch.look(result)
        return result

    @override(Algorithm)
    def training_step(self) -> None:
        """Sample, update, sync."""
        stream = self._stream
        with self._timed(ENV_RUNNER_SAMPLING_TIMER):
            if stream is not None:
                trees = self._next_batch(stream)
            else:
                with self._tasks_kept():
                    trees = self._sample()
        self.saved_trees = trees[: self.config.num_saved_trees]
        with self._timed(LEARNER_UPDATE_TIMER), self._engines_asleep():
            self._update(trees)
        with self._timed(SYNCH_WORKER_WEIGHTS_TIMER):
            if stream is None:
                self.sync_weights()
            else:
                stream.trained(trees)
                self._push_weights(stream)

    @contextmanager
    def _tasks_kept(self) -> Iterator[None]:
        """A sampling that ends early (Ctrl-C, an outage) has taken no tasks."""
        cursor, started = self._cursor, self._num_trees_started
        state = cursor.get_state() if cursor is not None else None
        try:
            yield
        except BaseException:
            self._num_trees_started = started
            if cursor is not None and state is not None:
                cursor.set_state(state)
            raise

    def _open_stream(self) -> TreeStream:
        group = self.env_runner_group
        return TreeStream(
            group,
            next_jobs=self._next_jobs,
            restore=lambda: self.restore_env_runners(group),
            wait=lambda: self._wait_for_env_runner(group),
            batch_size=self.config.total_train_batch_size,
            max_policy_lag=self.config.max_policy_lag,
        )

    def _next_batch(self, stream: TreeStream) -> list[RolloutTree]:
        trees = stream.batch(self._weights_seq_no)
        stats = stream.stats(trees, self._weights_seq_no)
        self.metrics.aggregate(stats, key=(ENV_RUNNER_RESULTS,))
        self.log_trees(trees, (ENV_RUNNER_RESULTS,))
        return trees

    def _timed(self, name: str) -> Any:
        # RLlib's default is a moving average, which no other number here is.
        return self.metrics.log_time((TIMERS, name), reduce="mean", window=1)

    def _sample(self) -> list[RolloutTree]:
        """One iteration's trees; with dynamic sampling only those that teach."""
        count = self.config.total_train_batch_size
        trees = self._sample_next_tasks(count)
        sampled = list(trees)
        rounds = 0
        if self.config.dynamic_sampling:
            # DAPO, arXiv:2503.14476, section 3.2: a group of equal rewards has no
            # gradient, so it is replaced.
            useful = [tree for tree in trees if _has_signal(tree)]
            spare = [tree for tree in trees if not _has_signal(tree)]
            while (
                len(useful) < count and rounds < self.config.max_dynamic_sampling_rounds
            ):
                rounds += 1
                more = self._sample_next_tasks(count - len(useful))
                useful += [tree for tree in more if _has_signal(tree)]
                sampled += more
            trees = (useful + spare)[:count]
        self.log_trees(sampled, (ENV_RUNNER_RESULTS,))
        self.metrics.log_value(
            (ENV_RUNNER_RESULTS, DYNAMIC_SAMPLING_ROUNDS), rounds, window=1
        )
        return trees

    def _sample_next_tasks(self, count: int) -> list[RolloutTree]:
        seeds, tasks = zip(*self._next_jobs(count), strict=True)
        return self.sample_trees(tasks, seeds)

    def _next_jobs(self, count: int) -> list[Job]:
        if self._cursor is None:
            raise DataError(
                "There is nothing to train on: set "
                "`.environment(train_tasks=...)` to a file, a list or a function."
            )
        first = self._num_trees_started
        self._num_trees_started += count
        return [
            (derive_seed(self.config.seed or 0, "train", first + i), task)
            for i, task in enumerate(self._cursor.next(count))
        ]

    def _update(self, trees: list[RolloutTree]) -> None:
        episodes: list[Any] = trees  # RLlib knows its own episode types only
        results = self.learner_group.update(
            training_data=TreeTrainingData(episodes=episodes),
            timesteps={
                NUM_ENV_STEPS_SAMPLED_LIFETIME: self.metrics.peek(
                    (ENV_RUNNER_RESULTS, NUM_ENV_STEPS_SAMPLED_LIFETIME), default=0
                )
            },
            num_epochs=self.config.num_epochs,
            minibatch_size=self.config.minibatch_size,
            shuffle_batch_per_epoch=self.config.shuffle_batch_per_epoch,
        )
        self.metrics.aggregate(results, key=LEARNER_RESULTS)

    def sample_trees(
        self,
        tasks: Sequence[Task],
        seeds: Sequence[int],
        *,
        env_runner_group: EnvRunnerGroup | None = None,
        tree_settings: TreeSettings | None = None,
        sampling: SamplingParams | None = None,
        results_key: tuple[str, ...] = (ENV_RUNNER_RESULTS,),
    ) -> list[RolloutTree]:
        """Grow one tree per task, spread over the EnvRunners, and count them.

        Tasks of a runner that dies are given to the others; none is lost or grown
        twice.

        Args:
            tasks: the questions.
            seeds: one per task, all different.
            env_runner_group: the training EnvRunners when None.
            tree_settings: in place of the config's.
            sampling: in place of the config's.
            results_key: where the runners' counts go.

        Returns:
            One tree per task, in the order of the tasks.

        Raises:
            EngineError: no EnvRunner came back in `env_runner_restore_timeout_s`.
            RewardError: a reward function failed.
        """
        group = env_runner_group or self.env_runner_group
        trained_on = group is self.env_runner_group

        def wait() -> None:
            self._wait_for_env_runner(group)
            if trained_on:
                self.sync_weights()

        trees, stats = grow_trees(
            group,
            list(zip(seeds, tasks, strict=True)),
            wait=wait,
            # RLlib itself brings weights to EnvRunners for evaluation.
            weights_seq_no=self._weights_seq_no if trained_on else 0,
            tree_settings=tree_settings,
            sampling=sampling,
        )
        self.metrics.aggregate(stats, key=results_key)
        return trees

    def log_trees(
        self, trees: Sequence[RolloutTree], results_key: tuple[str, ...]
    ) -> None:
        """Log what all trees of one iteration or evaluation look like.

        Call it once for each: RLlib averages over calls.

        Args:
            trees: at least one.
            results_key: where metrics go.

        Raises:
            ToolOutageError: too large a share of the tool calls failed.
        """
        values = tree_metrics(
            trees, entropy_probe_tokens=self.config.entropy_probe_tokens
        )
        logger = MetricsLogger(root=False)
        for name, value in values.items():
            logger.log_value(name, value, window=1)
        for name in SOMETIMES - values.keys():
            # RLlib goes on with NaN under a key of an earlier iteration.
            key: Any = (*results_key, name)  # declared as a tuple of tuples there
            self.metrics.delete(*key, key_error=False)
        # RLlib's `evaluate` reads what was aggregated last, not what was logged.
        self.metrics.aggregate([logger.reduce()], key=results_key)
        refuse_outage(values, self.config.max_tool_failure_share)

    def _wait_for_env_runner(self, group: EnvRunnerGroup) -> None:
        wait_for_env_runner(
            group,
            restore=lambda: self.restore_env_runners(group),
            timeout_s=self.config.env_runner_restore_timeout_s,
        )

    @override(Algorithm)
    def restore_env_runners(self, env_runner_group: EnvRunnerGroup) -> list[int]:
        restored = super().restore_env_runners(env_runner_group)
        if restored and self.config.weight_transfer != "object_store":
            # RLlib gave them the weights as arrays, which they do not take.
            self.sync_weights()
        return restored

    @override(Checkpoints)
    def get_state(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        state = super().get_state(*args, **kwargs)
        state[ALARMS] = self._watch.get_state()
        if self._stream is not None:
            # Those that are being grown are grown again after a restore.
            state["jobs"] = self._stream.get_state()
        return state

    @override(Checkpoints)
    def set_state(self, state: dict[str, Any]) -> None:
        super().set_state(state)
        self._watch.set_state(state.get(ALARMS, ()))
        if self._stream is not None:
            self._stream.set_state(state.get("jobs", ()))

    @classmethod
    @override(Algorithm)
    def _should_create_evaluation_env_runners(cls, eval_config: Any) -> bool:
        # A model for evaluation alone would cost as much memory as a training one.
        return eval_config.evaluation_num_env_runners > 0


def evaluate_on_env_runners(
    algorithm: ARPO, eval_env_runner_group: EnvRunnerGroup | None
) -> tuple[dict[str, Any], int, int]:
    """The default `custom_evaluation_function`: the first tasks of `eval_tasks`.

    Runs on the evaluation EnvRunners if there are any, else on the training ones,
    with the settings of `evaluation_config` (one independent rollout per task unless
    overridden) and the same seeds every time.

    Returns:
        Metrics, turns, turns: as RLlib expects.

    Raises:
        DataError: `eval_tasks` is not set.
    """
    config = algorithm.evaluation_config
    tasks = algorithm.eval_tasks[: int(config.evaluation_duration or 0)]
    if not tasks:
        raise DataError(
            "There is nothing to evaluate on: set `.environment(eval_tasks=...)` to a "
            "file, a list or a function."
        )
    key = (EVALUATION_RESULTS, ENV_RUNNER_RESULTS)
    trees = algorithm.sample_trees(
        tasks,
        [
            derive_seed(config.seed or 0, "evaluation", number)
            for number in range(len(tasks))
        ],
        env_runner_group=eval_env_runner_group,
        tree_settings=config.tree_settings(),
        sampling=config.sampling_params(),
        results_key=key,
    )
    algorithm.log_trees(trees, key)
    num_turns = sum(len(tree) for tree in trees)
    return algorithm.metrics.peek(key, default={}), num_turns, num_turns


def _has_signal(tree: RolloutTree) -> bool:
    rewards = tree.rewards
    return bool(rewards.max() > rewards.min())
