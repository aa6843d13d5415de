import json

import pytest

from rllib_arpo.serving.events import (
    ClientCall,
    ClientToolCalls,
    Event,
    Finished,
    Thought,
    TokenUsage,
    ToolFinished,
    ToolStarted,
    TurnFinished,
    TurnReport,
    TurnText,
)
from rllib_arpo.serving.replies import ChunkWriter, agent_event, collect, total_usage
from rllib_arpo.tree import ToolCall

CALL = ToolCall(name="search", arguments="vifel", status="ok", latency_s=0.5)
REPORT = TurnReport(
    turn=0,
    text="<think>t</think>",
    prompt_tokens=7,
    completion_tokens=3,
    entropy=0.25,
    latency_s=1.5,
    tool_call=CALL,
    tool_result="44",
)
USAGE = TokenUsage(prompt_tokens=7, completion_tokens=3)
FINISHED = Finished(answer="44", reason="stop", end="answer", usage=USAGE, version="v1")


def written(*events: Event) -> list[dict]:
    writer = ChunkWriter(id="c", created=1, model="m")
    return [
        json.loads(chunk.model_dump_json())
        for event in events
        for chunk in writer.chunks(event, index=0)
    ]


def deltas(*events: Event) -> list[dict]:
    return [chunk["choices"][0]["delta"] for chunk in written(*events)]


@pytest.mark.parametrize(
    ("event", "told"),
    [
        (TurnText(turn=1, text="a"), {"type": "text", "turn": 1, "text": "a"}),
        (
            ToolStarted(turn=0, name="search", arguments="vifel"),
            {"type": "tool_started", "turn": 0, "name": "search", "arguments": "vifel"},
        ),
        (
            ToolFinished(turn=0, call=CALL, result="44"),
            {
                "type": "tool_finished",
                "turn": 0,
                "name": "search",
                "arguments": "vifel",
                "status": "ok",
                "result": "44",
                "latency_s": 0.5,
                "truncated": False,
            },
        ),
        (
            TurnFinished(report=REPORT),
            {
                "type": "turn",
                "turn": 0,
                "prompt_tokens": 7,
                "completion_tokens": 3,
                "entropy": 0.25,
                "latency_s": 1.5,
            },
        ),
        (
            FINISHED,
            {"type": "finished", "answer": "44", "end": "answer", "version": "v1"},
        ),
    ],
)
def test_events_are_told_as_the_agents_extension(event: Event, told: dict):
    assert not isinstance(event, Thought | ClientToolCalls)
    assert agent_event(event) == told
    assert told in [delta.get("agent") for delta in deltas(event)]


def test_a_delta_holds_only_what_is_new():
    assert deltas(Thought(text="a"), FINISHED) == [
        {"role": "assistant"},
        {"reasoning_content": "a"},
        {"content": "44"},
        {"agent": agent_event(FINISHED)},
        {},
    ]
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in written(FINISHED)]
    assert reasons == [None, None, None, "stop"]


def test_calls_of_the_client_are_told_whole():
    call = ClientCall(id="call_1", name="ask", arguments="{}")
    (_, delta) = deltas(ClientToolCalls(calls=(call,)))
    assert delta == {
        "tool_calls": [
            {
                "index": 0,
                "id": "call_1",
                "type": "function",
                "function": {"name": "ask", "arguments": "{}"},
            }
        ]
    }


def test_an_answer_without_thoughts_or_calls_has_none():
    events: list[Event] = [TurnFinished(report=REPORT), FINISHED]
    choice, usage = collect(events, index=2)
    message = choice.message
    assert (choice.index, choice.finish_reason, usage) == (2, "stop", USAGE)
    assert (message.content, message.reasoning_content) == ("44", None)
    assert message.tool_calls is None
    (turn,) = message.agent.turns
    assert turn.tool_call is not None
    assert (turn.tool_call.result, turn.tool_call.latency_s) == ("44", 0.5)


def test_answers_share_the_prompt_in_the_usage():
    # one prompt of 7, two answers of 3 tokens each
    usage = total_usage([USAGE, USAGE])
    counts = (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens)
    assert counts == (7, 6, 13)
