"""`TreeQueue`: in order, a bounded number at a time, and nothing left behind."""

import asyncio

import pytest

from rllib_arpo import RolloutTree, Task
from rllib_arpo.errors import EngineError, RewardError
from rllib_arpo.rollouts.tree_queue import TreeQueue

TASK = Task(task_id="t", messages=(), answers=("a",))


def jobs(*seeds: int) -> list[tuple[int, Task]]:
    return [(seed, TASK) for seed in seeds]


class Growth:
    """Trees that are finished, or fail, when the test says so."""

    def __init__(self) -> None:
        self.begun: list[int] = []
        self.cancelled: list[int] = []
        self.ends: dict[int, asyncio.Future[None]] = {}

    async def grow(self, seed: int, task: Task) -> RolloutTree:
        self.begun.append(seed)
        self.ends[seed] = asyncio.get_running_loop().create_future()
        try:
            await self.ends[seed]
        except asyncio.CancelledError:
            self.cancelled.append(seed)
            raise
        return RolloutTree(task=task, segments=(), leaves=(), seed=seed)

    async def finish(self, seed: int, error: BaseException | None = None) -> None:
        if error is None:
            self.ends[seed].set_result(None)
        else:
            self.ends[seed].set_exception(error)
        await turns()


async def turns() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_jobs_are_begun_in_their_order_a_bounded_number_at_a_time() -> None:
    async def run() -> None:
        growth = Growth()
        queue = TreeQueue(growth.grow, max_growing=2)
        await queue.put(jobs(5, 3, 4))
        await queue.put(jobs(1))
        await turns()
        assert growth.begun == [5, 3]
        assert (queue.num_growing, queue.num_waiting) == (2, 2)
        await growth.finish(3)
        assert growth.begun == [5, 3, 4]
        await growth.finish(5)
        assert growth.begun == [5, 3, 4, 1]
        trees, errors = queue.take(wait_s=0)
        # In the order in which they ended.
        assert [tree.seed for tree in trees] == [3, 5] and errors == {}
        assert queue.take(wait_s=0) == ([], {})

    asyncio.run(run())


def test_an_error_of_the_user_is_its_jobs_alone_and_an_engines_is_all() -> None:
    async def run() -> None:
        growth = Growth()
        queue = TreeQueue(growth.grow, max_growing=3)
        await queue.put(jobs(1, 2, 3))
        await turns()
        error = RewardError("no number")
        await growth.finish(1, error)
        await growth.finish(2)
        trees, errors = queue.take(wait_s=0)
        assert [tree.seed for tree in trees] == [2] and errors == {1: error}
        await growth.finish(3, EngineError("dead"))
        with pytest.raises(EngineError, match="dead"):
            queue.take(wait_s=0)

    asyncio.run(run())


def test_clearing_stops_what_grows_and_forgets_what_waits_and_what_is_done() -> None:
    async def run() -> None:
        growth = Growth()
        queue = TreeQueue(growth.grow, max_growing=2)
        await queue.put(jobs(1, 2, 3, 4))
        await turns()
        await growth.finish(1)
        await queue.clear()
        assert growth.begun == [1, 2, 3] and growth.cancelled == [2, 3]
        assert (queue.num_growing, queue.num_waiting) == (0, 0)
        assert queue.take(wait_s=0) == ([], {})
        await queue.put(jobs(2))
        await turns()
        await growth.finish(2)
        trees, _ = queue.take(wait_s=0)
        assert [tree.seed for tree in trees] == [2]

    asyncio.run(run())
