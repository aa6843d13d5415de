"""What host, worker and child say to each other, in bytes.

A message is a 4-byte length and a body of parts, each after its own 4-byte length:

    host   -> worker   call, CallSettings as JSON, variables, code        or: cancel
    worker -> host     ready                                        before each call
    worker -> host     how it ended, how the child exited, printed, reply
    worker -> child    the host's call
    child  -> worker   error, note, whether it set variables, variables     = reply

Nothing that a child wrote is trusted to be a reply. Nobody unpickles variables but
the child that uses them.
"""

import socket
from typing import TypedDict

MAX_ERROR_CHARS = 2000
MAX_NOTE_CHARS = 500
# Of a reply without its variables: at most four bytes a character.
MAX_REPLY_TEXT_BYTES = 4 * (MAX_ERROR_CHARS + MAX_NOTE_CHARS) + 100
# Stands in the filter for the process that it is for, whose id only itself knows.
OWN_PID = 0x7FFFFFFE


class Settings(TypedDict):
    """What a worker is told when it starts.

    Attributes:
        home: the folder that holds this package.
        packages: folders to import from, besides the standard library.
        temp: the only folder that is emptied after a call.
        seccomp: the filter of system calls, in hexadecimal; may be empty.
        sandboxed: whether this is process 1 of a sandbox of its own, and the filter
            must be accepted.
        probe: only try imports and filter, and exit.
    """

    home: str
    packages: list[str]
    temp: str
    seccomp: str
    sandboxed: bool
    probe: bool


class CallSettings(TypedDict):
    """`SandboxLimits`, and the seed of random numbers."""

    time_s: float
    memory_mb: int
    output_bytes: int
    file_mb: int
    state_mb: int
    seed: int


def pack(*parts: bytes | bytearray) -> bytes:
    """Parts in one body."""
    return b"".join(len(part).to_bytes(4, "big") + part for part in parts)


def unpack(body: bytes, count: int) -> list[bytes]:
    """The `count` parts of a body.

    Raises:
        ValueError: the body is anything else.
    """
    parts: list[bytes] = []
    position = 0
    while position < len(body) and len(parts) < count:
        start = position + 4
        position = start + int.from_bytes(body[position:start], "big")
        parts.append(body[start:position])
    if position != len(body) or len(parts) != count:
        raise ValueError(f"a message of {len(body)} bytes is not {count} parts")
    return parts


def send(channel: socket.socket, *parts: bytes | bytearray) -> None:
    """Send one message."""
    send_body(channel, pack(*parts))


def send_body(channel: socket.socket, body: bytes) -> None:
    """Send one message whose parts are packed already."""
    channel.sendall(len(body).to_bytes(4, "big") + body)


def receive(channel: socket.socket, max_bytes: int) -> bytes:
    """The body of the next message.

    Raises:
        EOFError: the other side is gone.
        ValueError: the body is longer than `max_bytes`.
    """
    length = int.from_bytes(_receive_exactly(channel, 4), "big")
    if length > max_bytes:
        raise ValueError(f"a message of {length} bytes, over {max_bytes}")
    return _receive_exactly(channel, length)


def _receive_exactly(channel: socket.socket, length: int) -> bytes:
    data = bytearray()
    while len(data) < length:
        chunk = channel.recv(min(length - len(data), 1 << 20))
        if not chunk:
            raise EOFError
        data += chunk
    return bytes(data)
