import asyncio
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rllib_arpo.engines.engine import SamplingParams
from rllib_arpo.engines.scripted_engine import ScriptedEngine
from rllib_arpo.serving.agent import Agent, AnswerLimits
from rllib_arpo.serving.engine_client import EngineLostError, InProcessEngine
from rllib_arpo.serving.openai_api import (
    ChatCompletion,
    ChatCompletionChunk,
    InvalidRequestError,
    UnknownModelError,
)
from rllib_arpo.serving.service import ChatService
from tests.envs.fake_tools import FakeTool
from tests.serving.scripted_agents import (
    KINDS,
    ByPlace,
    Kind,
    SlowTool,
    Unreliable,
    call,
    final,
    make_env,
    request,
    service,
)


def complete(chat: ChatService, **fields: Any) -> ChatCompletion:
    return asyncio.run(chat.complete(request(**fields)))


def stream(chat: ChatService, **fields: Any) -> list[ChatCompletionChunk]:
    async def run() -> list[ChatCompletionChunk]:
        return [chunk async for chunk in chat.stream(request(**fields))]

    return asyncio.run(run())


def joined(chunks: list[ChatCompletionChunk], index: int = 0) -> dict[str, Any]:
    """What a client puts together of a stream."""
    seen: dict[str, Any] = {"content": "", "reasoning": "", "turns": {}, "tools": []}
    for chunk in chunks:
        for choice in chunk.choices:
            if choice.index != index:
                continue
            delta, event = choice.delta, choice.delta.agent or {}
            seen["content"] += delta.content or ""
            seen["reasoning"] += delta.reasoning_content or ""
            seen["reason"] = choice.finish_reason
            if event.get("type") == "text":
                turn = event["turn"]
                seen["turns"][turn] = seen["turns"].get(turn, "") + event["text"]
            elif event.get("type") == "tool_finished":
                seen["tools"].append((event["name"], event["status"], event["result"]))
    return seen


def told(answer: ChatCompletion, index: int = 0) -> dict[str, Any]:
    """The same of an answer in one piece."""
    choice = answer.choices[index]
    message = choice.message
    calls = [turn.tool_call for turn in message.agent.turns if turn.tool_call]
    return {
        "content": message.content,
        "reasoning": message.reasoning_content or "",
        "turns": {turn.turn: turn.text for turn in message.agent.turns if turn.text},
        "tools": [(one.name, one.status, one.result) for one in calls],
        "reason": choice.finish_reason,
    }


# One answer


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_says_what_every_turn_and_tool_call_did(kind: Kind):
    env = make_env(dialogue=kind)
    turns = [call(kind, "height of vifel", "look"), final(kind, "44", "read")]
    chat, engine = service(env, turns)
    answer = complete(chat)
    (choice,) = answer.choices
    assert (choice.message.content, choice.finish_reason) == ("44", "stop")
    assert choice.message.reasoning_content == "look\n\nread"
    assert choice.message.tool_calls is None
    first, second = choice.message.agent.turns
    assert first.tool_call is not None
    assert first.tool_call.name == "search"
    assert first.tool_call.arguments == "height of vifel"
    assert (first.tool_call.status, first.tool_call.result) == ("ok", "vifel 44")
    assert second.tool_call is None
    assert (first.entropy, second.entropy) == (0.5, 0.5)
    assert (choice.message.agent.end, choice.message.agent.version) == (
        "answer",
        "local",
    )
    sizes = [len(one.prompt_token_ids) for one in engine.requests]
    assert [first.prompt_tokens, second.prompt_tokens] == sizes
    written = first.completion_tokens + second.completion_tokens
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (sizes[0], written)
    assert usage.total_tokens == sizes[0] + written


def test_answers_to_one_request_share_the_prompt_and_sum_what_they_wrote():
    env = make_env()
    chat, engine = service(env, [final("tags", "44")])
    one, three = complete(chat), complete(chat, n=3)
    assert [choice.index for choice in three.choices] == [0, 1, 2]
    assert three.usage.prompt_tokens == one.usage.prompt_tokens
    assert three.usage.completion_tokens == 3 * one.usage.completion_tokens
    seeds = [asked.seed for asked in engine.requests[1:]]
    assert len(set(seeds)) == 3
    assert engine.requests[0].seed in seeds


def test_a_request_without_a_seed_draws_one():
    env = make_env()
    chat, engine = service(env, [final("tags", "44")])
    complete(chat, seed=None)
    complete(chat, seed=None)
    assert engine.requests[0].seed != engine.requests[1].seed


def test_a_request_says_how_to_sample_and_the_agent_what_it_leaves_out():
    env = make_env()
    chat, engine = service(
        env, [final("tags", "44")], sampling=SamplingParams(temperature=0.5, top_k=7)
    )
    complete(chat, top_p=0.9, stop=["x1", "x2"])
    sampling = engine.requests[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.9, 7)
    assert sampling.stop == (*env.stop, "x1", "x2")
    complete(chat, temperature=0.0)
    assert engine.requests[1].sampling.temperature == 0.0


def test_an_unknown_model_is_named_with_those_that_there_are():
    chat, _ = service(make_env(), [])
    with pytest.raises(UnknownModelError, match=r"'gpt'.*\['m'\]") as caught:
        complete(chat, model="gpt")
    assert (caught.value.param, caught.value.code) == ("model", "model_not_found")
    with pytest.raises(UnknownModelError):
        stream(chat, model="gpt")
    assert chat.models() == ["m"]


def test_a_long_conversation_is_read_beside_the_event_loop():
    env = make_env()
    chat, engine = service(env, [final("tags", "44")])
    long = {"role": "user", "content": "vifel " * 5000}
    answer = asyncio.run(chat.complete(request(long)))
    assert answer.choices[0].message.content == "44"
    assert len(engine.requests[0].prompt_token_ids) > 5000


# Streams


TEXT = st.text(st.characters(codec="utf-8", exclude_characters='<>\\{}"'), max_size=12)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    thoughts=st.lists(TEXT, min_size=1, max_size=3),
    answer=TEXT,
    interval=st.integers(1, 7),
    max_tokens=st.none() | st.integers(1, 60),
    n=st.integers(1, 2),
)
def test_a_streams_pieces_join_to_the_whole_answer(
    kind: Kind,
    thoughts: list[str],
    answer: str,
    interval: int,
    max_tokens: int | None,
    n: int,
):
    env = make_env(FakeTool("vifel 44"), dialogue=kind)
    calls = [call(kind, "vifel", thought) for thought in thoughts[1:]]
    turns = [*calls, final(kind, answer, thoughts[0])]
    chat, _ = service(env, turns, stream_interval=interval)
    whole = complete(chat, max_tokens=max_tokens, n=n)
    chunks = stream(chat, max_tokens=max_tokens, n=n)
    for index in range(n):
        assert joined(chunks, index) == told(whole, index)


def test_a_stream_begins_with_the_role_and_ends_with_the_reason():
    chat, _ = service(make_env(), [call("tags", "vifel"), final("tags", "44")])
    chunks = stream(chat)
    first, last = chunks[0].choices[0], chunks[-1].choices[0]
    assert first.delta.role == "assistant"
    assert first.finish_reason is None
    assert (last.finish_reason, last.delta.model_dump()) == ("stop", {})
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (
        len(chunks) - 1
    )
    types = [
        event["type"]
        for chunk in chunks
        if (event := chunk.choices[0].delta.agent) and event["type"] != "text"
    ]
    assert types == ["tool_started", "tool_finished", "turn", "turn", "finished"]


def test_thoughts_are_streamed_while_the_model_thinks():
    thought = "one two three four five six"
    chat, _ = service(make_env(), [final("tags", "44", thought)], stream_interval=1)
    chunks = stream(chat)
    deltas = [chunk.choices[0].delta for chunk in chunks]
    thoughts = [delta.reasoning_content for delta in deltas if delta.reasoning_content]
    assert len(thoughts) > 3
    assert "".join(thoughts) == thought
    places = [i for i, delta in enumerate(deltas) if delta.reasoning_content]
    (content,) = [i for i, delta in enumerate(deltas) if delta.content]
    assert max(places) < content


def test_the_usage_comes_last_and_only_when_it_is_asked_for():
    chat, _ = service(make_env(), [final("tags", "44")])
    whole = complete(chat, n=2)
    chunks = stream(chat, n=2, stream_options={"include_usage": True})
    assert (chunks[-1].choices, chunks[-1].usage) == ([], whole.usage)
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert all(chunk.choices for chunk in stream(chat, n=2))


def test_closing_a_stream_stops_the_tool_at_work():
    async def run() -> bool:
        tool = SlowTool()
        chat, _ = service(make_env(tool), [call("tags", "vifel")])
        chunks = chat.stream(request())
        async for chunk in chunks:
            if (chunk.choices[0].delta.agent or {}).get("type") == "tool_started":
                break
        await tool.started.wait()
        await chunks.aclose()
        await tool.cancelled.wait()
        return tool.cancelled.is_set()

    assert asyncio.run(run())


def test_cancelling_an_answer_stops_the_tool_at_work():
    async def run() -> bool:
        tool = SlowTool()
        chat, _ = service(make_env(tool), [call("tags", "vifel")])
        task = asyncio.create_task(chat.complete(request()))
        await tool.started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await tool.cancelled.wait()
        return tool.cancelled.is_set()

    assert asyncio.run(run())


def test_one_lost_answer_ends_the_others_and_the_request():
    async def run(live: bool) -> bool:
        env, tool = make_env(tool := SlowTool()), tool
        engine = ScriptedEngine(ByPlace(env, [call("tags", "vifel")]))
        lost = Unreliable(engine, [1 << 30, *[0] * 9])
        chat = ChatService({"m": (Agent(env=env), lost)})
        with pytest.raises(EngineLostError, match="replica is gone"):
            if live:
                async for _ in chat.stream(request(n=2)):
                    pass
            else:
                await chat.complete(request(n=2))
        await tool.cancelled.wait()
        return tool.cancelled.is_set()

    assert asyncio.run(run(live=True))
    assert asyncio.run(run(live=False))


def test_what_is_wrong_with_a_request_is_raised_before_the_first_chunk():
    async def run() -> InvalidRequestError:
        chat, _ = service(make_env(), [])
        chunks = chat.stream(request({"role": "system", "content": "s"}))
        with pytest.raises(InvalidRequestError) as caught:
            await anext(chunks)
        return caught.value

    assert asyncio.run(run()).param == "messages"


def test_two_models_answer_each_with_their_own_engine():
    env = make_env()
    engines = {
        name: ScriptedEngine(ByPlace(env, [final("tags", name)])) for name in "ab"
    }
    chat = ChatService(
        {
            name: (Agent(env=env, limits=AnswerLimits()), InProcessEngine(engine))
            for name, engine in engines.items()
        }
    )
    assert complete(chat, model="b").choices[0].message.content == "b"
    assert complete(chat, model="a").choices[0].message.content == "a"
