"""The official client of OpenAI's API, as it is, against a real server."""

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from rllib_arpo.serving.access import hash_key
from rllib_arpo.serving.http import make_http_app
from rllib_arpo.serving.http_settings import HttpSettings
from tests.serving.live_server import EndlessEngine, LiveServer
from tests.serving.scripted_agents import USER, call, final, make_env, service

MESSAGES: Any = [USER]
TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a town.",
            "parameters": {
                "type": "object",
                "properties": {"town": {"type": "string"}},
                "required": ["town"],
            },
        },
    }
]
TURNS = [call("tags", "height", "look"), final("tags", "44", "read")]


def of(live: LiveServer, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{live.url}/v1", api_key=key, max_retries=0)


@pytest.fixture(scope="module")
def client() -> Iterator[openai.OpenAI]:
    chat, _ = service(make_env(), TURNS)
    settings = HttpSettings(max_tokens=500)
    with LiveServer(make_http_app(chat, settings)) as live, of(live) as client:
        yield client


def test_models(client: openai.OpenAI):
    assert [model.id for model in client.models.list()] == ["m"]
    assert client.models.retrieve("m").owned_by == "rllib_arpo"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("a/b")


def test_a_completion_keeps_what_the_agent_did(client: openai.OpenAI):
    answer = client.chat.completions.create(model="m", messages=MESSAGES, seed=1)
    (choice,) = answer.choices
    assert (choice.message.content, choice.finish_reason) == ("44", "stop")
    extra = choice.message.model_extra
    assert extra is not None
    assert extra["reasoning_content"] == "look\n\nread"
    assert extra["agent"]["turns"][0]["tool_call"]["result"] == "vifel 44"


def test_a_stream_with_usage(client: openai.OpenAI):
    whole = client.chat.completions.create(model="m", messages=MESSAGES, seed=1)
    with client.chat.completions.create(
        model="m",
        messages=MESSAGES,
        seed=1,
        stream=True,
        stream_options={"include_usage": True},
    ) as stream:
        chunks = list(stream)
    deltas = [one.choices[0] for one in chunks if one.choices]
    assert "".join(one.delta.content or "" for one in deltas) == "44"
    assert deltas[-1].finish_reason == "stop"
    assert chunks[-1].usage == whole.usage


def test_several_answers_and_a_stop_text(client: openai.OpenAI):
    answer = client.chat.completions.create(
        model="m", messages=MESSAGES, seed=1, n=2, stop=["read"]
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    for choice in answer.choices:
        assert choice.message.model_extra is not None
        last = choice.message.model_extra["agent"]["turns"][-1]
        assert last["text"] == "<think>"


def test_a_call_of_the_client_s_tool_and_back():
    turns = ["<think>t</think><weather> vifel </weather>", final("tags", "sunny")]
    chat, engine = service(make_env(), turns)
    with LiveServer(make_http_app(chat, HttpSettings())) as live, of(live) as client:
        first = client.chat.completions.create(
            model="m", messages=MESSAGES, seed=1, tools=TOOLS
        ).choices[0]
        assert first.finish_reason == "tool_calls"
        assert first.message.tool_calls is not None
        (asked,) = first.message.tool_calls
        assert asked.type == "function"
        assert asked.function.name == "weather"
        assert "vifel" in asked.function.arguments
        result = {"role": "tool", "tool_call_id": asked.id, "content": "it is warm"}
        messages: Any = [USER, first.message, result]
        second = client.chat.completions.create(
            model="m", messages=messages, seed=1, tools=TOOLS
        ).choices[0]
    assert (second.message.content, second.finish_reason) == ("sunny", "stop")
    assert len(engine.requests) == 2


class Weather(BaseModel):
    """The weather of a town."""

    town: str
    days: int


def test_a_tool_made_of_a_class_is_called_with_an_object_of_it():
    arguments = '{"town": "vifel", "days": 2}'
    turn = f"<think>t</think><Weather>{arguments}</Weather>"
    chat, _ = service(make_env(), [turn])
    with LiveServer(make_http_app(chat, HttpSettings())) as live, of(live) as client:
        answer = client.chat.completions.parse(
            model="m",
            messages=MESSAGES,
            seed=1,
            tools=[openai.pydantic_function_tool(Weather)],
        )
    (asked,) = answer.choices[0].message.tool_calls or []
    assert asked.function.parsed_arguments == Weather(town="vifel", days=2)


def test_wrong_requests_are_the_client_s_errors(client: openai.OpenAI):
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(model="m", messages=MESSAGES, max_tokens=501)
    assert (wrong.value.param, wrong.value.code) == ("max_tokens", "too_many_tokens")
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="gpt", messages=MESSAGES)
    assert unknown.value.code == "model_not_found"


def test_keys_and_limits_are_the_client_s_errors():
    engine = EndlessEngine()
    settings = HttpSettings(api_key_hashes=(hash_key("key"),), max_concurrent=1)
    app = make_http_app(engine.service(), settings)
    with LiveServer(app) as live, of(live, "key") as client, of(live) as stranger:
        with pytest.raises(openai.AuthenticationError):
            stranger.models.list()
        with client.chat.completions.create(
            model="m", messages=MESSAGES, stream=True
        ) as stream:
            next(iter(stream))
            with pytest.raises(openai.RateLimitError):
                client.chat.completions.create(model="m", messages=MESSAGES)


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_takes_too_long_is_not_asked_for_again(stream: bool):
    engine = EndlessEngine(num_tokens=0)
    app = make_http_app(engine.service(), HttpSettings(max_request_s=0.05))
    with (
        LiveServer(app) as live,
        openai.OpenAI(base_url=f"{live.url}/v1", api_key="none") as client,
    ):
        with pytest.raises(openai.APIStatusError) as late:
            client.chat.completions.create(model="m", messages=MESSAGES, stream=stream)
        numbers = live.client.get("/metrics").text
    assert (late.value.status_code, late.value.code) == (408, "answer_too_slow")
    (count,) = [
        line.rpartition(" ")[2]
        for line in numbers.splitlines()
        if line.startswith("rllib_arpo_requests_total") and '"408"' in line
    ]
    assert float(count) == 1
