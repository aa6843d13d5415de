"""A tool that takes longer than a request may, on the whole server."""

import json
import socket
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.serving.calling_agent import FOUND, Call, held_by, make_calling_agent
from tests.serving.served import KEY, Served, serving, until

pytestmark = pytest.mark.slow
# Each answer that is held takes so long; what comes before its tool, far less.
MAX_REQUEST_S = 10
MESSAGES: Any = [{"role": "user", "content": "vifel?"}]


@pytest.fixture(scope="module")
def impatient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    model = make_calling_agent(tmp_path_factory.mktemp("agents") / "almanac")
    words = ("--api-key", KEY, "--max-request-s", MAX_REQUEST_S)
    with serving(f"almanac={model}", *words) as running:
        # The first answer takes longer than later ones.
        until(lambda: running.post().status_code == 200)
        yield running


@pytest.fixture
def client(impatient: Served) -> Iterator[openai.OpenAI]:
    # With the retries that the client comes with: it must not make any.
    with openai.OpenAI(base_url=f"{impatient.url}/v1", api_key=KEY) as client:
        yield client


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener


def assert_no_more_calls(listener: socket.socket) -> None:
    listener.setblocking(False)
    with pytest.raises(BlockingIOError):
        listener.accept()


def assert_answers(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="almanac", messages=MESSAGES)
    message: Any = answer.choices[0].message
    assert message.content == "44"
    assert message.agent["turns"][0]["tool_call"]["result"] == FOUND


def test_a_tool_that_is_too_slow_is_stopped_and_the_client_told(
    client: openai.OpenAI, listener: socket.socket
) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(
            model="almanac", messages=MESSAGES, metadata=held_by(listener)
        )
    assert caught.value.status_code == 408
    error: Any = caught.value.body
    assert (error["code"], error["type"]) == ("answer_too_slow", "timeout_error")
    assert Call.next(listener).is_given_up()
    assert_no_more_calls(listener)
    assert_answers(client)


def test_a_stream_whose_tool_is_too_slow_ends_with_the_error(
    impatient: Served, client: openai.OpenAI, listener: socket.socket
) -> None:
    response = impatient.post(stream=True, metadata=held_by(listener))
    assert response.status_code == 200
    *chunks, last, done = response.text.split("\n\n")[:-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "answer_too_slow"
    assert done == "data: [DONE]"
    assert any('"tool_started"' in chunk for chunk in chunks)
    assert not any('"error"' in chunk for chunk in chunks)
    assert Call.next(listener).is_given_up()

    stream = client.chat.completions.create(
        model="almanac", messages=MESSAGES, metadata=held_by(listener), stream=True
    )
    with stream, pytest.raises(openai.APIError) as caught:
        list(stream)
    assert caught.value.code == "answer_too_slow"
    assert Call.next(listener).is_given_up()
    assert_no_more_calls(listener)
    assert_answers(client)
