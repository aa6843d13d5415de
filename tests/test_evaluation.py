from collections.abc import Iterator
from pathlib import Path

import pytest

from rllib_arpo import ARPO, Message, Task
from rllib_arpo.cli_config import config_of_flags
from rllib_arpo.engines.engine import SamplingParams
from rllib_arpo.errors import ToolError, ToolOutageError
from rllib_arpo.evaluation import answer_tasks, evaluate
from rllib_arpo.predictions import Prediction, Wanted
from rllib_arpo.tools.python import PythonTool
from tests.tiny_runs import running
from tests.writer_model import save_writer

SAMPLING = SamplingParams(temperature=0.6, top_p=0.95)


class BrokenTool(PythonTool):
    async def call(self, arguments: str) -> str:
        raise ToolError("the machine is gone", retryable=True)


def tasks(count: int) -> list[Task]:
    return [
        Task(
            task_id=f"t/{number}",
            messages=(Message(role="user", content=f"{number} + 1?"),),
            answers=("2",),
        )
        for number in range(count)
    ]


def wanted(num_tasks: int = 3, seeds: int = 2, samples: int = 3) -> list[Wanted]:
    return [
        Wanted(task=task, seed=seed, sample=sample)
        for task in tasks(num_tasks)
        for seed in range(seeds)
        for sample in range(samples)
    ]


def without_times(predictions: list[Prediction]) -> list[tuple]:
    return [
        (
            one.key,
            one.answer,
            one.tool_limit,
            one.num_model_tokens,
            [(turn.text, turn.tool_result) for turn in one.turns],
        )
        for one in predictions
    ]


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_writer(tmp_path_factory.mktemp("evaluation") / "writer")


def config_of(writer: Path, **env_config):
    config = config_of_flags(
        data=None,
        model=str(writer),
        corpus=None,
        max_response_tokens=512,
        max_tool_calls=1,
        num_env_runners=0,
        seed=0,
    )
    return config.environment(env_config=env_config)


@pytest.fixture(scope="module")
def algorithm(writer: Path, ray_session: None) -> Iterator[ARPO]:
    with running(config_of(writer)) as algorithm:
        yield algorithm


@pytest.fixture(scope="module")
def answers(algorithm: ARPO) -> list[Prediction]:
    (only,) = answer_tasks(algorithm, wanted(), sampling=SAMPLING)
    return only


def test_answers_come_in_the_order_in_which_they_are_wanted(answers):
    assert [one.key for one in answers] == [one.key for one in wanted()]
    assert {one.answer for one in answers} == {"2", "3 bears"}


def test_an_answer_does_not_depend_on_what_else_is_asked_for(algorithm, answers):
    parts = [*answer_tasks(algorithm, wanted(), sampling=SAMPLING, at_once=5)]
    assert [len(part) for part in parts] == [5, 5, 5, 3]
    together = [one for part in parts for one in part]
    assert without_times(together) == without_times(answers)
    (alone,) = answer_tasks(algorithm, wanted()[7:8], sampling=SAMPLING)
    assert without_times(alone) == without_times(answers[7:8])


def test_calls_after_the_environments_limit_are_known_as_such(answers):
    limited = [one for one in answers if one.tool_limit]
    assert limited
    for one in answers:
        assert len(one.tool_calls) <= 1
        refused = [t.tool_call for t in one.turns if t.tool_call][1:]
        assert one.tool_limit == bool(refused)


def test_sampling_follows_its_settings(algorithm, writer):
    greedy = SamplingParams(temperature=0.0)
    (found,) = answer_tasks(algorithm, wanted(), sampling=greedy)
    assert {one.answer for one in found} == {"2"}
    # A nucleus so small holds the most likely token alone.
    trees = evaluate(algorithm, tasks(2), top_p=0.01, num_samples=4).trees
    assert {leaf.answer for tree in trees for leaf in tree.leaves} == {"2"}


def test_answers_given_while_tools_were_out_are_not_kept(writer, ray_session):
    config = config_of(writer, tools=[BrokenTool()], tool_retry_delay_s=0.0)
    with (
        running(config) as algorithm,
        pytest.raises(ToolOutageError, match=r"tool calls failed or timed out"),
    ):
        next(answer_tasks(algorithm, wanted(20), sampling=SAMPLING))
