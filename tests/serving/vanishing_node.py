"""An engine's replica whose network goes away, without a last word.

    unshare --map-root-user --net python -m tests.serving.vanishing_node

It needs a network of its own, whose only interface it switches off. Prints what the
two ends of a connection made of it.
"""

import asyncio
import fcntl
import socket
import struct

from rllib_arpo.serving.engine_client import EngineLostError
from rllib_arpo.serving.turn_places import Connection
from rllib_arpo.serving.turn_server import TurnServer
from tests.serving.engine_turns import request
from tests.serving.test_turn_connection import Endless

LIMIT_S = 200
SET_FLAGS = 0x8914  # SIOCSIFFLAGS of Linux
UP = 0x1


def switch(*, on: bool) -> None:
    """The loopback interface, on or off."""
    asked = struct.pack("16sH14s", b"lo", UP if on else 0, b"")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        fcntl.ioctl(one, SET_FLAGS, asked)


async def main() -> None:
    switch(on=True)
    engine = Endless()
    server = TurnServer(engine, host="127.0.0.1")
    connection = Connection(await server.address(), "me")
    async with asyncio.timeout(LIMIT_S):
        await connection.open()
        turn = connection.generate(request("a"))
        await anext(turn)
        switch(on=False)
        try:
            await anext(turn)
        except EngineLostError:
            print("lost")
        await engine.left.wait()
        print("left")


if __name__ == "__main__":
    asyncio.run(main())
