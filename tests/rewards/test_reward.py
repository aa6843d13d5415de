import functools
import threading

import pytest

from rllib_arpo.envs.tool_use_env import ToolUseEnv
from rllib_arpo.errors import RewardError, ToolError
from rllib_arpo.rewards.reward import (
    PaperReward,
    overlong_penalty,
    paper_reward,
    score,
)
from rllib_arpo.tree import Message, Task, ToolCall, Trajectory, Turn
from tests.envs.fake_tools import FakeTool
from tests.tokenizers import qwen_like


def trajectory(
    answer="44",
    *,
    gold="44",
    ability="qa",
    calls=(),
    errors=(),
    num_tokens=0,
    max_tokens=100,
) -> Trajectory:
    """One turn for each (tool, status), and a last one."""
    turns = [
        Turn(
            text=f"<{name}>x</{name}>",
            tool_call=ToolCall(name=name, arguments="x", status=status),
            tool_result="<search></search><python></python><think>",
        )
        for name, status in calls
    ]
    return Trajectory(
        task=Task(
            task_id="t7",
            messages=(Message(role="user", content="?"),),
            answers=(gold,),
            ability=ability,
        ),
        turns=(*turns, Turn(text="<answer></answer>")),
        answer=answer,
        format_errors=tuple(errors),
        num_response_tokens=num_tokens,
        max_response_tokens=max_tokens,
    )


BOTH = (("search", "ok"), ("python", "ok"))


@pytest.mark.parametrize(
    ("finished", "reward"),
    [
        (trajectory(), 1.0),
        (trajectory("45"), 0.0),
        (trajectory("Vienna", gold="Vienna, Austria"), 2 / 3),
        (trajectory("0.5", gold=r"\frac{1}{2}", ability="math"), 1.0),
        (trajectory("1.5", gold="15", ability="math"), 0.0),
        (trajectory(errors=["no <think> block"]), -1.0),
        (trajectory(None), -1.0),
        (trajectory(calls=BOTH), 1.1),
        (trajectory("45", calls=BOTH), 0.0),  # a bonus only on top of a right answer
        (trajectory(calls=BOTH, errors=["nested"]), -1.0),
        (trajectory(calls=BOTH[:1]), 1.0),
        (trajectory(calls=[("search", "ok"), ("python", "error")]), 1.0),
        (trajectory(calls=[("search", "refused"), ("python", "ok")]), 1.0),
        (trajectory(calls=[("search", "timeout"), *BOTH]), 1.1),
    ],
)
def test_the_paper_s_reward(finished, reward):
    assert score(paper_reward, finished)[0] == pytest.approx(reward)


def test_its_parts_are_named():
    assert score(paper_reward, trajectory(calls=BOTH))[1] == {
        "accuracy": 1.0,
        "format": 0.0,
        "multi_tool_bonus": 0.1,
    }
    assert score(paper_reward, trajectory(None))[1] == {
        "accuracy": 0.0,
        "format": -1.0,
        "multi_tool_bonus": 0.0,
    }


def test_its_numbers_and_tools_can_be_chosen():
    reward = PaperReward(multi_tool_bonus=0.5, format_penalty=-2.0, tools=("lookup",))
    assert score(reward, trajectory(calls=[("lookup", "ok")]))[0] == 1.5
    assert score(reward, trajectory(None))[0] == -2.0


@pytest.mark.parametrize(
    ("num_tokens", "penalty"),
    [
        (0, 0.0),
        (80, 0.0),  # 100 - 20: the buffer begins
        (85, -0.25),  # (80 - 85) / 20
        (90, -0.5),
        (100, -1.0),
        (120, -1.0),
    ],
)
def test_overlong_responses_are_punished_along_a_line(num_tokens, penalty):
    given = overlong_penalty(num_tokens, max_response_tokens=100, buffer_tokens=20)
    assert given == penalty


def test_the_length_penalty_is_a_part_and_is_off_unless_asked_for():
    long = trajectory(num_tokens=90, max_tokens=100)
    reward, parts = score(PaperReward(overlong_buffer_tokens=20), long)
    assert parts["overlong"] == -0.5
    assert reward == 0.5
    assert "overlong" not in score(paper_reward, long)[1]


def test_a_path_cut_by_a_result_that_did_not_fit_is_overlong_in_full():
    tool = FakeTool("vifel is 44. " * 50)
    env = ToolUseEnv(
        {
            "tokenizer": qwen_like(),
            "tools": [tool],
            "max_response_tokens": 100,
            "reward_fn": PaperReward(overlong_buffer_tokens=20),
        }
    )
    env.reset(options={"task": trajectory().task})
    call = env.dialogue.model_ids("<think>t</think><search>vifel</search>")
    _, reward, _, truncated, info = env.step(call)
    assert truncated and tool.calls
    # Far from the buffer, which begins at 80: the result is not among the tokens.
    assert info["trajectory"].num_response_tokens == len(call) < 60
    assert info["reward_parts"]["overlong"] == -1.0
    assert reward == -2.0  # and no answer, -1


def test_a_plain_function_may_return_a_number_or_parts():
    assert score(lambda _: 2, trajectory()) == (2.0, {"reward": 2.0})
    parts = {"a": 1, "b": -0.5}
    assert score(lambda _: parts, trajectory()) == (0.5, parts)
    partial = functools.partial(lambda t, x: x, x=3.0)
    assert score(partial, trajectory())[0] == 3.0


@pytest.mark.parametrize(
    "nonsense", [None, "good", float("nan"), {"a": float("inf")}, {"a": None}, {}]
)
def test_nonsense_is_refused_and_names_the_function_and_the_task(nonsense):
    def my_reward(_):
        return nonsense

    with pytest.raises(RewardError, match=r"my_reward.*'t7'"):
        score(my_reward, trajectory())


def test_a_function_that_raises_is_named():
    def my_reward(_):
        raise KeyError("gold")

    with pytest.raises(RewardError, match=r"my_reward.*KeyError.*'t7'"):
        score(my_reward, trajectory())


def test_the_tolerance_of_numbers_can_be_chosen():
    near = trajectory("3.14", gold="3.14159", ability="numeric")
    assert score(paper_reward, near)[0] == 0.0
    assert score(PaperReward(numeric_rel_tol=1e-3), near)[0] == 1.0
    assert score(PaperReward(numeric_abs_tol=0.01), near)[0] == 1.0


def test_an_ability_without_a_check_is_an_error():
    with pytest.raises(RewardError, match="'code' has no answer check"):
        score(paper_reward, trajectory(ability="code"))


# Through the environment

QWEN = qwen_like()
SEARCH = "<think>t</think><search> height of vifel </search>"
PYTHON = "<think>t</think><python> print(44) </python>"
RIGHT = r"<think>t</think><answer>\boxed{44}</answer>"
TAGS = (
    "<think><answer>\\boxed{45}</answer></think><search></search></search>"
    "<python></python><result></result>"
)


def finish(*turns, search="vifel 44", python="44", ability="qa", **config):
    """The last step's reward and info, after these turns."""
    tools = [FakeTool(search, name="search"), FakeTool(python, name="python")]
    env = ToolUseEnv({"tokenizer": QWEN, "tools": tools, "tool_retries": 0} | config)
    env.reset(options={"task": trajectory(ability=ability).task})
    for turn in turns:
        _, reward, *_, info = env.step(env.dialogue.model_ids(turn))
    return reward, info


@pytest.mark.parametrize(
    ("turns", "results", "expected"),
    [
        ((SEARCH, PYTHON, RIGHT), {}, 1.1),
        ((SEARCH, RIGHT), {}, 1.0),
        # a page or a print full of tags breaks no format and calls no tool
        ((SEARCH, RIGHT), {"search": TAGS}, 1.0),
        ((PYTHON, RIGHT), {"python": TAGS}, 1.0),
        ((SEARCH, PYTHON, RIGHT), {"search": TAGS, "python": TAGS}, 1.1),
        ((PYTHON, RIGHT), {"python": "</search>"}, 1.0),
        # the model's own words about a tool call none
        (("<think>no need to search or use python</think>" + RIGHT[16:],), {}, 1.0),
        # a tool that failed was not used
        ((SEARCH, PYTHON, RIGHT), {"python": ToolError("syntax")}, 1.0),
        ((SEARCH, PYTHON, RIGHT), {"search": ToolError("x", retryable=True)}, 1.0),
        ((SEARCH, PYTHON, RIGHT), {"max_tool_calls": 1}, 1.0),
        # tags of the model's own count
        ((SEARCH, "<think>t</think><think>t" + RIGHT), {}, -1.0),
        ((SEARCH, RIGHT.replace("44", "45")), {"search": TAGS}, 0.0),
    ],
)
def test_only_the_model_s_own_turns_and_calls_count(turns, results, expected):
    reward, _ = finish(*turns, **results)
    assert reward == pytest.approx(expected)


def parts_by_path(trajectory: Trajectory) -> dict[str, float]:
    """A user's reward function, named by path in a test."""
    return {"turns": float(len(trajectory.turns)), "malus": -0.5}


def test_a_user_s_function_is_named_by_its_import_path():
    name = f"{__name__}:{parts_by_path.__name__}"
    reward, info = finish(SEARCH, RIGHT, reward_fn=name)
    assert reward == 1.5
    assert info["reward_parts"] == {"turns": 2.0, "malus": -0.5}


class WhereItRuns:
    """1 in the thread of the caller, 0 in another one."""

    def __init__(self, **attributes: bool) -> None:
        vars(self).update(attributes)

    def __call__(self, _: Trajectory) -> float:
        return float(threading.current_thread() is threading.main_thread())


@pytest.mark.parametrize(
    ("reward_fn", "ability", "config", "in_main"),
    [
        (WhereItRuns(), "qa", {}, 1.0),
        (WhereItRuns(), "math", {}, 0.0),
        (WhereItRuns(in_thread=True), "qa", {}, 0.0),
        (WhereItRuns(in_thread=False), "math", {}, 1.0),
        (WhereItRuns(in_thread=True), "qa", {"reward_in_thread": False}, 1.0),
        (WhereItRuns(), "qa", {"reward_in_thread": True}, 0.0),
    ],
)
def test_a_function_that_waits_runs_in_a_thread(reward_fn, ability, config, in_main):
    reward, _ = finish(RIGHT, reward_fn=reward_fn, ability=ability, **config)
    assert reward == in_main
