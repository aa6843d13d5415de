"""A real MCP server for tests: `python mcp_server.py`, or with `http PORT`.

Over HTTP it prints its port, which 0 lets the system choose. It writes its process id
to the file MCP_TEST_PIDS, one line for each start. With MCP_TEST_STUBBORN it stays when
its input ends.
"""

import asyncio
import os
import signal
import socket
import sys
from pathlib import Path

import uvicorn
from mcp import MCPError
from mcp.server.mcpserver import Image, MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp_types import INTERNAL_ERROR

server = MCPServer("tests", log_level="ERROR")
counter = {"calls": 0}
authorizations: list[str] = []
waiting: set[asyncio.Event] = set()


@server.tool()
def echo(text: str) -> str:
    """Returns the text."""
    return text


@server.tool(name="math.add")
def add(a: float, b: float, note: str = "") -> str:
    """Adds two numbers."""
    return f"{a + b:g}{note}"


@server.tool()
def fail(text: str) -> str:
    """Fails."""
    raise ToolError(f"cannot do {text}")


@server.tool()
def broken() -> str:
    """Fails inside the server."""
    raise MCPError(INTERNAL_ERROR, "out of order")


@server.tool()
async def hang() -> str:
    """Never answers."""
    await asyncio.Event().wait()
    return "never"


@server.tool()
async def meet(number: int) -> str:
    """Answers when `number` calls of it are waiting."""
    mine = asyncio.Event()
    waiting.add(mine)
    if len(waiting) == number:
        for event in waiting:
            event.set()
    await mine.wait()
    return "met"


@server.tool()
def flood(size: int) -> str:
    """Returns a long text."""
    return "x" * size


@server.tool()
def count() -> str:
    """Counts its calls: state of the server."""
    counter["calls"] += 1
    return str(counter["calls"])


@server.tool()
def variable(name: str) -> str:
    """An environment variable of the server."""
    return os.environ.get(name, "(not set)")


@server.tool()
def die() -> str:
    """Ends the server in the middle of a call, as often as a file says."""
    mark = Path(os.environ["MCP_TEST_PIDS"]).with_suffix(".die")
    left = int(mark.read_text()) if mark.exists() else 0
    if left > 0:
        mark.write_text(str(left - 1))
        os._exit(1)
    return "survived"


@server.tool()
def authorization() -> str:
    """The header that the last request came with."""
    return authorizations[-1]


@server.tool(structured_output=False)
def picture() -> list[object]:
    """A text and an image."""
    return ["look:", Image(data=b"\x89PNG", format="png")]


def serve_http(port: int) -> None:
    listener = socket.create_server(("127.0.0.1", port))
    print(listener.getsockname()[1], flush=True)
    app = server.streamable_http_app()

    async def noting(scope, receive, send) -> None:
        headers = dict(scope.get("headers", ()))
        authorizations.append(headers.get(b"authorization", b"(none)").decode())
        await app(scope, receive, send)

    config = uvicorn.Config(noting, log_level="error")
    uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    if "MCP_TEST_PIDS" in os.environ:
        with open(os.environ["MCP_TEST_PIDS"], "a") as pids:
            pids.write(f"{os.getpid()}\n")
    if sys.argv[1:2] == ["http"]:
        serve_http(int(sys.argv[2]))
    else:
        server.run("stdio")
        if "MCP_TEST_STUBBORN" in os.environ:
            signal.pause()
