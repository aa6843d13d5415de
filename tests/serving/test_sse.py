"""How chunks become messages of the server, without a network."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import ExitStack

import pytest
from starlette.types import Message

from rllib_arpo.serving.openai_api import ChatCompletionChunk
from rllib_arpo.serving.sse import (
    DONE,
    MAX_WRITES_PER_S,
    MIN_TOGETHER_S,
    EventStream,
    Pace,
)
from tests.virtual_time import run_virtual

NUM_CHUNKS = 20


def chunk(number: int) -> ChatCompletionChunk:
    return ChatCompletionChunk(id=str(number), created=0, model="m", choices=[])


def events(bodies: list[bytes]) -> list[bytes]:
    return [event + b"\n\n" for event in b"".join(bodies).split(b"\n\n") if event]


async def sent(chunks: AsyncIterator[ChatCompletionChunk]) -> list[bytes]:
    """Bodies that the server gets for a client that stays."""
    bodies: list[bytes] = []

    async def receive() -> Message:
        return await asyncio.Event().wait()  # type: ignore[return-value]

    async def send(message: Message) -> None:
        if message["type"] == "http.response.body":
            bodies.append(message["body"])

    await EventStream(chunks, max_s=60, pace=Pace())({"type": "http"}, receive, send)
    return bodies


def test_chunks_that_follow_each_other_go_out_together_and_in_order() -> None:
    async def chunks() -> AsyncIterator[ChatCompletionChunk]:
        for number in range(NUM_CHUNKS):
            yield chunk(number)
            await asyncio.sleep(0)

    # On a clock that stands still while anything is ready.
    bodies = run_virtual(sent(chunks()))
    assert events(bodies) == [
        *(f"data: {chunk(n).model_dump_json()}\n\n".encode() for n in range(20)),
        DONE,
    ]
    # The first with what comes with it, the rest when all is over.
    assert 1 <= len(events(bodies[:1])) < NUM_CHUNKS
    assert len(bodies) == 2


def test_a_chunk_is_written_while_the_next_one_is_not_there() -> None:
    async def first_two() -> list[bytes]:
        bodies: list[bytes] = []
        written = asyncio.Event()

        async def chunks() -> AsyncIterator[ChatCompletionChunk]:
            yield chunk(0)
            yield chunk(1)
            await written.wait()

        async def send(message: Message) -> None:
            bodies.append(message.get("body", b""))
            if b'"id":"1"' in bodies[-1]:
                written.set()

        async def receive() -> Message:
            return await asyncio.Event().wait()  # type: ignore[return-value]

        await EventStream(chunks(), max_s=60, pace=Pace())(
            {"type": "http"}, receive, send
        )
        return bodies

    head, both, end = asyncio.run(first_two())
    assert head == b""
    assert events([both]) == [
        f"data: {chunk(n).model_dump_json()}\n\n".encode() for n in range(2)
    ]
    assert end == DONE


def test_a_chunk_that_comes_while_a_slow_reader_holds_up_a_write_follows_it() -> None:
    async def second() -> list[bytes]:
        bodies: list[bytes] = []
        writing, may_go_on, written = asyncio.Event(), asyncio.Event(), asyncio.Event()

        async def chunks() -> AsyncIterator[ChatCompletionChunk]:
            yield chunk(0)
            await writing.wait()
            yield chunk(1)
            may_go_on.set()
            await written.wait()

        async def send(message: Message) -> None:
            bodies.append(message.get("body", b""))
            if b'"id":"0"' in bodies[-1]:
                writing.set()
                await may_go_on.wait()
            elif b'"id":"1"' in bodies[-1]:
                written.set()

        async def receive() -> Message:
            return await asyncio.Event().wait()  # type: ignore[return-value]

        await EventStream(chunks(), max_s=60, pace=Pace())(
            {"type": "http"}, receive, send
        )
        return bodies

    assert run_virtual(second())[1:] == [
        f"data: {chunk(0).model_dump_json()}\n\n".encode(),
        f"data: {chunk(1).model_dump_json()}\n\n".encode(),
        DONE,
    ]


def test_many_streams_write_no_more_often_than_their_server_can() -> None:
    pace = Pace()
    with ExitStack() as streams:
        streams.enter_context(pace.one_more())
        assert pace.together_s == MIN_TOGETHER_S
        for _ in range(2 * MAX_WRITES_PER_S - 1):
            streams.enter_context(pace.one_more())
        assert pace.together_s == 2.0
    assert pace.together_s == MIN_TOGETHER_S


def test_a_connection_that_breaks_ends_the_chunks() -> None:
    closed = asyncio.Event()

    async def chunks() -> AsyncIterator[ChatCompletionChunk]:
        try:
            number = 0
            while True:
                yield chunk(number)
                number += 1
                await asyncio.sleep(0.001)
        finally:
            closed.set()

    async def receive() -> Message:
        return await asyncio.Event().wait()  # type: ignore[return-value]

    async def send(message: Message) -> None:
        if b'"id":"1"' in message.get("body", b""):
            raise OSError("broken pipe")

    async def broken() -> None:
        await EventStream(chunks(), max_s=60, pace=Pace())(
            {"type": "http"}, receive, send
        )

    with pytest.raises(OSError, match="broken pipe"):
        asyncio.run(broken())
    assert closed.is_set()


def test_headers_that_middleware_adds_are_those_of_one_stream() -> None:
    starts: list[Message] = []

    async def receive() -> Message:
        return await asyncio.Event().wait()  # type: ignore[return-value]

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            starts.append({**message, "headers": [*message["headers"]]})
            message["headers"].append((b"x-request-id", b"1"))

    async def chunks() -> AsyncIterator[ChatCompletionChunk]:
        yield chunk(0)

    for _ in range(2):
        stream = EventStream(chunks(), max_s=60, pace=Pace())
        asyncio.run(stream({"type": "http"}, receive, send))
    assert starts[0] == starts[1]
