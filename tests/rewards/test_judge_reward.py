import asyncio
import pickle
import threading

import pytest

from rllib_arpo.envs.tool_use_env import ToolUseEnv
from rllib_arpo.errors import RewardError
from rllib_arpo.rewards.judge import Judge
from rllib_arpo.rewards.judge_reward import JudgeReward
from rllib_arpo.rewards.reward import score
from rllib_arpo.tree import Message, Task, ToolCall, Trajectory, Turn
from tests.envs.fake_tools import FakeTool
from tests.rewards.judge_server import Reply, endpoint, verdicts
from tests.tokenizers import qwen_like

YES = '{"verdict": "correct"}'
NO = '{"verdict": "incorrect"}'
BOTH = ("search", "python")


def trajectory(
    answer="the capital of Austria", *, tools=(), ability="qa", gold="Vienna"
):
    calls = [ToolCall(name=name, arguments="x", status="ok") for name in tools]
    return Trajectory(
        task=Task(
            task_id="t7",
            messages=(Message(role="user", content="Where?"),),
            answers=(gold,),
            ability=ability,
        ),
        turns=(*(Turn(text="", tool_call=call) for call in calls), Turn(text="")),
        answer=answer,
    )


@pytest.fixture
def served():
    """An endpoint; tests set `reply_to`."""
    with endpoint(verdicts(YES)) as running:
        yield running


@pytest.fixture
def judge(served):
    with Judge("m", base_url=served.base_url, api_key_env=None, max_asks=1) as one:
        yield one


def test_the_verdict_takes_the_place_of_the_answer_check(served, judge):
    reward_fn = JudgeReward(judge=judge)
    assert score(reward_fn, trajectory(tools=BOTH)) == (
        pytest.approx(1.1),
        {"accuracy": 1.0, "format": 0.0, "multi_tool_bonus": 0.1},
    )
    served.reply_to = verdicts(NO)
    assert score(reward_fn, trajectory("Vienna", tools=BOTH))[0] == 0.0
    assert '"Where?"' in served.requests[0]["messages"][1]["content"]


def test_a_broken_format_and_other_abilities_do_not_ask(served, judge):
    reward_fn = JudgeReward(judge=judge)
    assert score(reward_fn, trajectory(None))[0] == -1.0
    right = trajectory("0.5", gold="1/2", ability="math")
    assert score(reward_fn, right)[0] == 1.0
    assert served.requests == []


def test_an_unjudged_answer_is_an_error_or_checked_by_rule(served, judge):
    served.reply_to = verdicts("Well...")
    with pytest.raises(RewardError, match="gave no verdict"):
        score(JudgeReward(judge=judge), trajectory("Vienna"))
    by_rule = JudgeReward(judge=judge, on_unjudged="rule")
    assert score(by_rule, trajectory("Vienna"))[0] == 1.0
    assert score(by_rule, trajectory("Rome"))[0] == 0.0


def test_it_travels_to_other_processes(judge):
    copy = pickle.loads(pickle.dumps(JudgeReward(judge=judge)))
    assert score(copy, trajectory())[0] == 1.0
    copy.judge.close()


def test_it_is_asked_from_an_environment_whose_other_paths_go_on(served, judge):
    env = ToolUseEnv(
        {
            "tokenizer": qwen_like(),
            "tools": [FakeTool("Vienna")],
            "reward_fn": JudgeReward(judge=judge, tools=("search",)),
        }
    )
    env.reset(options={"task": trajectory().task})
    env.step(env.dialogue.model_ids("<think>t</think><search> x </search>"))
    last = env.dialogue.model_ids(r"<think>t</think><answer>\boxed{Wien}</answer>")

    async def finish_while_the_judge_waits() -> dict[str, float]:
        loop_is_free = threading.Event()

        def reply_to(_: object) -> Reply:
            assert loop_is_free.wait(60)
            return Reply(YES)

        served.reply_to = reply_to
        step = asyncio.create_task(env.step_async(last))
        while not served.requests:
            await asyncio.sleep(0)
        loop_is_free.set()
        *_, info = await step
        return info["reward_parts"]

    assert asyncio.run(finish_while_the_judge_waits()) == {
        "accuracy": 1.0,
        "format": 0.0,
        "multi_tool_bonus": 0.1,
    }
