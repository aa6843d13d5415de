"""The jobs of one EnvRunner that grows trees while nobody waits for them.

Jobs are taken in the order in which they came, a bounded number at a time, so that a
runner goes on while the driver is busy with an update. Everything but `take` runs on
the runner's event loop.
"""

import asyncio
import queue
from collections import deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from rllib_arpo.errors import ARPOError, EngineError
from rllib_arpo.tree import RolloutTree, Task

# What there is to do: a tree's seed and its task.
Job = tuple[int, Task]

# A job's seed, and its tree or why there is none.
Outcome = tuple[int, RolloutTree | BaseException]

# Paths that are told to stop stop at once, but for a tool that takes no notice.
_CLEAR_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Harvest:
    """What an EnvRunner has grown since it was last asked.

    Attributes:
        trees: in the order in which they were finished.
        errors: seed -> the error of the user's reward, data or settings.
        stats: of the engine; None without trees.
        num_waiting: jobs of which nothing is grown yet.
        num_growing: jobs under way.
    """

    trees: Sequence[RolloutTree]
    errors: Mapping[int, ARPOError]
    stats: dict[str, Any] | None
    num_waiting: int
    num_growing: int


class TreeQueue:
    """Jobs that wait, that grow, and that are done.

    Args:
        grow: grows the tree of a seed and a task.
        max_growing: most trees at a time.
    """

    def __init__(
        self,
        grow: Callable[[int, Task], Coroutine[Any, Any, RolloutTree]],
        *,
        max_growing: int,
    ) -> None:
        self._grow, self._max_growing = grow, max_growing
        self._waiting: deque[Job] = deque()
        self._growing: dict[int, asyncio.Task[RolloutTree]] = {}
        self._done: queue.SimpleQueue[Outcome] = queue.SimpleQueue()

    @property
    def num_waiting(self) -> int:
        """Jobs of which nothing is grown yet."""
        return len(self._waiting)

    @property
    def num_growing(self) -> int:
        """Jobs under way."""
        return len(self._growing)

    async def put(self, jobs: Sequence[Job]) -> None:
        """Append jobs; their seeds differ from all that are waiting or growing."""
        self._waiting.extend(jobs)
        self._start()

    async def clear(self) -> None:
        """Forget all jobs, and stop those under way."""
        self._waiting.clear()
        if growing := [*self._growing.values()]:
            for tree in growing:
                tree.cancel()
            await asyncio.wait(growing, timeout=_CLEAR_TIMEOUT_S)
        self._growing, self._done = {}, queue.SimpleQueue()

    def take(self, wait_s: float) -> tuple[list[RolloutTree], dict[int, ARPOError]]:
        """What has ended since the last call, in that order; from any thread.

        Args:
            wait_s: how long to wait for the first.

        Returns:
            Trees, and by seed the errors of the user's reward, data or settings.

        Raises:
            EngineError: the engine failed, and with it all trees.
        """
        ended: list[Outcome] = []
        with suppress(queue.Empty):
            ended.append(self._done.get(timeout=wait_s))
            while True:
                ended.append(self._done.get_nowait())
        trees, errors = [], {}
        for seed, result in ended:
            if isinstance(result, RolloutTree):
                trees.append(result)
            elif isinstance(result, ARPOError) and not isinstance(result, EngineError):
                errors[seed] = result
            else:
                raise result
        return trees, errors

    def _start(self) -> None:
        while self._waiting and len(self._growing) < self._max_growing:
            seed, task = self._waiting.popleft()
            tree = asyncio.get_running_loop().create_task(self._grow(seed, task))
            self._growing[seed] = tree
            tree.add_done_callback(partial(self._end, seed))

    def _end(self, seed: int, tree: asyncio.Task[RolloutTree]) -> None:
        if tree.cancelled() or self._growing.get(seed) is not tree:
            return
        del self._growing[seed]
        error = tree.exception()
        result = tree.result() if error is None else error
        self._done.put((seed, result))
        self._start()
