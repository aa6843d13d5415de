"""How the learners' weights reach the engines of the training EnvRunners.

Either the first learner puts them into Ray's object store, where runners read them,
or learners send them from GPU to GPU; they never pass through the driver. A probe
that travels with them tells whether they arrived (see `engines/weights`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.core import COMPONENT_RL_MODULE, DEFAULT_MODULE_ID
from ray.rllib.core.learner.learner_group import LearnerGroup
from ray.rllib.env.env_runner_group import EnvRunnerGroup
from ray.rllib.utils.metrics import WEIGHTS_SEQ_NO

from rllib_arpo.config import ARPOConfig
from rllib_arpo.rollouts.tree_stream import TreeStream


class WeightSync(Algorithm):
    """The part of `ARPO` that gives weights to EnvRunners."""

    config: ARPOConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    env_runner_group: EnvRunnerGroup  # pyright: ignore[reportIncompatibleVariableOverride]
    learner_group: LearnerGroup  # pyright: ignore[reportIncompatibleVariableOverride]

    # Version of the weights that were given last.
    _weights_seq_no = 0

    def sync_weights(self) -> None:
        """Give the learners' weights to the training EnvRunners, and wait for it.

        The first learner puts them into the object store, where runners read them;
        they do not pass through this process.

        Raises:
            WeightSyncError: an engine does not run the learner's weights.
        """
        if self.config.weight_transfer != "object_store":
            self._send_weights()
        for error in self._call_engines("take_weights", state=self._publish_weights()):
            if error is not None:
                raise error

    def _push_weights(self, stream: TreeStream) -> None:
        """As `sync_weights`, without waiting; learners that send wait for receivers."""
        if self.config.weight_transfer == "object_store":
            stream.push_weights(self._publish_weights())
        else:
            self.sync_weights()

    def _publish_weights(self) -> dict[str, Any]:
        """What EnvRunners take: the version, a probe, and where the weights are."""
        remote = self.env_runner_group.num_remote_env_runners() > 0
        through_store = self.config.weight_transfer == "object_store"

        def publish(learner: Any, *_: Any) -> dict[str, Any] | None:
            state = learner.engine_state(weights=through_store)
            if state is not None and remote and through_store:
                modules = state[COMPONENT_RL_MODULE]
                modules[DEFAULT_MODULE_ID] = ray.put(modules[DEFAULT_MODULE_ID])
            return state

        # All are asked, since weights may be spread over them; the first one answers.
        (state,) = [s for s in self._call_learners(publish) if s is not None]
        self._weights_seq_no = state[WEIGHTS_SEQ_NO]
        return state

    def _send_weights(self) -> None:
        """Send the learners' weights from GPU to GPU."""
        env_runners = self._call_engines("identity")
        backend = self.config.weight_transfer
        workers_each = max(int(self.config.num_gpus_per_env_runner or 0), 1)

        def send(learner: Any, *_: Any) -> None:
            learner.send_weights(
                env_runners, backend=backend, workers_each=workers_each
            )

        self._call_learners(send)

    def _call_learners(self, function: Any, **kwargs: Any) -> list[Any]:
        """Results of all learners; the first error is raised, not returned."""
        answers = self.learner_group.foreach_learner(function, **kwargs)
        for answer in answers.result_or_errors:
            if not answer.ok:
                raise answer.get()
        return [answer.get() for answer in answers.result_or_errors]

    @contextmanager
    def _engines_asleep(self) -> Iterator[None]:
        """With `colocate`, engines give their memory to the learners meanwhile."""
        if self.config.colocate:
            self._call_engines("sleep_engine")
        try:
            yield
        finally:
            if self.config.colocate:
                self._call_learners(lambda learner, *_: learner.free_memory())
                self._call_engines("wake_engine")

    def _call_engines(self, method: str, **kwargs: Any) -> list[Any]:
        group = self.env_runner_group
        if group.num_remote_env_runners():
            return group.foreach_env_runner(
                method, kwargs=kwargs, local_env_runner=False
            )
        return [getattr(group.local_env_runner, method)(**kwargs)]
