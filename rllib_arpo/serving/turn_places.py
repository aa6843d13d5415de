"""The agent's end: places in engine replicas, and a connection to each replica.

Ray Serve chooses the replica, counts what it does, waits for it and notes when it dies.
All of that comes with a call, so an agent holds a call open for each turn that runs: a
place. When its turn is over, a place serves the next one, for `KEEP_S` from its start:
so Serve weighs anew where turns go, and sees within that time that there are fewer.
"""

import asyncio
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any

from rllib_arpo.engines.engine import GenerationRequest
from rllib_arpo.serving.engine_client import EngineChunk, EngineLostError
from rllib_arpo.serving.turn_wire import (
    TurnAddress,
    end_if_vanished,
    frame,
    pack_request,
    read_frame,
    unpack_chunk,
    unpack_error,
)

KEEP_S = 15.0
CONNECT_S = 10.0


class Connection:
    """Carries the turns of one agent replica to one engine replica, and back.

    Args:
        address: of the engine replica.
        name: the connection's id.
    """

    def __init__(self, address: TurnAddress, name: str) -> None:
        self._address = address
        self._name = name
        self._turns: dict[int, asyncio.Queue[tuple[str, Any]]] = {}
        self._numbers = count()
        self._opening = asyncio.Lock()
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None
        self.lost = False

    async def open(self) -> None:
        """Connect, if it is not connected.

        Raises:
            EngineLostError: nobody listens there.
        """
        async with self._opening:
            if self._writer is not None:
                return
            host, port = self._address.host, self._address.port
            try:
                async with asyncio.timeout(CONNECT_S):
                    reader, self._writer = await asyncio.open_connection(host, port)
                end_if_vanished(self._writer)
            except OSError as error:
                self.lost = True
                raise EngineLostError(
                    f"the engine's replica does not listen at {host}:{port}: {error}"
                ) from error
            self._writer.write(frame([self._address.key, self._name]))
            self._reading = asyncio.create_task(self._read(reader))

    async def generate(
        self, request: GenerationRequest, *, version: str | None = None
    ) -> AsyncGenerator[EngineChunk, None]:
        """As `TurnEngine.generate`."""
        if self.lost or self._writer is None:
            raise EngineLostError("the connection to the engine's replica is lost")
        number = next(self._numbers)
        replies: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()
        self._turns[number] = replies
        self._writer.write(frame(["turn", number, pack_request(request), version]))
        ended = False
        try:
            while not ended:
                kind, what = await replies.get()
                ended = kind != "chunk"
                if kind == "chunk":
                    yield unpack_chunk(what)
                elif kind == "error":
                    raise unpack_error(what)
        finally:
            del self._turns[number]
            if not ended and not self.lost:
                self._writer.write(frame(["cancel", number]))

    def close(self) -> None:
        """Disconnect; turns in flight are lost."""
        self.lost = True
        if self._reading is not None:
            self._reading.cancel()
        if self._writer is not None:
            self._writer.close()

    async def _read(self, reader: asyncio.StreamReader) -> None:
        try:
            while True:
                for number, kind, what in await read_frame(reader):
                    # A turn that was left may have been answered meanwhile.
                    if number in self._turns:
                        self._turns[number].put_nowait((kind, what))
        except (asyncio.IncompleteReadError, OSError):
            pass
        finally:
            self.close()
            loss = EngineLostError("the engine's replica is gone in the middle of it")
            for replies in self._turns.values():
                replies.put_nowait(("error", [type(loss).__name__, str(loss)]))


@dataclass(slots=True, kw_only=True, eq=False)
class _Place:
    """A call that is open, and how turns get to its replica.

    Attributes:
        call: of Serve.
        connection: to the replica.
        until: on the event loop's clock, when it takes no more turns.
    """

    call: Any
    connection: Connection
    until: float


class Places:
    """Places in the replicas of one deployment of `EngineReplica`.

    Args:
        hold: `EngineReplica.hold` of a `DeploymentHandle`, as a stream.
    """

    def __init__(self, hold: Any) -> None:
        self._hold = hold
        self._name = uuid.uuid4().hex
        self._free: list[_Place] = []
        self._connections: dict[TurnAddress, Connection] = {}

    @asynccontextmanager
    async def taken(self) -> AsyncIterator[Connection]:
        """A place for one turn.

        Raises:
            EngineLostError: a replica is gone.
            Exception: what a call of Serve raises.
        """
        place = self._reuse() or await self._open()
        try:
            yield place.connection
        finally:
            self._put_back(place)

    def another(self, tried: Sequence[Connection]) -> Connection | None:
        """A connection to a replica that was not tried yet, None if there is none."""
        for connection in self._connections.values():
            if connection not in tried and not connection.lost:
                return connection
        return None

    def close(self) -> None:
        """Give all places back; turns in flight are lost."""
        for place in self._free:
            place.call.cancel()
        self._free.clear()
        for connection in self._connections.values():
            connection.close()

    def _reuse(self) -> _Place | None:
        while self._free:
            place = self._free.pop()
            if not place.connection.lost:
                return place
            place.call.cancel()
        return None

    async def _open(self) -> _Place:
        call = self._hold.remote(self._name)
        try:
            connection = await self._connected(await anext(call))
        except BaseException:
            call.cancel()
            raise
        loop = asyncio.get_running_loop()
        place = _Place(call=call, connection=connection, until=loop.time() + KEEP_S)
        loop.call_at(place.until, self._expire, place)
        return place

    async def _connected(self, address: TurnAddress) -> Connection:
        lost = [key for key, one in self._connections.items() if one.lost]
        for key in lost:
            del self._connections[key]
        if address not in self._connections:
            self._connections[address] = Connection(address, self._name)
        connection = self._connections[address]
        await connection.open()
        return connection

    def _put_back(self, place: _Place) -> None:
        if place.connection.lost or place.until <= asyncio.get_running_loop().time():
            place.call.cancel()
        else:
            self._free.append(place)

    def _expire(self, place: _Place) -> None:
        if place in self._free:
            self._free.remove(place)
            place.call.cancel()
