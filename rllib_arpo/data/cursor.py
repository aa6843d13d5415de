"""Cursors over tasks, for ever, in an order that a few numbers resume."""

from collections.abc import Sequence
from typing import Any, Protocol, TypedDict

import numpy as np

from rllib_arpo.errors import DataError
from rllib_arpo.tree import Task


class Cursor(Protocol):
    """Hands out tasks; what it is over, and in which order, is its own matter."""

    def next(self, n: int) -> list[Task]:
        """The next `n` tasks."""
        ...

    def get_state(self) -> Any:
        """Plain numbers that `set_state` needs to go on here."""
        ...

    def set_state(self, state: Any) -> None:
        """Go on where `state` was taken.

        Raises:
            DataError: it was taken over other data.
        """
        ...


class CursorState(TypedDict):
    """Where a `TaskCursor` stands; plain numbers, for a checkpoint."""

    seed: int
    epoch: int
    position: int
    num_tasks: int


class TaskCursor:
    """Walks over tasks in a shuffled order, a new one each epoch, for ever.

    The order depends on the seed and the epoch alone, so a few numbers resume it.

    Args:
        tasks: at least one.
        seed: of the order.
        shuffle: False keeps the order of the file.
    """

    def __init__(
        self, tasks: Sequence[Task], *, seed: int = 0, shuffle: bool = True
    ) -> None:
        if not tasks:
            raise DataError("a cursor needs at least one task")
        self._tasks = tasks
        self._seed = seed
        self._shuffle = shuffle
        self._epoch = 0
        self._position = 0
        self._order = self._order_of(0)

    @property
    def epoch(self) -> int:
        """Passes over the tasks that have been begun, from 0."""
        return self._epoch

    def next(self, n: int) -> list[Task]:
        """The next `n` tasks, over the end of an epoch if need be."""
        tasks: list[Task] = []
        while len(tasks) < n:
            if self._position == len(self._order):
                self._epoch += 1
                self._position = 0
                self._order = self._order_of(self._epoch)
            end = min(self._position + n - len(tasks), len(self._order))
            chosen = self._order[self._position : end].tolist()
            tasks += [self._tasks[i] for i in chosen]
            self._position = end
        return tasks

    def get_state(self) -> CursorState:
        """What `set_state` needs to go on here."""
        return CursorState(
            seed=self._seed,
            epoch=self._epoch,
            position=self._position,
            num_tasks=len(self._tasks),
        )

    def set_state(self, state: CursorState) -> None:
        """Go on where `state` was taken.

        Raises:
            DataError: it was taken over another number of tasks.
        """
        if state.get("num_tasks") != len(self._tasks):
            raise DataError(
                f"the cursor's state is of {state.get('num_tasks')} tasks, the data "
                f"holds {len(self._tasks)}: resume with the data that the run began "
                "with"
            )
        self._seed = state["seed"]
        self._epoch = state["epoch"]
        self._position = state["position"]
        self._order = self._order_of(self._epoch)

    def _order_of(self, epoch: int) -> np.ndarray:
        """[num_tasks] int64."""
        if not self._shuffle:
            return np.arange(len(self._tasks))
        rng = np.random.default_rng((self._seed, epoch))
        return rng.permutation(len(self._tasks))
