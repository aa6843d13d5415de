"""The engine replica's end of the connections through which agents have turns."""

import asyncio
import hmac
import secrets
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any, Protocol, cast

from ray.util import get_node_ip_address

from rllib_arpo.engines.engine import GenerationRequest
from rllib_arpo.serving.engine_client import EngineChunk
from rllib_arpo.serving.turn_wire import (
    TurnAddress,
    end_if_vanished,
    frame,
    pack_chunk,
    pack_error,
    read_frame,
    unpack_request,
)

MAX_GREETING_BYTES = 1024
GREETING_S = 10.0


class Generate(Protocol):
    """As `TurnEngine.generate`."""

    def __call__(
        self, request: GenerationRequest, *, version: str | None = None
    ) -> AsyncIterator[EngineChunk]: ...


class TurnServer:
    """Takes turns from agents, on the event loop that first asks for its address.

    Args:
        generate: writes a turn.
        host: to listen at; that of the node, if it is None.
    """

    def __init__(self, generate: Generate, host: str | None = None) -> None:
        self._generate = generate
        self._host = host
        self._key = secrets.token_urlsafe(32)
        self._starting = asyncio.Lock()
        self._server: asyncio.Server | None = None
        self._connected: dict[str, asyncio.Event] = {}
        self._writers: set[asyncio.StreamWriter] = set()

    async def address(self) -> TurnAddress:
        """Where it listens, from now on."""
        host = self._host or get_node_ip_address()
        async with self._starting:
            if self._server is None:
                self._server = await asyncio.start_server(self._serve, host, 0)
        port = self._server.sockets[0].getsockname()[1]
        return TurnAddress(host=host, port=port, key=self._key)

    async def disconnected(self, connection: str) -> None:
        """Wait until a connection has come and gone.

        Args:
            connection: its id.
        """
        await self._connected.setdefault(connection, asyncio.Event()).wait()

    def close(self) -> None:
        """Listen no more; turns in flight are lost."""
        if self._server is not None:
            self._server.close()
            self._server = None
        for writer in self._writers:
            writer.close()

    async def _serve(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        name: str | None = None
        turns = _Turns(self._generate, writer)
        self._writers.add(writer)
        try:
            end_if_vanished(writer)
            async with asyncio.timeout(GREETING_S):
                key, name = await read_frame(reader, MAX_GREETING_BYTES)
            if not hmac.compare_digest(str(key), self._key):
                return
            while True:
                turns.take(await read_frame(reader))
        except (asyncio.IncompleteReadError, OSError):
            pass  # the agent has left
        except (ValueError, TypeError, KeyError):
            pass  # whoever it is, it does not speak as an agent does
        finally:
            turns.close()
            self._writers.remove(writer)
            writer.close()
            self._connected.pop(str(name), asyncio.Event()).set()


class _Turns:
    """The turns of one connection."""

    def __init__(self, generate: Generate, writer: asyncio.StreamWriter) -> None:
        self._generate = generate
        self._writer = writer
        self._running: dict[int, asyncio.Task[None]] = {}
        self._replies: list[Any] = []
        self._to_write = asyncio.Event()
        self._writing = asyncio.create_task(self._write())

    def take(self, message: list[Any]) -> None:
        """Do what the agent wants.

        Raises:
            ValueError, TypeError, KeyError: it is not understood.
        """
        kind, number, *rest = message
        if kind == "cancel":
            if number in self._running:
                self._running[number].cancel()
            return
        fields, version = rest
        work = self._turn(number, unpack_request(fields), version)
        self._running[number] = task = asyncio.create_task(work)
        task.add_done_callback(lambda _: self._running.pop(number))

    def close(self) -> None:
        self._writing.cancel()
        for task in [*self._running.values()]:
            task.cancel()

    async def _turn(
        self, number: int, request: GenerationRequest, version: str | None
    ) -> None:
        try:
            # Engines are async generators, which the protocol does not say.
            turn = cast(Any, self._generate(request, version=version))
            async with aclosing(turn) as chunks:
                async for chunk in chunks:
                    self._reply(number, "chunk", pack_chunk(chunk))
            self._reply(number, "end", None)
        except Exception as error:  # boundary: it is the agent's to judge
            self._reply(number, "error", pack_error(error))

    def _reply(self, number: int, kind: str, what: Any) -> None:
        self._replies.append((number, kind, what))
        self._to_write.set()

    async def _write(self) -> None:
        """Send what has gathered; an engine's step gives chunks of many turns."""
        while True:
            await self._to_write.wait()
            self._to_write.clear()
            await asyncio.sleep(0)
            replies, self._replies = self._replies, []
            if replies:
                self._writer.write(frame(replies))
                try:
                    await self._writer.drain()
                except ConnectionError:
                    return  # the reader ends the turns
