"""A real server on a free port of loopback, in a thread, and requests to it."""

import asyncio
import itertools
import json
import math
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, Self

import httpx2
import numpy as np
import uvicorn
from starlette.types import ASGIApp

from rllib_arpo.engines.engine import GenerationRequest, TokenChunk
from rllib_arpo.serving.agent import Agent
from rllib_arpo.serving.engine_client import EngineChunk
from rllib_arpo.serving.front import free_ports
from rllib_arpo.serving.service import ChatService
from tests.serving.scripted_agents import USER, make_env

CHAT = "/v1/chat/completions"
PATIENCE_S = 60


class LiveServer:
    """Serves `app` inside a `with` block; `url` and `client` lead to it."""

    def __init__(self, app: ASGIApp) -> None:
        # Bound and listening before the thread runs: nobody has to wait for it.
        # And when it is gone, nobody is given its port by chance.
        (self.port,) = free_ports(1)
        self._socket = socket.create_server(("127.0.0.1", self.port))
        self.url = f"http://127.0.0.1:{self.port}"
        config = uvicorn.Config(
            app, log_config=None, lifespan="off", ws="none", timeout_graceful_shutdown=5
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [self._socket]}
        )
        self.client = httpx2.Client(base_url=self.url, timeout=PATIENCE_S)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.client.close()
        self._server.should_exit = True
        self._thread.join()
        self._socket.close()

    def post_raw(
        self, body: bytes, path: str = CHAT, **headers: str
    ) -> httpx2.Response:
        return self.client.post(
            path, content=body, headers={"Content-Type": "application/json", **headers}
        )

    def connection(self, fields: dict[str, Any]) -> socket.socket:
        """A connection on which a chat request was sent and no answer was read."""
        body = json.dumps(fields).encode()
        head = (
            f"POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}"
            "\r\nContent-Type: application/json\r\n\r\n"
        )
        connection = socket.create_connection(("127.0.0.1", self.port), PATIENCE_S)
        connection.sendall(head.encode() + body)
        return connection

    @contextmanager
    def head(self, line: str, *, length: int) -> Iterator[BinaryIO]:
        """The answer to a request whose body of `length` bytes does not come."""
        head = (
            f"{line} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {length}"
            "\r\nContent-Type: application/json\r\n\r\n"
        )
        address = ("127.0.0.1", self.port)
        with socket.create_connection(address, PATIENCE_S) as connection:
            connection.sendall(head.encode())
            with connection.makefile("rb") as answer:
                yield answer


def ask(**fields: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [USER], "seed": 1, **fields}


class EndlessEngine:
    """Writes the same token until it is closed, and tells when.

    Args:
        num_tokens: after so many it writes nothing, but is as busy.
    """

    def __init__(self, *, num_tokens: float = math.inf) -> None:
        self.started = threading.Event()
        self.closed = threading.Event()
        self._num_tokens = num_tokens
        self._token = make_env().dialogue.model_ids("a")[:1]

    def service(self) -> ChatService:
        agent = Agent(env=make_env(max_response_tokens=1_000_000), stream_interval=1)
        return ChatService({"m": (agent, self)})

    async def generate(
        self, request: GenerationRequest, *, version: str | None = None
    ) -> AsyncIterator[EngineChunk]:
        zero = np.zeros(1, np.float32)
        chunk = TokenChunk(
            token_ids=self._token,
            logprobs=zero,
            entropies=zero,
            policy_versions=np.zeros(1, np.int32),
        )
        self.started.set()
        try:
            for number in itertools.count():
                if number >= self._num_tokens:
                    await asyncio.Event().wait()
                await asyncio.sleep(0)
                yield EngineChunk(version="v1", tokens=chunk)
        finally:
            self.closed.set()
