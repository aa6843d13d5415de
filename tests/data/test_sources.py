import copy
import json
import pickle
from pathlib import Path

import pytest

from rllib_arpo import ARPOConfig
from rllib_arpo.data.cursor import TaskCursor
from rllib_arpo.data.data_file import DataFile
from rllib_arpo.data.mixture import Mixture, MixtureCursor
from rllib_arpo.data.sources import make_cursor, resolve_tasks
from rllib_arpo.errors import ConfigError, DataError
from rllib_arpo.runs import Run
from rllib_arpo.tree import Task


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "r.jsonl"
    path.write_text('{"problem": "1 + 1?", "solution": "2"}\n')
    return path


def mapped(file: Path) -> dict:
    return {"path": str(file), "columns": {"answer": "solution"}}


def test_a_mapping_describes_a_file_as_a_data_file_does(file):
    tasks = resolve_tasks(mapped(file), setting="train_tasks")
    assert list(tasks) == list(
        resolve_tasks(DataFile(**mapped(file)), setting="train_tasks")
    )
    assert tasks[0].answers == ("2",)


def test_functions_and_lists_of_tasks_are_sources_too():
    task = Task(task_id="0", messages=(), answers=("x",))
    assert resolve_tasks([task], setting="train_tasks") == [task]
    assert resolve_tasks(lambda: [task], setting="train_tasks") == [task]
    with pytest.raises(DataError, match="`eval_tasks` holds no task"):
        resolve_tasks([], setting="eval_tasks")
    with pytest.raises(DataError, match="`eval_tasks` is None"):
        resolve_tasks(None, setting="eval_tasks")


def test_a_mixture_is_drawn_from_and_a_file_is_walked_over(file):
    task = Task(task_id="0", messages=(), answers=("x",))
    sources = [mapped(file), [task]]
    drawn = [
        make_cursor(mixture, seed=0, setting="train_tasks").next(4)
        for mixture in (
            Mixture(sources, weights=[3, 1]),
            {"sources": sources, "weights": [3, 1]},
        )
    ]
    assert drawn[0] == drawn[1]
    assert sum(t.source == "r" for t in drawn[0]) == 3
    cursor = make_cursor(mapped(file), seed=0, setting="train_tasks")
    assert isinstance(cursor, TaskCursor)
    mixed = make_cursor(Mixture(sources), seed=0, setting="train_tasks")
    assert isinstance(mixed, MixtureCursor)


def test_a_source_that_cannot_work_is_refused(file):
    with pytest.raises(ConfigError, match="`eval_tasks` is a mixture"):
        resolve_tasks(Mixture([str(file)]), setting="eval_tasks")
    with pytest.raises(ConfigError, match="`sources` and `weights`, got"):
        make_cursor({"sources": [file], "weight": [1]}, seed=0, setting="train_tasks")
    with pytest.raises(ConfigError, match="got the keys"):
        resolve_tasks({"file": str(file)}, setting="train_tasks")
    with pytest.raises(DataError, match="row 0, `answer`"):
        make_cursor(Mixture([file]), seed=0, setting="train_tasks")


def test_a_config_with_a_mixture_is_copied_pickled_and_written(file, tmp_path):
    mixture = Mixture([DataFile(**mapped(file)), str(file)], weights=[3, 1])
    config = ARPOConfig().environment(train_tasks=mixture)
    assert copy.deepcopy(config).train_tasks == mixture
    assert pickle.loads(pickle.dumps(mixture)) == mixture
    Run(tmp_path / "run").write_config(config)
    written = json.loads((tmp_path / "run" / "config.json").read_text())
    assert "'answer': 'solution'" in written["train_tasks"]
