"""The state of learners that hold parts of it: all are asked, one caller at a time.

RLlib asks the first learner alone for weights and checkpoints. With FSDP2 it would
wait for the others for ever, since whole weights are put together by all of them.

1. All learners are asked for state, and the first one's answer is taken.
2. A checkpoint is written by the first learner, from what all have put together.
3. Evaluation in parallel asks from a thread of its own. Learners must get the calls of
   both threads in the same order, so calls do not overlap.
"""

import threading
from typing import Any

from ray.rllib.core import COMPONENT_LEARNER
from ray.rllib.core.learner.learner_group import LearnerGroup
from ray.rllib.utils.actor_manager import FaultTolerantActorManager
from ray.rllib.utils.annotations import override

from rllib_arpo.learner.packing import RowCost
from rllib_arpo.learner.training_data import TreeTrainingData


class WholeState(LearnerGroup):
    """A LearnerGroup that knows that state may be spread over its learners."""

    def __init__(self, **kwargs: Any) -> None:
        self._calls = threading.RLock()
        super().__init__(**kwargs)

    @property
    def is_sharded(self) -> bool:
        """Whether each learner holds a part of the weights only."""
        config: Any = self.config
        return config.num_learners > 1 and config.learner_strategy == "fsdp2"

    @override(LearnerGroup)
    def update(self, *args: Any, training_data: Any = None, **kwargs: Any) -> Any:
        with self._calls:
            if isinstance(training_data, TreeTrainingData) and len(self) > 1:
                training_data.row_cost = self._row_cost()
            return super().update(*args, training_data=training_data, **kwargs)

    @override(LearnerGroup)
    def foreach_learner(self, *args: Any, **kwargs: Any) -> Any:
        with self._calls:
            return super().foreach_learner(*args, **kwargs)

    @override(LearnerGroup)
    def get_state(
        self, components: Any = None, *, not_components: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        with self._calls:
            if not self.is_sharded:
                return super().get_state(
                    components, not_components=not_components, **kwargs
                )
            if not self._check_component(COMPONENT_LEARNER, components, not_components):
                return {}
            wanted = self._get_subcomponents(COMPONENT_LEARNER, components)
            unwanted = self._get_subcomponents(COMPONENT_LEARNER, not_components)
            answers = self._manager.foreach_actor(
                lambda learner: learner.get_state_of_all(
                    wanted, not_components=unwanted, **kwargs
                )
            )
            states = self._get_results(answers)
            return {COMPONENT_LEARNER: next(s for s in states if s is not None)}

    @override(LearnerGroup)
    def set_state(self, state: dict[str, Any]) -> None:
        with self._calls:
            super().set_state(state)

    @override(LearnerGroup)
    def save_to_path(self, *args: Any, **kwargs: Any) -> str:
        with self._calls:
            if not self.is_sharded or kwargs.get("state") is not None:
                return super().save_to_path(*args, **kwargs)
            self._call_all("hold_state")
            try:
                return super().save_to_path(*args, **kwargs)
            finally:
                self._call_all("release_state")

    @override(LearnerGroup)
    def restore_from_path(self, *args: Any, **kwargs: Any) -> None:
        with self._calls:
            super().restore_from_path(*args, **kwargs)

    def _row_cost(self) -> RowCost | None:
        """How the learners price rows, which only they can: it depends on the model."""
        config: Any = self.config
        if config.packing != "tree":
            return None
        answers = self.foreach_learner(lambda learner: learner.row_cost)
        return self._get_results(answers)[0]

    def _call_all(self, method: str) -> None:
        self._get_results(self._manager.foreach_actor(method))

    @property
    def _manager(self) -> FaultTolerantActorManager:
        """Of all learners; without one of them the others would wait."""
        manager = self._worker_manager
        assert manager is not None and manager.num_healthy_actors() == len(self)
        return manager
