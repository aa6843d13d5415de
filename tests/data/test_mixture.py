import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rllib_arpo.data.mixture import Mixture, MixtureCursor
from rllib_arpo.errors import ConfigError, DataError
from rllib_arpo.tree import Task

WEIGHTS = st.lists(st.floats(0.01, 100), min_size=1, max_size=6)


def tasks_of(source: str, number: int) -> list[Task]:
    return [
        Task(task_id=f"{source}/{i}", messages=(), answers=("x",), source=source)
        for i in range(number)
    ]


def cursor_of(weights, *, sizes=None, seed=0) -> MixtureCursor:
    sizes = sizes or [3] * len(weights)
    sources = [tasks_of(str(number), size) for number, size in enumerate(sizes)]
    return MixtureCursor(sources, weights=weights, seed=seed)


@given(WEIGHTS, st.integers(1, 300))
def test_every_source_has_its_share_to_less_than_one_task(weights, num_draws):
    cursor = cursor_of(weights)
    drawn: Counter[str] = Counter()
    for draw in range(1, num_draws + 1):
        (task,) = cursor.next(1)
        drawn[task.source] += 1
        for number, weight in enumerate(weights):
            share = weight / sum(weights) * draw
            assert abs(drawn[str(number)] - share) < 1


def test_any_batch_holds_the_shares():
    cursor = cursor_of([2, 1, 1], sizes=[100, 7, 1000])
    for _ in range(20):
        sources = Counter(task.source for task in cursor.next(8))
        # 8 draws at 1/2, 1/4, 1/4
        assert sources == {"0": 4, "1": 2, "2": 2}


def test_each_source_is_walked_over_in_epochs_of_its_own():
    drawn = cursor_of([1, 1], sizes=[4, 10]).next(40)
    for source, size in ("0", 4), ("1", 10):
        ids = [task.task_id for task in drawn if task.source == source]
        assert len(ids) == 20
        for start in range(0, len(ids) - size + 1, size):
            assert len(set(ids[start : start + size])) == size


def test_without_weights_all_sources_end_together():
    cursor = MixtureCursor([tasks_of("0", 3), tasks_of("1", 9)], seed=0)
    drawn = [task.task_id for task in cursor.next(12)]
    assert len(set(drawn)) == 12


@given(WEIGHTS, st.lists(st.integers(0, 9), max_size=6), st.integers(0, 30))
def test_a_restored_mixture_goes_on_where_the_state_was_taken(weights, sizes, after):
    cursor = cursor_of(weights, seed=1)
    for size in sizes:
        cursor.next(size)
    restored = cursor_of(weights, seed=2)
    restored.set_state(json.loads(json.dumps(cursor.get_state())))
    assert restored.next(after) == cursor.next(after)
    assert restored.get_state() == cursor.get_state()


def test_the_order_depends_on_the_seed_and_differs_between_equal_sources():
    first, again, other = (cursor_of([1, 1], sizes=[50, 50], seed=s) for s in (1, 1, 2))
    drawn = first.next(100)
    assert drawn == again.next(100)
    assert drawn != other.next(100)
    numbers = {
        source: [task.task_id[2:] for task in drawn if task.source == source]
        for source in "01"
    }
    assert numbers["0"] != numbers["1"]


def test_a_state_of_another_mixture_is_refused():
    state = cursor_of([2, 1]).get_state()
    with pytest.raises(DataError, match="weights that the run began with"):
        cursor_of([1, 1]).set_state(state)
    with pytest.raises(DataError, match="3 tasks, the data holds 4"):
        cursor_of([2, 1], sizes=[4, 3]).set_state(state)


@pytest.mark.parametrize(
    ("sources", "weights", "message"),
    [
        ([], None, "at least one source"),
        (["a", "b"], [1], "1 numbers for 2 sources"),
        (["a", "b"], [1, 0], "must be positive"),
        (["a", "b"], [1, float("inf")], "must be positive"),
        ([Mixture(["a"])], None, "cannot hold another"),
    ],
)
def test_a_mixture_that_cannot_work_is_refused(sources, weights, message):
    with pytest.raises(ConfigError, match=message):
        Mixture(sources, weights)
