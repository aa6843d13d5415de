"""How much a client may ask for: bytes, messages, tokens, time, requests at once."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rllib_arpo.serving.access import CLIENT, route_path
from rllib_arpo.serving.api_errors import (
    NO_RETRY,
    RETRY_S,
    ClientGoneError,
    HttpError,
)
from rllib_arpo.serving.http_settings import HttpSettings
from rllib_arpo.serving.openai_api import ChatCompletionRequest, InvalidRequestError

CHAT_PATH = "/v1/chat/completions"
# In the scope of a chat request: takes further answers.
TAKE = "rllib_arpo.take"


class BodyLimit:
    """ASGI middleware: a body comes in whole, soon and not too long, or is refused.

    Nothing is read for an app that does not ask for it.

    Raises:
        HttpError: 413, or 408 if the rest of it does not come.
        ClientGoneError: the client hung up before its body was there.
    """

    def __init__(self, app: ASGIApp, settings: HttpSettings) -> None:
        self._app = app
        self._max_bytes = settings.max_body_bytes
        self._max_s = settings.max_body_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        length = Headers(scope=scope).get("content-length", "")
        if length.isdecimal() and int(length[:20]) > self._max_bytes:
            raise self._too_long()
        was_read = False

        async def whole() -> Message:
            nonlocal was_read
            if was_read:
                return await receive()
            was_read = True
            body = await self._in_time(receive)
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, whole, send)

    async def _in_time(self, receive: Receive) -> bytes:
        try:
            async with asyncio.timeout(self._max_s):
                return await self._read(receive)
        except TimeoutError as error:
            raise HttpError(
                408,
                f"the body was not there after {self._max_s:g} s, the most that this "
                "server waits",
                code="body_too_slow",
            ) from error

    async def _read(self, receive: Receive) -> bytes:
        pieces = bytearray()
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGoneError
            pieces += message.get("body", b"")
            if len(pieces) > self._max_bytes:
                raise self._too_long()
            more = message.get("more_body", False)
        return bytes(pieces)

    def _too_long(self) -> HttpError:
        return HttpError(
            413,
            f"the body has more than {self._max_bytes} bytes, the most that this "
            "server takes",
            code="body_too_long",
        )


class ConcurrencyLimit:
    """ASGI middleware: so many answers to one key, and to all, at once.

    A request counts as one until `count_answers` tells that it wants more.

    Raises:
        HttpError: 429, or 503 if there are too many of all keys, with the time after
            which to try again.
    """

    def __init__(self, app: ASGIApp, settings: HttpSettings) -> None:
        self._app = app
        self._most = settings.max_concurrent
        self._most_in_all = settings.max_in_all
        self._running: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http" or route_path(scope) != CHAT_PATH:
            await self._app(scope, receive, send)
            return
        client, taken = scope[CLIENT], 0

        def take(number: int) -> None:
            nonlocal taken
            self._refuse_too_many(client, number)
            self._running[client] += number
            taken += number

        take(1)
        try:
            await self._app({**scope, TAKE: take}, receive, send)
        finally:
            self._running[client] -= taken

    def _refuse_too_many(self, client: str, number: int) -> None:
        if self._running[client] + number > self._most:
            raise HttpError(
                429,
                f"this key may have {self._most} answers at once, and that would be "
                "more; try again later",
                code="too_many_requests",
                headers={"Retry-After": RETRY_S},
            )
        if self._running.total() + number > self._most_in_all:
            raise HttpError(
                503,
                f"this server writes {self._most_in_all} answers at once, and that "
                "would be more; try again later",
                code="overloaded",
                headers={"Retry-After": RETRY_S},
            )


def count_answers(scope: Scope, number: int) -> None:
    """Let a request of `ConcurrencyLimit` count as so many answers, until it ends.

    Raises:
        HttpError: as there.
    """
    scope[TAKE](number - 1)


def within_limits(
    request: ChatCompletionRequest, settings: HttpSettings
) -> ChatCompletionRequest:
    """The request, with the server's cap on tokens if it names none.

    Raises:
        InvalidRequestError: it asks for more than the server allows.
    """
    if len(request.messages) > settings.max_messages:
        raise InvalidRequestError(
            f"`messages` has {len(request.messages)} messages, but this server takes "
            f"{settings.max_messages}: leave out the oldest",
            param="messages",
            code="too_many_messages",
        )
    most = min(settings.max_concurrent, settings.max_in_all)
    if (request.n or 1) > most:
        raise InvalidRequestError(
            f"`n` ({request.n}) must be <= {most} on this server",
            param="n",
            code="too_many_answers",
        )
    if settings.max_tokens is None:
        return request
    for name in ("max_completion_tokens", "max_tokens"):
        asked = getattr(request, name)
        if asked is not None and asked > settings.max_tokens:
            raise InvalidRequestError(
                f"`{name}` ({asked}) must be <= {settings.max_tokens} on this server",
                param=name,
                code="too_many_tokens",
            )
    if request.max_completion_tokens is None and request.max_tokens is None:
        return request.model_copy(update={"max_tokens": settings.max_tokens})
    return request


@asynccontextmanager
async def wall_time(seconds: float) -> AsyncIterator[None]:
    """What runs inside may take so long.

    Raises:
        HttpError: 408, it took longer.
    """
    limit = asyncio.timeout(seconds)
    try:
        async with limit:
            yield
    except TimeoutError as error:
        if not limit.expired():
            raise
        raise HttpError(
            408,
            f"the answer took more than {seconds:g} s, the most on this server; ask "
            "for fewer tokens",
            code="answer_too_slow",
            headers=NO_RETRY,
        ) from error
