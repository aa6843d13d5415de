"""`ARPOEnvRunner`: an RLlib EnvRunner that turns tasks into trees.

It owns one environment (a pattern that every path forks), one engine, and one event
loop in a thread of its own, on which all paths of all trees run.

1. The Algorithm hands it tasks; a runner has no data of its own. Without tasks (a
   user's own evaluation loop) it goes through `train_tasks` by itself.
2. Weights are taken whenever the sequence number differs from the current one, also
   downwards: after a restore, the older weights are the right ones. They are taken
   too when the learner has restored others meanwhile, whatever their number.
3. It grows trees in one of two ways: `sample` waits for all of them; in asynchronous
   training `start_trees` returns at once, and `finished_trees` asks what has grown.
4. The class has no coroutine methods: with one, Ray would not keep calls in order.
"""

import asyncio
import math
import threading
import time
import uuid
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

import ray
from ray.actor import ActorHandle
from ray.rllib.callbacks.utils import make_callback
from ray.rllib.core import (
    COMPONENT_RL_MODULE,
    DEFAULT_AGENT_ID,
    DEFAULT_MODULE_ID,
)
from ray.rllib.env import INPUT_ENV_SINGLE_SPACES, INPUT_ENV_SPACES
from ray.rllib.env.env_context import EnvContext
from ray.rllib.env.env_runner import EnvRunner
from ray.rllib.utils.annotations import override
from ray.rllib.utils.checkpoints import Checkpointable
from ray.rllib.utils.metrics import (
    NUM_ENV_STEPS_SAMPLED_LIFETIME,
    WEIGHTS_SEQ_NO,
)

from rllib_arpo.config import ARPOConfig
from rllib_arpo.data.cursor import Cursor
from rllib_arpo.data.sources import make_cursor
from rllib_arpo.engines.engine import Engine, SamplingParams
from rllib_arpo.engines.weights import (
    WEIGHT_PROBE,
    WEIGHTS_RESTORE,
    WeightProbe,
    check_probe,
)
from rllib_arpo.errors import ARPOError, EngineError, WeightSyncError
from rllib_arpo.metrics import ENGINE_METRICS, WEIGHT_PROBE_ERROR
from rllib_arpo.rollouts.branching import TreeSettings, derive_seed
from rllib_arpo.rollouts.sampler import grow_tree
from rllib_arpo.rollouts.sampling_counts import EngineMeter, log_trees_sampled
from rllib_arpo.rollouts.tree_queue import Harvest, Job, TreeQueue
from rllib_arpo.tree import RolloutTree, Task

T = TypeVar("T")


class ARPOEnvRunner(EnvRunner, Checkpointable):
    """Grows trees for the tasks that it is given."""

    config: ARPOConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    env: Any  # a `TokenEnv`, None before `make_env`

    @override(EnvRunner)
    def __init__(self, *, config: ARPOConfig, **kwargs: Any) -> None:
        super().__init__(config=config, **kwargs)
        self.worker_index = self.worker_index or 0
        self._env_creator = kwargs.get("env_creator")
        self._callbacks = [cls() for cls in _as_list(self.config.callbacks_class)]
        self._weights_seq_no = 0
        self._weights_restore = ""
        self._name = uuid.uuid4().hex
        self._engine_meter = EngineMeter()
        self._cursor: Cursor | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="rollouts", daemon=True
        )
        self._thread.start()
        self.make_env()
        self.make_module()
        share = self.config.total_train_batch_size / max(self.num_workers, 1)
        self._queue = TreeQueue(
            self._grow,
            max_growing=self.config.max_concurrent_trees or math.ceil(share),
        )
        self._stream = ""
        self._counted_at = 0.0

    @override(EnvRunner)
    def make_env(self) -> None:
        if self.env is not None:
            self.env.close()
        context = EnvContext(
            {"tokenizer": self.config.model_config["model"], **self.config.env_config},
            worker_index=self.worker_index,
            num_workers=self.num_workers,
        )
        creator: Any = self._env_creator or self.config.env
        self.env = getattr(creator(context), "unwrapped", None)
        self._call_back("on_environment_created", env=self.env, env_context=context)

    @override(EnvRunner)
    def make_module(self) -> None:
        """Start the engine; an EnvRunner has no RLModule beside it."""
        self.engine: Engine = self._run(self.config.make_engine(self.worker_index))

    @override(EnvRunner)
    def assert_healthy(self) -> None:
        assert self.env is not None and self.engine is not None

    @override(EnvRunner)
    def get_spaces(self) -> dict[str, Any]:
        spaces = (self.env.observation_space, self.env.action_space)
        return {
            INPUT_ENV_SPACES: spaces,
            INPUT_ENV_SINGLE_SPACES: spaces,
            DEFAULT_MODULE_ID: spaces,
            DEFAULT_AGENT_ID: spaces,
        }

    @override(EnvRunner)
    def sample(
        self,
        *,
        tasks: Sequence[Task] | None = None,
        seeds: Sequence[int] | None = None,
        tree_settings: TreeSettings | None = None,
        sampling: SamplingParams | None = None,
        num_episodes: int | None = None,
        num_timesteps: int | None = None,
        explore: bool | None = None,
        random_actions: bool = False,
        force_reset: bool = False,
        **kwargs: Any,
    ) -> list[RolloutTree]:
        """Grow one tree per task, all at once.

        Args:
            tasks: the questions; without them `num_episodes` of the runner's own.
            seeds: one per task; same seed, task and weights, same tree.
            tree_settings: in place of the config's.
            sampling: in place of the config's.
            num_episodes: how many trees to grow when no tasks are given.
            num_timesteps: as many trees as that, since a tree has at least one turn.
            explore: False samples greedily.
            random_actions: not used; part of RLlib's signature.
            force_reset: not used; every tree starts with a reset.
            **kwargs: not used; part of RLlib's signature.

        Raises:
            EngineError: the engine failed.
            RewardError: a reward function failed.
        """
        if tasks is None:
            tasks = self._own_tasks(num_episodes or num_timesteps or 1)
        if seeds is None:
            seeds = [
                derive_seed(self._seed or 0, self.num_env_steps_sampled_lifetime, i)
                for i in range(len(tasks))
            ]
        if explore is False:
            sampling = SamplingParams(temperature=0.0)
        self._forget_prefixes()
        start = time.monotonic()
        growing = [
            self._grow(seed, task, tree_settings, sampling)
            for seed, task in zip(seeds, tasks, strict=True)
        ]
        trees = self._run(_all(growing))
        log_trees_sampled(self.metrics, trees)
        self._count(trees, time.monotonic() - start)
        return trees

    def _count(self, trees: Sequence[RolloutTree], sample_time_s: float) -> None:
        self.num_env_steps_sampled_lifetime += sum(map(len, trees))
        self._engine_meter.log(self.metrics, self.engine, sample_time_s)
        self._call_back("on_sample_end", samples=trees)

    def sample_and_get_metrics(
        self, *, weights_seq_no: int = 0, **kwargs: Any
    ) -> tuple[list[RolloutTree], dict[str, Any]] | ARPOError | None:
        """`sample` and `get_metrics` in one remote call.

        An error of the user's reward, data or settings is returned, not raised:
        RLlib would restart the actor, which cures nothing, and hide the message.

        Args:
            weights_seq_no: None is returned when this runner's weights are older: it
                was restarted, and nobody has noticed.
            **kwargs: see `sample`.
        """
        if self._weights_seq_no < weights_seq_no:
            return None
        try:
            return self.sample(**kwargs), self.get_metrics()
        except EngineError:
            raise
        except ARPOError as error:
            return error

    def _grow(
        self,
        seed: int,
        task: Task,
        settings: TreeSettings | None = None,
        sampling: SamplingParams | None = None,
    ) -> Coroutine[Any, Any, RolloutTree]:
        return grow_tree(
            task,
            env=self.env,
            engine=self.engine,
            settings=settings or self.config.tree_settings(),
            sampling=sampling or self.config.sampling_params(),
            vocab_size=self.env.action_space.vocab_size,
            seed=seed,
        )

    def _forget_prefixes(self) -> None:
        """An evaluation before, or a restart, must not change how sums are rounded."""
        engine: Any = self.engine
        if self.config.deterministic:
            self._run(_call(engine.forget))

    def open_stream(self) -> str:
        """Forget all jobs; the name of a new stream, which a restarted runner lacks."""
        self._run(self._queue.clear())
        self._stream = uuid.uuid4().hex
        return self._stream

    def start_trees(self, jobs: Sequence[Job], *, stream: str) -> None:
        """Take jobs to be grown in the background; those of another stream are not."""
        if stream == self._stream:
            if not self._queue.num_growing:
                self._forget_prefixes()
                self._counted_at = time.monotonic()
            self._run(self._queue.put(jobs))

    def finished_trees(self, *, stream: str, wait_s: float) -> Harvest | None:
        """What the background has grown since the last call.

        Args:
            stream: as `open_stream` named it.
            wait_s: how long to wait for the first tree. Keep it short: new weights
                wait meanwhile.

        Returns:
            None when the stream is not this runner's.

        Raises:
            EngineError: the engine failed.
        """
        if stream != self._stream:
            return None
        trees, errors = self._queue.take(wait_s)
        if trees:
            now = time.monotonic()
            self._count(trees, now - self._counted_at)
            self._counted_at = now
        return Harvest(
            trees=trees,
            errors=errors,
            stats=self.get_metrics() if trees else None,
            num_waiting=self._queue.num_waiting,
            num_growing=self._queue.num_growing,
        )

    def _call_back(self, name: str, **kwargs: Any) -> None:
        make_callback(
            name,
            callbacks_objects=self._callbacks,
            callbacks_functions=getattr(self.config, f"callbacks_{name}"),
            kwargs={"env_runner": self, "metrics_logger": self.metrics, **kwargs},
        )

    def _own_tasks(self, count: int) -> list[Task]:
        if self._cursor is None:
            self._cursor = make_cursor(
                self.config.train_tasks, seed=self._seed or 0, setting="train_tasks"
            )
        return self._cursor.next(count)

    @override(EnvRunner)
    def get_metrics(self) -> dict[str, Any]:
        return self.metrics.reduce()

    @override(Checkpointable)
    def get_state(
        self, components: Any = None, *, not_components: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        state: dict[str, Any] = {
            NUM_ENV_STEPS_SAMPLED_LIFETIME: self.num_env_steps_sampled_lifetime
        }
        if self._cursor is not None:
            state["task_cursor"] = self._cursor.get_state()
        return state

    @override(Checkpointable)
    def set_state(self, state: dict[str, Any]) -> None:
        version = state.get(WEIGHTS_SEQ_NO, 0)
        by_arrays = self.config.weight_transfer == "object_store"
        if by_arrays and COMPONENT_RL_MODULE in state:
            self._take_arrays(version, state[COMPONENT_RL_MODULE])
        if WEIGHTS_SEQ_NO in state:
            self._weights_seq_no = version
        if WEIGHT_PROBE in state:
            self._check_weights(state[WEIGHT_PROBE])
        if NUM_ENV_STEPS_SAMPLED_LIFETIME in state:
            self.num_env_steps_sampled_lifetime = state[NUM_ENV_STEPS_SAMPLED_LIFETIME]
        if "task_cursor" in state:
            self._own_tasks(0)
            assert self._cursor is not None
            self._cursor.set_state(state["task_cursor"])

    def _take_arrays(self, version: int, modules: Any) -> None:
        # RLlib's own sync puts all modules into the store, ours the weights alone.
        modules = _fetched(modules)
        restore = modules.get(WEIGHTS_RESTORE, "")
        in_place = (self._weights_restore, self._weights_seq_no)
        if version != 0 and (restore, version) == in_place:
            return
        weights = _fetched(modules[DEFAULT_MODULE_ID])
        self._run(self.engine.update_weights(version, weights))
        self._weights_restore = restore

    def _check_weights(self, probe: WeightProbe) -> None:
        scored = self._run(self.engine.score(probe.token_ids))
        dtype = self.config.model_config.get("dtype") or "float32"
        error = check_probe(probe, scored, dtype=dtype)
        self.metrics.log_value((ENGINE_METRICS, WEIGHT_PROBE_ERROR), error, window=1)

    def take_weights(self, state: dict[str, Any]) -> WeightSyncError | None:
        """`set_state`; an error of the weights is returned, not raised.

        RLlib would restart the actor, which then starts from the first weights, and
        training would go on.
        """
        try:
            self.set_state(state)
        except WeightSyncError as error:
            return error
        return None

    def transfer(self, step: str, argument: Any) -> None:
        """One step of a transfer of weights from GPU to GPU; a learner calls it."""
        engine: Any = self.engine
        self._run(engine.transfer(step, argument))

    def identity(self) -> tuple[ActorHandle, str]:
        """This actor, and a name that it loses when it is restarted."""
        return ray.get_runtime_context().current_actor, self._name

    def sleep_engine(self) -> None:
        """Give the engine's memory back until `wake_engine`."""
        self._run(self.engine.sleep())

    def wake_engine(self) -> None:
        """Take the engine's memory again."""
        self._run(self.engine.wake_up())

    @override(Checkpointable)
    def get_ctor_args_and_kwargs(self) -> tuple[tuple[()], dict[str, Any]]:
        return (), {"config": self.config}

    @override(Checkpointable)
    def get_checkpointable_components(self) -> list[tuple[str, Any]]:
        return []

    @override(EnvRunner)
    def stop(self) -> None:
        self._run(self._queue.clear())
        self._run(_call(self.engine.close))
        self._run(self._loop.shutdown_asyncgens())  # connections of tools
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        if self.env is not None:
            self.env.close()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            # Ctrl-C reaches the caller's thread only: stop the paths too.
            future.cancel()
            raise


async def _all(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one) for one in work]
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from failed
    return [task.result() for task in tasks]


async def _call(function: Any, *args: Any) -> Any:
    return function(*args)


def _fetched(value: Any) -> Any:
    return ray.get(value) if isinstance(value, ray.ObjectRef) else value


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]
