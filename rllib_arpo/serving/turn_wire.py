"""Turns between agent and engine replicas over TCP: what the bytes mean.

Calls of Ray Serve cost more than a small model's turn, so they only find a replica and
hold a place in it (`turn_places`); the turns of all answers pass through one connection
for each pair of replicas. Each message is a frame: four bytes of length, then msgpack.

    agent  -> engine   the key and the connection's id, once
                       ("turn", number, request, version)    ("cancel", number)
    engine -> agent    a list of (number, "chunk" | "end" | "error", what)
"""

import asyncio
import socket
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import msgpack
import numpy as np
from numpy.typing import NDArray

from rllib_arpo.engines.engine import GenerationRequest, SamplingParams, TokenChunk
from rllib_arpo.errors import EngineError
from rllib_arpo.serving.engine_client import (
    EngineChunk,
    EngineLostError,
    VersionGoneError,
)

# A million tokens of a prompt are 4 MB.
MAX_FRAME_BYTES = 64 * 2**20
LENGTH_BYTES = 4
# Asked after 5 s of silence, and given up after 20 s without an answer.
VANISHED = {
    "TCP_KEEPIDLE": 5,
    "TCP_KEEPINTVL": 5,
    "TCP_KEEPCNT": 3,
    "TCP_USER_TIMEOUT": 20_000,  # ms
}
ERRORS = {one.__name__: one for one in (EngineLostError, VersionGoneError, EngineError)}


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnAddress:
    """Where a replica takes turns.

    Attributes:
        host: of the replica's node.
        port: of TCP.
        key: that a connection must begin with.
    """

    host: str
    port: int
    key: str = field(repr=False)


def end_if_vanished(writer: asyncio.StreamWriter) -> None:
    """Let a connection break when the other node has no power or no network any more.

    TCP alone would wait for its answer for ever.
    """
    connection = writer.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in VANISHED.items():
        if hasattr(socket, name):  # Linux has them all
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def frame(message: Any) -> bytes:
    """A message of plain values as it is sent."""
    body = cast(bytes, msgpack.packb(message))
    return len(body).to_bytes(LENGTH_BYTES, "big") + body


async def read_frame(
    reader: asyncio.StreamReader, max_bytes: int = MAX_FRAME_BYTES
) -> Any:
    """The next message.

    Raises:
        asyncio.IncompleteReadError, ConnectionError: the connection has ended.
        ValueError: a frame is longer than `max_bytes`, or is not msgpack.
    """
    head = await reader.readexactly(LENGTH_BYTES)
    size = int.from_bytes(head, "big")
    if size > max_bytes:
        raise ValueError(f"a frame of {size} bytes; the most is {max_bytes}")
    return msgpack.unpackb(await reader.readexactly(size))


def pack_request(request: GenerationRequest) -> dict[str, Any]:
    """A request as plain values."""
    fields = {
        name: getattr(request, name)
        for name in ("request_id", "max_tokens", "seed", "stream_interval")
    }
    return fields | {
        "prompt_token_ids": request.prompt_token_ids.astype("<i4").tobytes(),
        "sampling": asdict(request.sampling),
    }


def unpack_request(fields: dict[str, Any]) -> GenerationRequest:
    """The request of `pack_request`."""
    sampling = fields["sampling"]
    return GenerationRequest(
        **fields
        | {
            "prompt_token_ids": _array(fields["prompt_token_ids"], "<i4"),
            "sampling": SamplingParams(**sampling | {"stop": tuple(sampling["stop"])}),
        }
    )


def pack_chunk(chunk: EngineChunk) -> list[Any]:
    """A chunk as plain values."""
    tokens = chunk.tokens
    return [
        chunk.version,
        tokens.token_ids.astype("<i4").tobytes(),
        tokens.logprobs.astype("<f4").tobytes(),
        tokens.entropies.astype("<f4").tobytes(),
        tokens.policy_versions.astype("<i4").tobytes(),
        tokens.finish_reason,
    ]


def unpack_chunk(fields: list[Any]) -> EngineChunk:
    """The chunk of `pack_chunk`."""
    version, token_ids, logprobs, entropies, policy_versions, finish_reason = fields
    return EngineChunk(
        version=version,
        tokens=TokenChunk(
            token_ids=_array(token_ids, "<i4"),
            logprobs=_array(logprobs, "<f4"),
            entropies=_array(entropies, "<f4"),
            policy_versions=_array(policy_versions, "<i4"),
            finish_reason=finish_reason,
        ),
    )


def pack_error(error: Exception) -> list[str]:
    """An error as plain values."""
    if type(error).__name__ in ERRORS:
        return [type(error).__name__, str(error)]
    return [
        EngineLostError.__name__,
        f"the engine failed: {type(error).__name__}: {error}",
    ]


def unpack_error(fields: list[str]) -> EngineError:
    """The error of `pack_error`."""
    name, text = fields
    return ERRORS[name](text)


def _array(data: bytes, kind: str) -> NDArray[Any]:
    return np.frombuffer(data, kind)
