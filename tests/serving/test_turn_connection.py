"""Turns through a real connection, without Ray: calls of Serve are staged."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from rllib_arpo.engines.engine import GenerationRequest, SamplingParams, TokenChunk
from rllib_arpo.engines.torch_engine import TorchEngine
from rllib_arpo.errors import EngineError
from rllib_arpo.serving import turn_places
from rllib_arpo.serving.engine_client import (
    EngineChunk,
    EngineLostError,
    InProcessEngine,
    VersionGoneError,
)
from rllib_arpo.serving.front import free_ports
from rllib_arpo.serving.serve_engine import ServeEngine
from rllib_arpo.serving.turn_places import Connection, Places
from rllib_arpo.serving.turn_server import MAX_GREETING_BYTES, Generate, TurnServer
from rllib_arpo.serving.turn_wire import (
    TurnAddress,
    frame,
    pack_chunk,
    pack_request,
    read_frame,
    unpack_chunk,
    unpack_request,
)
from tests.serving.engine_turns import PROMPT, collect, request, token_ids

LIMIT_S = 60


def chunk(*ids: int, done: bool = False) -> EngineChunk:
    count = len(ids)
    return EngineChunk(
        version="v",
        tokens=TokenChunk(
            token_ids=np.array(ids, np.int32),
            logprobs=-np.arange(count, dtype=np.float32),
            entropies=np.arange(count, dtype=np.float32),
            policy_versions=np.full(count, 3, np.int32),
            finish_reason="stop" if done else None,
        ),
    )


class Endless:
    """Writes a token, and then nothing until it is left."""

    def __init__(self) -> None:
        self.running = 0
        self.left = asyncio.Event()

    async def __call__(
        self, request: GenerationRequest, *, version: str | None = None
    ) -> AsyncIterator[EngineChunk]:
        self.running += 1
        try:
            yield chunk(1)
            await asyncio.Event().wait()
        finally:
            self.running -= 1
            self.left.set()


@asynccontextmanager
async def served(generate: Generate) -> AsyncIterator[TurnServer]:
    async with asyncio.timeout(LIMIT_S):
        server = TurnServer(generate, host="127.0.0.1")
        try:
            yield server
        finally:
            server.close()


@asynccontextmanager
async def connected(server: TurnServer) -> AsyncIterator[Connection]:
    connection = Connection(await server.address(), "me")
    await connection.open()
    try:
        yield connection
    finally:
        connection.close()
        await asyncio.sleep(0)


@asynccontextmanager
async def places_of(calls: Any) -> AsyncIterator[Places]:
    places = Places(calls)
    try:
        yield places
    finally:
        places.close()
        await asyncio.sleep(0)


def test_requests_and_chunks_arrive_as_they_were_sent() -> None:
    asked = GenerationRequest(
        request_id="a",
        prompt_token_ids=np.array([1, 2**31 - 1], np.int32),
        max_tokens=5,
        seed=2**64 - 1,
        sampling=SamplingParams(
            temperature=0.5, top_p=0.9, top_k=3, stop=("</a>", "é")
        ),
        stream_interval=2,
    )
    got = unpack_request(pack_request(asked))
    assert got.prompt_token_ids.tolist() == [1, 2**31 - 1]
    assert got.sampling == asked.sampling
    assert (got.seed, got.max_tokens, got.stream_interval) == (2**64 - 1, 5, 2)
    sent, arrived = (
        chunk(4, 5, done=True),
        unpack_chunk(pack_chunk(chunk(4, 5, done=True))),
    )
    for name in ("token_ids", "logprobs", "entropies", "policy_versions"):
        before, after = getattr(sent.tokens, name), getattr(arrived.tokens, name)
        assert before.dtype == after.dtype and before.tolist() == after.tolist()
    assert (arrived.version, arrived.tokens.finish_reason) == ("v", "stop")


def test_many_turns_share_a_connection_and_each_gets_its_own_tokens(
    almanac_model: str,
) -> None:
    async def run() -> None:
        engine = InProcessEngine(TorchEngine.from_pretrained(almanac_model))
        wanted = [
            request(f"{n}", prompt=PROMPT + n, temperature=0.0) for n in range(20)
        ]
        direct = [token_ids(await collect(engine, one)) for one in wanted]
        async with served(engine.generate) as server, connected(server) as connection:
            turns = (collect(connection, one) for one in wanted)
            through = [token_ids(chunks) for chunks in await asyncio.gather(*turns)]
        assert through == direct
        assert len({tuple(ids) for ids in direct}) > 1

    asyncio.run(run())


def test_a_turn_that_is_left_ends_at_the_engine() -> None:
    async def run() -> None:
        endless = Endless()
        async with served(endless) as server, connected(server) as connection:
            async with aclosing(connection.generate(request("a"))) as chunks:
                await anext(chunks)
                assert endless.running == 1
            await endless.left.wait()
            assert endless.running == 0

    asyncio.run(run())


def test_an_agent_that_is_gone_ends_its_turns_and_its_places() -> None:
    async def run() -> None:
        endless = Endless()
        async with served(endless) as server:
            async with connected(server) as connection:
                place = asyncio.create_task(server.disconnected("me"))
                turn = connection.generate(request("a"))
                await anext(turn)
            await endless.left.wait()
            await place

    asyncio.run(run())


def test_an_engine_that_is_gone_loses_its_turns_at_once() -> None:
    async def run() -> None:
        async def hang_up(reader: Any, writer: asyncio.StreamWriter) -> None:
            await read_frame(reader)
            _, number, *_ = await read_frame(reader)
            writer.write(frame([(number, "chunk", pack_chunk(chunk(1)))]))
            writer.close()

        (port,) = free_ports(1)
        listening = await asyncio.start_server(hang_up, "127.0.0.1", port)
        connection = Connection(TurnAddress(host="127.0.0.1", port=port, key="k"), "me")
        async with listening, asyncio.timeout(LIMIT_S):
            await connection.open()
            turn = connection.generate(request("a"))
            assert (await anext(turn)).tokens.token_ids.tolist() == [1]
            with pytest.raises(EngineLostError, match="in the middle"):
                await anext(turn)
            with pytest.raises(EngineLostError, match="is lost"):
                await anext(connection.generate(request("b")))
            connection.close()
        nobody = Connection(TurnAddress(host="127.0.0.1", port=port, key="k"), "me")
        with pytest.raises(EngineLostError, match="does not listen"):
            await nobody.open()

    asyncio.run(run())


@pytest.mark.parametrize(
    "error, seen",
    [
        (VersionGoneError("v1 is gone"), VersionGoneError),
        (EngineLostError("stopped"), EngineLostError),
        (EngineError("a wrong request"), EngineError),
        (MemoryError("all of it"), EngineLostError),
    ],
)
def test_what_an_engine_raises_is_raised_at_the_agent(
    error: Exception, seen: type[Exception]
) -> None:
    async def fail(
        request: GenerationRequest, *, version: str | None = None
    ) -> AsyncIterator[EngineChunk]:
        yield chunk(1)
        raise error

    async def run() -> None:
        async with served(fail) as server, connected(server) as connection:
            with pytest.raises(EngineError, match=str(error)) as raised:
                await collect(connection, request("a"))
            assert type(raised.value) is seen

    asyncio.run(run())


@pytest.mark.parametrize(
    "first",
    [
        frame(["a wrong key", "me"]),
        frame("no pair at all"),
        b"\xff\xff\xff\xff",
        (MAX_GREETING_BYTES + 1).to_bytes(4, "big"),
        b"GET / HTTP/1.1\r\n\r\n",
    ],
)
def test_strangers_are_hung_up_on(first: bytes) -> None:
    async def run() -> None:
        endless = Endless()
        async with served(endless) as server:
            address = await server.address()
            reader, writer = await asyncio.open_connection(address.host, address.port)
            writer.write(first)
            writer.write(frame(["turn", 0, pack_request(request("a")), None]))
            with suppress(ConnectionResetError):
                assert await reader.read() == b""
            writer.close()
            with suppress(ConnectionResetError):
                await writer.wait_closed()
            assert not endless.left.is_set() and endless.running == 0

    asyncio.run(run())


class Calls:
    """What Serve's handle gives: calls of `EngineReplica.hold` on one replica."""

    def __init__(self, server: TurnServer) -> None:
        self.server = server
        self.open = 0
        self.begun = 0

    def remote(self, name: str) -> Any:
        calls = self
        calls.begun += 1
        calls.open += 1

        class Call:
            async def __anext__(self) -> TurnAddress:
                return await calls.server.address()

            def cancel(self) -> None:
                calls.open -= 1

        return Call()


def test_a_place_serves_one_turn_after_the_other() -> None:
    async def run() -> None:
        endless = Endless()
        async with served(endless) as server:
            calls = Calls(server)
            async with places_of(calls) as places:
                for _ in range(3):
                    async with places.taken():
                        pass
                assert (calls.begun, calls.open) == (1, 1)
                async with places.taken(), places.taken():
                    assert (calls.begun, calls.open) == (2, 2)
            assert calls.open == 0

    asyncio.run(run())


def test_a_place_is_given_back_when_its_time_is_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(turn_places, "KEEP_S", 0.0)

    async def run() -> None:
        async with served(Endless()) as server:
            calls = Calls(server)
            async with places_of(calls) as places:
                async with places.taken():
                    # Not while its turn runs.
                    await asyncio.sleep(0.01)
                    assert calls.open == 1
                assert calls.open == 0

    asyncio.run(run())


def test_a_place_whose_replica_is_gone_is_not_used_again() -> None:
    async def run() -> None:
        async with served(Endless()) as server:
            calls = Calls(server)
            async with places_of(calls) as places:
                async with places.taken() as connection:
                    connection.close()
                assert calls.open == 0
                async with places.taken() as other:
                    assert other is not connection
                    assert not other.lost

    asyncio.run(run())


class Replica:
    """Has one version of the weights."""

    def __init__(self, version: str) -> None:
        self.version = version

    async def __call__(
        self, request: GenerationRequest, *, version: str | None = None
    ) -> AsyncIterator[EngineChunk]:
        if version not in (None, self.version):
            raise VersionGoneError(f"only {self.version}")
        yield replace(chunk(1, done=True), version=self.version)


class Handle:
    """What `ServeEngine` needs of a `DeploymentHandle`."""

    def __init__(self, calls: Calls) -> None:
        self.calls = calls

    def options(self, **options: Any) -> Calls:
        return self.calls


def test_a_turn_goes_back_to_the_replica_that_still_has_its_version(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As when weights changed and then a replica was added, amid an answer."""
    monkeypatch.setattr(turn_places, "KEEP_S", 0.0)

    async def versions(engine: ServeEngine, version: str | None) -> list[str]:
        return [one.version for one in await collect(engine, request("a"), version)]

    async def run() -> None:
        async with served(Replica("old")) as old, served(Replica("new")) as new:
            calls = Calls(old)
            engine = ServeEngine(Handle(calls))
            assert await versions(engine, None) == ["old"]
            calls.server = new
            assert await versions(engine, "old") == ["old"]
            assert await versions(engine, None) == ["new"]
            with pytest.raises(VersionGoneError):
                await versions(engine, "older")
            engine._places.close()
            await asyncio.sleep(0)

    asyncio.run(run())
