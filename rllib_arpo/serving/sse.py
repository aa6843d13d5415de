"""Answers that outlive one message: server-sent events, and clients that hang up.

    data: {"object": "chat.completion.chunk", ...}      for each chunk
    data: {"error": {...}}                              only where the answer failed
    data: [DONE]

What fails before the first chunk is an ordinary error with its status. When the client
hangs up, what works for it is cancelled, so that the engine stops.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Iterator
from contextlib import aclosing
from typing import Any, TypeVar, cast

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from rllib_arpo.serving.api_errors import ClientGoneError, failure_of
from rllib_arpo.serving.limits import wall_time
from rllib_arpo.serving.openai_api import ChatCompletionChunk

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"
# Writes of all streams of a process: about a fifth of a core, here and before it.
MAX_WRITES_PER_S = 250
# A reader does not see it.
MIN_TOGETHER_S = 0.02
HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    # Proxies of the nginx family hold back what they may buffer.
    (b"x-accel-buffering", b"no"),
)


class EventStream(Response):
    """A stream of chunks as an answer.

    Args:
        chunks: a generator; it is closed when the answer ends, however it ends.
        max_s: seconds after which it is cut off with an error.
        pace: of all streams of the server.
    """

    media_type = "text/event-stream"

    def __init__(
        self, chunks: AsyncIterator[ChatCompletionChunk], *, max_s: float, pace: "Pace"
    ) -> None:
        super().__init__()
        self._chunks = cast(AsyncGenerator[ChatCompletionChunk], chunks)
        self._max_s = max_s
        self._pace = pace

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send all of it, or as much as the client wants.

        Raises:
            ClientGoneError: it hung up before the first chunk.
        """
        sender = _Sender(send, self._pace)
        try:
            with self._pace.one_more():
                await unless_hung_up(receive, self._send_all(sender))
        except ClientGoneError:
            if not sender.started:
                raise
        finally:
            await sender.close()

    async def _send_all(self, sender: "_Sender") -> None:
        async with aclosing(self._chunks) as chunks:
            try:
                async with wall_time(self._max_s):
                    async for chunk in chunks:
                        await sender.event(chunk.model_dump_json())
            # Boundary: the status was sent, so a failure is one more event.
            except Exception as error:
                if not sender.started:
                    raise
                await sender.event(failure_of(error).body())
        await sender.end()


class Pace:
    """How long the streams of a server gather events before they write.

    Every write passes through the proxy as a message of its own, which costs more than
    to make an event: the more streams, the longer each waits for its next write.
    """

    def __init__(self) -> None:
        self._num_streams = 0

    @property
    def together_s(self) -> float:
        """Seconds from one write of a stream to its next."""
        return max(MIN_TOGETHER_S, self._num_streams / MAX_WRITES_PER_S)

    @contextlib.contextmanager
    def one_more(self) -> Iterator[None]:
        """A stream is open meanwhile."""
        self._num_streams += 1
        try:
            yield
        finally:
            self._num_streams -= 1


class _Sender:
    """Writes events: the first at once, with the head, and later ones by the pace."""

    def __init__(self, send: Send, pace: Pace) -> None:
        self._send = send
        self._pace = pace
        self._held: list[bytes] = []
        self._writing: asyncio.Task[None] | None = None
        self._ending = asyncio.Event()
        self._begun = False
        self.started = False

    async def event(self, data: str) -> None:
        self.started = True
        self._held.append(b"data: " + data.encode() + b"\n\n")
        if self._writing is not None and self._writing.done():
            self._writing.result()
            self._writing = None
        if self._writing is None:
            self._writing = asyncio.create_task(self._write_later())

    async def end(self) -> None:
        if self._writing is not None:
            self._ending.set()
            await self._writing
        self._held.append(DONE)
        await self._write(more=False)

    async def close(self) -> None:
        """Write nothing more."""
        if self._writing is not None:
            self._writing.cancel()
            await asyncio.gather(self._writing, return_exceptions=True)

    async def _write_later(self) -> None:
        # More may come while a slow reader holds up a write.
        while self._held:
            # What comes with the first event is written with it.
            wait_s = self._pace.together_s if self._begun else 0
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._ending.wait()
            if self._ending.is_set():
                return
            await self._write(more=True)

    async def _write(self, *, more: bool) -> None:
        if not self._begun:
            self._begun = True
            # Middleware of the server appends to the list.
            await self._send(
                {
                    "type": "http.response.start",
                    "status": 200,
                    "headers": list(HEADERS),
                }
            )
        held, self._held = self._held, []
        await self._send(
            {"type": "http.response.body", "body": b"".join(held), "more_body": more}
        )


async def unless_hung_up(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Do the work, but give it up when the client hangs up.

    Args:
        receive: of a request whose body has been read.
        work: cancelled, and waited for, when there is nobody to do it for.

    Raises:
        ClientGoneError: the client hung up.
    """
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_hung_up(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _hung_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
