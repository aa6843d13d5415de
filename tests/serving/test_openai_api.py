from typing import Any

import pytest
from pydantic import ValidationError

from rllib_arpo.serving.openai_api import (
    AgentTrace,
    AssistantMessage,
    ChatCompletionRequest,
    ReplyMessage,
    field_of,
)
from tests.serving.scripted_agents import USER


def problems(**fields: Any) -> dict[str, str]:
    """Messages of what is wrong with a request, by field."""
    body = {"model": "m", "messages": [USER], **fields}
    try:
        ChatCompletionRequest.model_validate(body)
    except ValidationError as error:
        return {field_of(one["loc"]): one["msg"] for one in error.errors()}
    return {}


def function(**fields: Any) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": "f", **fields}}]


def nested(depth: int) -> dict[str, Any]:
    inner: dict[str, Any] = {}
    for _ in range(depth):
        inner = {"a": inner}
    return inner


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("logprobs", True),
        ("top_logprobs", 3),
        ("presence_penalty", 0.5),
        ("frequency_penalty", -1),
        ("logit_bias", {"5": 1.0}),
        ("response_format", {"type": "json_object"}),
        ("modalities", ["audio"]),
        ("audio", {"voice": "a"}),
        ("store", True),
        ("prediction", {}),
        ("reasoning_effort", "high"),
        ("verbosity", "low"),
        ("web_search_options", {}),
        ("functions", []),
        ("function_call", "auto"),
        ("service_tier", "flex"),
        ("tool_choice", "required"),
        ("tool_choice", {"type": "function", "function": {"name": "f"}}),
    ],
)
def test_what_would_change_the_answer_and_cannot_is_refused_by_name(
    field: str, value: Any
):
    assert list(problems(**{field: value})) == [field]
    assert problems(**{field: value})[field].startswith("not supported: ")


@pytest.mark.parametrize(
    "fields",
    [
        {"logprobs": False, "top_logprobs": None, "logit_bias": {}},
        {"presence_penalty": 0, "frequency_penalty": 0.0},
        {"response_format": {"type": "text"}, "modalities": ["text"]},
        {"user": "u", "safety_identifier": "s", "prompt_cache_key": "k"},
        {"store": False, "service_tier": "auto", "parallel_tool_calls": True},
        {"stop": "a"},
        {"stop": ["a", "b"]},
        {"temperature": 1, "top_p": 1, "n": 2, "seed": -1, "max_tokens": 5},
        {"stream": True, "stream_options": {"include_usage": True}},
        {"tools": function(), "tool_choice": "auto"},
        {"tools": function(strict=True)},
        {
            "tools": function(
                parameters={"properties": {}, "additionalProperties": False}
            )
        },
        {"metadata": {"room": "7"}},
        {"messages": [USER, {"role": "assistant", "refusal": None, "annotations": []}]},
    ],
)
def test_what_changes_nothing_or_can_be_done_is_accepted(fields: dict[str, Any]):
    assert problems(**fields) == {}


@pytest.mark.parametrize(
    ("fields", "place"),
    [
        ({"unknown": 1}, "unknown"),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 17}, "n"),
        ({"n": True}, "n"),
        ({"seed": 2**63}, "seed"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": [""]}, "stop.0"),
        ({"stream": 1}, "stream"),
        ({"logprobs": 0}, "logprobs"),
        ({"presence_penalty": False}, "presence_penalty"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"messages": []}, "messages"),
        ({"messages": [5]}, "messages.0"),
        ({"messages": [{"role": "function", "content": "a"}]}, "messages.0"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages.0.content"),
        ({"messages": [{**USER, "extra": 1}]}, "messages.0.extra"),
        ({"tools": function(name="a b")}, "tools.0.function.name"),
        ({"tools": function(strict="yes")}, "tools.0.function.strict"),
        (
            {"tools": function(parameters={"properties": {"a": nested(40)}})},
            "tools.0.function.parameters",
        ),
    ],
)
def test_malformed_requests_name_the_field(fields: dict[str, Any], place: str):
    assert list(problems(**fields)) == [place]


def test_images_are_refused_where_they_stand():
    image = {"type": "image_url", "image_url": {"url": "x"}}
    messages = [{"role": "user", "content": [{"type": "text", "text": "a"}, image]}]
    wrong = problems(messages=messages)
    assert "messages hold text" in wrong["messages.0.content.1.type"]


def test_alternatives_are_left_out_of_the_name_of_a_field():
    assert field_of(("body", "messages", 0, "@user", "content")) == "messages.0.content"
    assert field_of(("stop", "@list", 1)) == "stop.1"


def test_the_reply_can_be_sent_back_as_a_message():
    reply = ReplyMessage(content="44", agent=AgentTrace(turns=[], answer="44"))
    back = AssistantMessage.model_validate(reply.model_dump())
    assert (back.content, back.agent) == ("44", reply.agent)
