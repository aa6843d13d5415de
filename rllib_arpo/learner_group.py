"""`ARPOLearnerGroup`: RLlib's LearnerGroup, which passes over no learner's error.

1. RLlib does not look at what learners answer while a checkpoint is saved or restored:
   one that could not write its file would go unnoticed.
2. When one of several learners dies, the others fail in the collective that they
   shared with it. The death is what is reported, not the others' broken connection.
3. A group that has lost a learner takes no further step.
"""

from collections.abc import Sequence
from typing import Any

from ray.exceptions import RayActorError
from ray.rllib.core import COMPONENT_LEARNER
from ray.rllib.core.learner.learner_group import LearnerGroup
from ray.rllib.utils.actor_manager import FaultTolerantActorManager, RemoteCallResults
from ray.rllib.utils.annotations import override
from ray.rllib.utils.checkpoints import Checkpointable

from rllib_arpo.errors import LearnerError
from rllib_arpo.learner.group_state import WholeState


class ARPOLearnerGroup(WholeState):
    """Coordinates the learners; the first death of one stops training."""

    _death: str | None = None

    @override(LearnerGroup)
    def update(self, *args: Any, **kwargs: Any) -> Any:
        """As RLlib's.

        Raises:
            LearnerError: a learner died, in this update or an earlier one.
        """
        self._check_complete()
        return super().update(*args, **kwargs)

    @override(LearnerGroup)
    def foreach_learner(self, *args: Any, **kwargs: Any) -> RemoteCallResults:
        """As RLlib's, which returns errors; a death is raised.

        Raises:
            LearnerError: a learner died, in this call or an earlier one.
        """
        self._check_complete()
        answers = super().foreach_learner(*args, **kwargs)
        self._note_death(list(answers))
        return answers

    @override(LearnerGroup)
    def _get_results(self, results: Any) -> list[Any]:
        answers = list(results)
        self._note_death(answers)
        return super()._get_results(answers)

    def _check_complete(self) -> None:
        if self._death is not None:
            raise LearnerError(self._death)

    def _note_death(self, answers: Sequence[Any]) -> None:
        for number, answer in enumerate(answers):
            error = None if answer.ok else answer.get()
            if isinstance(error, RayActorError):
                reason = str(error).strip().splitlines()[-1].strip()
                self._death = (
                    f"Learner {number} of {len(answers)} died: {reason} The last "
                    "checkpoint is intact: go on from it with `rllib-arpo train "
                    "--resume`, or let Tune do so with `FailureConfig(max_failures=N)` "
                    "and `CheckpointConfig(checkpoint_frequency=N)`."
                )
                raise LearnerError(self._death) from error

    @override(Checkpointable)
    def get_checkpointable_components(self) -> list[tuple[str, Any]]:
        if self.is_local:
            return super().get_checkpointable_components()
        return [(COMPONENT_LEARNER, _RaisingManager(self._worker_manager))]


class _RaisingManager(FaultTolerantActorManager):
    """A view of the learners' manager that raises the first error it is given."""

    def __init__(self, manager: Any) -> None:
        self.__dict__ = manager.__dict__

    @override(FaultTolerantActorManager)
    def foreach_actor(self, *args: Any, **kwargs: Any) -> RemoteCallResults:
        answers = super().foreach_actor(*args, **kwargs)
        failed: list[Any] = [result for result in answers if not result.ok]
        for result in failed:
            # RLlib takes a learner out of service for any error; a full disk is none
            # of the learner's.
            if not isinstance(result.get(), RayActorError):
                self.set_actor_state(result.actor_id, True)
        for result in failed:
            raise result.get()
        return answers
