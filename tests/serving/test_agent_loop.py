import asyncio
from dataclasses import replace
from typing import Any

import pytest

from rllib_arpo.engines.engine import SamplingParams
from rllib_arpo.engines.scripted_engine import ScriptedEngine, ScriptedReply
from rllib_arpo.envs.tool_use_env import ToolUseEnv
from rllib_arpo.errors import ConfigError, ToolError
from rllib_arpo.serving.agent_loop import (
    Agent,
    AnswerLimits,
    AnswerOptions,
    RequestTimeoutError,
    answer,
)
from rllib_arpo.serving.conversation import read_question
from rllib_arpo.serving.engine_client import (
    EngineLostError,
    InProcessEngine,
    TurnEngine,
)
from rllib_arpo.serving.events import (
    Event,
    Finished,
    ToolFinished,
    ToolStarted,
    TurnFinished,
    TurnText,
)
from rllib_arpo.serving.openai_api import InvalidRequestError
from rllib_arpo.serving.scrub import scrub
from rllib_arpo.tools.python import PythonTool
from rllib_arpo.tree import Task
from tests.envs.fake_tools import FakeTool
from tests.serving.scripted_agents import (
    CHAT,
    KINDS,
    ByPlace,
    Kind,
    SlowTool,
    Unreliable,
    call,
    final,
    make_env,
    replies,
    request,
)
from tests.virtual_time import run_virtual

TURNS = [call("tags", "vifel", "look"), final("tags", "44", "read")]


async def events_of(
    env: ToolUseEnv,
    engine: TurnEngine,
    *,
    limits: AnswerLimits | None = None,
    metadata: dict[str, str] | None = None,
    stop: tuple[str, ...] = (),
    **options: Any,
) -> list[Event]:
    agent = Agent(env=env, limits=limits or AnswerLimits(), stream_interval=1)
    question = read_question(request(metadata=metadata), env, task_id="r")
    sampling = SamplingParams(stop=stop)
    wanted = AnswerOptions(request_id="r", seed=1, sampling=sampling, **options)
    return [event async for event in answer(question, agent, engine, wanted)]


def run(env: ToolUseEnv, turns: list[str], **options: Any) -> list[Event]:
    engine = InProcessEngine(ScriptedEngine(ByPlace(env, turns)))
    return run_virtual(events_of(env, engine, **options))


def finished(events: list[Event]) -> Finished:
    assert isinstance(events[-1], Finished)
    return events[-1]


def texts(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, TurnText))


# The loop


def test_every_turn_reads_all_tokens_before_it_as_they_were_sampled():
    env = make_env()
    engine = ScriptedEngine(ByPlace(env, TURNS))
    run_virtual(events_of(env, InProcessEngine(engine)))
    first, second = engine.requests
    turn = env.dialogue.model_ids(TURNS[0]).tolist()
    result = env.dialogue.result_ids("vifel 44", env.max_result_tokens).ids.tolist()
    prompt = first.prompt_token_ids.tolist()
    assert second.prompt_token_ids.tolist() == [*prompt, *turn, *result]
    assert first.seed != second.seed
    assert first.request_id != second.request_id


def test_a_tool_is_announced_before_it_runs():
    tool = FakeTool("vifel 44")
    env = make_env(tool)

    async def started() -> tuple[ToolStarted, list[str]]:
        engine = InProcessEngine(ScriptedEngine(ByPlace(env, TURNS)))
        question = read_question(request(), env, task_id="r")
        options = AnswerOptions(request_id="r", seed=1)
        events = answer(question, Agent(env=env), engine, options)
        async for event in events:
            if isinstance(event, ToolStarted):
                await events.aclose()
                return event, tool.calls
        raise AssertionError("no tool was started")

    event, calls = run_virtual(started())
    assert (event.name, event.arguments, event.turn) == ("search", "vifel", 0)
    assert calls == []


def test_a_refused_call_is_finished_but_never_started():
    env = make_env(dialogue="chat_template")
    bad = '<think>\nt\n</think>\n\n<tool_call>\n{"name": "no"}\n</tool_call>'
    events = run(env, [bad, final("chat_template", "44")])
    assert not [event for event in events if isinstance(event, ToolStarted)]
    (refused,) = [event for event in events if isinstance(event, ToolFinished)]
    assert refused.call.status == "refused"
    assert "there is no tool named no" in refused.result
    assert finished(events).answer == "44"


def test_the_pattern_environment_is_never_changed():
    env = make_env()
    before = (env.dialogue, env.max_response_tokens, env.max_tool_calls)
    limits = AnswerLimits(max_response_tokens=200, max_tool_calls=1)
    assert finished(run(env, TURNS, limits=limits)).answer == "44"
    assert (env.dialogue, env.max_response_tokens, env.max_tool_calls) == before


# Limits


def test_the_clients_token_budget_ends_the_answer_in_the_middle_of_a_turn():
    env = make_env()
    first = len(env.dialogue.model_ids(TURNS[0]))
    events = run(env, TURNS, max_tokens=first + 3)
    last = finished(events)
    assert (last.reason, last.end, last.answer) == ("length", "length", None)
    assert last.usage.completion_tokens == first + 3


def test_a_tool_does_not_run_when_the_model_could_not_read_its_result():
    tool = FakeTool("vifel 44")
    env = make_env(tool)
    first = len(env.dialogue.model_ids(TURNS[0]))
    events = run(env, TURNS, max_tokens=first)
    assert (finished(events).reason, tool.calls) == ("length", [])
    assert isinstance(events[-2], TurnFinished)


def test_the_agents_caps_hold_besides_those_of_the_environment():
    tool = FakeTool("vifel 44")
    env = make_env(tool, max_tool_calls=5)
    turns = [TURNS[0], TURNS[0], TURNS[1]]
    events = run(env, turns, limits=AnswerLimits(max_tool_calls=1))
    calls = [event.call.status for event in events if isinstance(event, ToolFinished)]
    assert calls == ["ok", "refused"]
    assert len(tool.calls) == 1
    short = run(env, turns, limits=AnswerLimits(max_response_tokens=5))
    assert finished(short).usage.completion_tokens == 5
    assert finished(short).reason == "length"


def test_a_prompt_that_fills_the_context_is_refused():
    env = make_env()
    nothing = ScriptedReply(token_ids=[], finish_reason="length")
    engine = InProcessEngine(ScriptedEngine([nothing]))
    with pytest.raises(InvalidRequestError, match="fill the model's context") as caught:
        run_virtual(events_of(env, engine))
    assert caught.value.code == "context_length_exceeded"
    assert caught.value.param == "messages"


def test_the_time_of_a_request_ends_the_tool_at_work():
    async def late() -> bool:
        tool = SlowTool()
        env = make_env(tool, tool_timeout_s=1000.0)
        engine = InProcessEngine(ScriptedEngine(ByPlace(env, TURNS)))
        with pytest.raises(RequestTimeoutError, match="after 60 seconds"):
            await events_of(env, engine, limits=AnswerLimits(max_request_s=60))
        await tool.cancelled.wait()
        return asyncio.get_running_loop().time() == 60

    assert run_virtual(late())


def test_the_time_of_a_request_ends_a_slow_generation():
    env = make_env()
    slow = ScriptedReply(token_ids=[1] * 50, delay_s=10.0)
    engine = InProcessEngine(ScriptedEngine([slow]))
    with pytest.raises(RequestTimeoutError, match="after 60 seconds"):
        run_virtual(
            events_of(env, engine, limits=AnswerLimits(max_request_s=60), live=True)
        )


# Stop texts of the client


@pytest.mark.parametrize("live", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_stop_text_ends_the_answer_and_is_cut_from_it(kind: Kind, live: bool):
    env = make_env(dialogue=kind)
    before = final(kind, "44", "one")[: len("<think>\none")]
    written = before + " two STOP th"
    engine = InProcessEngine(ScriptedEngine(replies_as_they_are(env, written)))
    events = run_virtual(events_of(env, engine, stop=("STOP",), live=live))
    last = finished(events)
    assert (last.reason, last.end, last.answer) == ("stop", "no_answer", None)
    assert texts(events) == before + " two "
    (report,) = [event.report for event in events if isinstance(event, TurnFinished)]
    assert report.text == before + " two "


def replies_as_they_are(env: ToolUseEnv, text: str) -> list[ScriptedReply]:
    ids = env.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    return [ScriptedReply(token_ids=ids)]


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_that_a_stop_text_cuts_is_what_stands_before_it(kind: Kind):
    env = make_env(dialogue={"type": kind, "require_boxed": False})
    text = "four and four" if kind == "tags" else "\n\nfour and four"
    opened = "<think>t</think>" + ("<answer>" if kind == "tags" else "")
    engine = InProcessEngine(ScriptedEngine(replies_as_they_are(env, opened + text)))
    events = run_virtual(events_of(env, engine, stop=(" and",)))
    assert (finished(events).answer, finished(events).end) == ("four", "answer")


# Lost engines and new weights


@pytest.mark.parametrize("failed", [0, 1])
def test_a_turn_that_nobody_saw_is_asked_for_again_with_the_same_seed(failed: int):
    env = make_env()
    engine = Unreliable(ScriptedEngine(ByPlace(env, TURNS)), [1 << 30] * failed + [0])
    events = run_virtual(events_of(env, engine, live=True))
    assert finished(events).answer == "44"
    lost, again = engine.requests[failed : failed + 2]
    assert lost.seed == again.seed
    assert lost.prompt_token_ids.tolist() == again.prompt_token_ids.tolist()
    assert lost.request_id != again.request_id


def test_a_streamed_turn_that_was_seen_is_not_written_twice():
    env = make_env()
    engine = Unreliable(ScriptedEngine(ByPlace(env, TURNS)), [3])
    with pytest.raises(EngineLostError, match="replica is gone"):
        run_virtual(events_of(env, engine, live=True))
    assert len(engine.requests) == 1


def test_an_answer_in_one_piece_survives_a_loss_in_the_middle_of_a_turn():
    async def lost_in_the_middle() -> tuple[list[Event], int]:
        env = make_env()
        turns = replies(env, TURNS)

        class InPieces:
            """As `ByPlace`, but in chunks of one token whatever is asked for."""

            async def generate(self, asked: Any, *, version: str | None = None):
                whole = ScriptedEngine([turns[int(asked.request_id.split("/")[2])]])
                small = replace(asked, stream_interval=1)
                async for tokens in whole.generate(small):
                    yield tokens

        pieces = InPieces()
        engine = Unreliable(pieces, [3])  # type: ignore[arg-type]
        events = await events_of(env, engine)
        return events, len(engine.requests)

    events, asked = run_virtual(lost_in_the_middle())
    assert finished(events).answer == "44"
    assert texts(events) == TURNS[0] + TURNS[1]
    assert asked == 3


def test_an_engine_that_stays_lost_is_given_up():
    env = make_env()
    engine = Unreliable(ScriptedEngine(ByPlace(env, TURNS)), [0] * 9)
    with pytest.raises(EngineLostError):
        run_virtual(events_of(env, engine))
    assert len(engine.requests) == 3


def test_later_turns_ask_for_the_version_that_began_the_answer():
    env = make_env()
    engine = Unreliable(ScriptedEngine(ByPlace(env, TURNS)), versions=["v7"])
    assert finished(run_virtual(events_of(env, engine))).version == "v7"
    assert engine.asked_versions == [None, "v7"]


def test_an_answer_is_never_written_by_two_versions():
    env = make_env()
    engine = Unreliable(ScriptedEngine(ByPlace(env, TURNS)), versions=["v1", "v2"])
    with pytest.raises(EngineLostError, match=r"'v1'.*'v2'"):
        run_virtual(events_of(env, engine))


def test_a_version_that_is_gone_is_not_asked_for_again():
    async def gone() -> int:
        env = make_env()
        scripted = ScriptedEngine(ByPlace(env, TURNS))
        engine = InProcessEngine(scripted, version="v1")
        tool = FakeTool("vifel 44")

        class Swap(FakeTool):
            async def call(self, arguments: str) -> str:
                engine.version = "v2"
                return await tool.call(arguments)

        swapping = make_env(Swap("x"))
        with pytest.raises(EngineLostError, match="ask again"):
            await events_of(swapping, engine)
        return len(scripted.requests)

    assert run_virtual(gone()) == 1


# What clients are shown of failures


def test_errors_of_tools_are_shown_without_what_they_tell_of_the_server():
    tool = FakeTool(ToolError("cannot open /home/ada/keys/secret.txt today"))
    env = make_env(tool)
    events = run(env, TURNS)
    (shown,) = [event for event in events if isinstance(event, ToolFinished)]
    assert shown.call.status == "error"
    assert shown.result == "Error: cannot open [removed] today"
    report = next(e.report for e in events if isinstance(e, TurnFinished))
    assert report.tool_result == shown.result


def test_the_model_reads_no_more_of_a_failed_call_than_clients():
    env = make_env(FakeTool(ToolError("cannot open /home/ada/keys/secret.txt")))
    engine = ScriptedEngine(ByPlace(env, TURNS))
    run_virtual(events_of(env, InProcessEngine(engine)))
    read = env.dialogue.decode(engine.requests[1].prompt_token_ids)[0]
    assert "Error: cannot open [removed]" in read
    assert "ada" not in read


def test_an_unexpected_exception_of_a_tool_shows_its_type_alone():
    env = make_env(FakeTool(RuntimeError("/home/ada/x.py broke")))
    events = run(env, TURNS)
    (shown,) = [event for event in events if isinstance(event, ToolFinished)]
    assert shown.result == "Error: the search tool failed (RuntimeError)."


def test_a_mistake_in_python_code_shows_no_place_of_the_server():
    env = make_env(PythonTool())
    turns = ["<think>t</think><python>1 / 0</python>", TURNS[1]]
    events = run_real(env, turns)
    (shown,) = [event for event in events if isinstance(event, ToolFinished)]
    assert "ZeroDivisionError" in shown.result
    assert "Traceback" not in shown.result


def run_real(env: ToolUseEnv, turns: list[str]) -> list[Event]:
    engine = InProcessEngine(ScriptedEngine(ByPlace(env, turns)))
    return asyncio.run(events_of(env, engine))


def test_results_of_tools_that_worked_are_shown_as_they_are():
    env = make_env(FakeTool("see /home/ada/notes.txt"))
    (shown,) = [e for e in run(env, TURNS) if isinstance(e, ToolFinished)]
    assert shown.result == "see /home/ada/notes.txt"


def tools_of(task: Task) -> list[FakeTool]:
    if task.metadata.get("room") == "0":
        raise ConfigError("`room` must be above 0")
    return [FakeTool(f"room {int(task.metadata['room'])}")]


@pytest.mark.parametrize("metadata", [None, {"room": "x"}, {"room": "0"}])
def test_metadata_that_the_tools_cannot_use_is_the_clients_fault(metadata: Any):
    env = make_env(tools=tools_of, tool_names=("search",))
    with pytest.raises(InvalidRequestError, match="metadata") as caught:
        run(env, TURNS, metadata=metadata)
    assert caught.value.param == "metadata"
    (shown,) = [
        event
        for event in run(env, TURNS, metadata={"room": "7"})
        if isinstance(event, ToolFinished)
    ]
    assert shown.result == "room 7"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (
            "Error: no file '/var/lib/my data/x.db' here",
            "Error: no file [removed] here",
        ),
        ("Error: ~/.ssh/id_rsa is missing", "Error: [removed] is missing"),
        (r"Error: C:\Users\ada\x.txt", "Error: [removed]"),
        ("Error: file:///opt/x", "Error: [removed]"),
        ("Error: /etc is closed", "Error: [removed] is closed"),
        (
            'Error: Traceback (most recent call last): File "/a/b.py", line 3, in f '
            "g() ValueError: bad /srv/data/x",
            "Error: ValueError: bad [removed]",
        ),
        (
            "Error: http://ada:pw@host/a/b failed",
            "Error: http://[removed]@host/a/b failed",
        ),
        (
            "Error: https://host/a?api_key=abc&q=1",
            "Error: https://host/a?api_key=[removed]&q=1",
        ),
        ("Error: 3/4 and/or 1 / 2 of https://host/a/b", None),
        ("Error: 12 tool calls are used. Give the answer.", None),
    ],
)
def test_scrub_takes_out_what_tells_of_the_server(text: str, shown: str | None):
    assert scrub(text) == (text if shown is None else shown)


def test_scrub_takes_out_the_values_of_secret_variables(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv("SEARCH_API_KEY", "sk-12345678")
    assert scrub("Error: 401 for sk-12345678") == "Error: 401 for [removed]"


def test_the_chat_template_opens_no_thoughts_that_the_model_did_not_think():
    env = make_env(dialogue={"type": "chat_template", "require_think": False})
    assert env.tokenizer is CHAT
    events = run(env, ["\\boxed{44}"])
    assert finished(events).answer == "44"
    assert texts(events) == "\\boxed{44}"
