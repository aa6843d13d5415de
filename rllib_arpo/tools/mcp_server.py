"""An MCP server as a setting, and the client that speaks to it.

The one file that opens connections with the `mcp` package (2.3, which speaks the
protocol's handshakes old and new). Secrets are read from environment variables here,
and go nowhere but to the server.
"""

import os
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import httpx2

from rllib_arpo.errors import ConfigError

if TYPE_CHECKING:
    from mcp import Client

# Of one answer over HTTP; what the model reads of it is far less.
MAX_EVENT_BYTES = 16 << 20
# A server may think for long before it answers: the call's own limit ends that.
HTTP_TIMEOUT = httpx2.Timeout(30.0, read=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class MCPServer:
    """An MCP server: a program to start, or a URL to connect to.

    Secrets are named by the environment variables that hold them. They are read when
    a session is opened, in the process that opens it, and are never stored.

    Attributes:
        command: program and arguments of a server that speaks over stdin and stdout.
        url: of a server that speaks streamable HTTP.
        env: variables for the program, stored with the configuration.
        env_from: names of variables of this process that are handed to the program;
            besides them it sees PATH, HOME and the like only.
        cwd: folder that the program runs in.
        headers_from_env: HTTP headers, each with the name of the variable that holds
            its whole value, as `{"Authorization": "DOCS_AUTHORIZATION"}`.
        connect_timeout_s: seconds to start the program and greet it.
        call_timeout_s: seconds for one call.

    Raises:
        ConfigError: not exactly one of `command` and `url` is given, or a value
            cannot work.
    """

    command: Sequence[str] = ()
    url: str | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    env_from: Sequence[str] = ()
    cwd: str | None = None
    headers_from_env: Mapping[str, str] = field(default_factory=dict)
    connect_timeout_s: float = 30.0
    call_timeout_s: float = 30.0

    def __post_init__(self) -> None:
        if bool(self.command) == (self.url is not None):
            raise ConfigError("an MCPServer needs either a `command` or a `url`")
        if isinstance(self.command, str):
            raise ConfigError(
                f"`command` ({self.command!r}) must be a list of program and arguments"
            )
        if self.url is not None and urlsplit(self.url).scheme not in ("http", "https"):
            raise ConfigError(
                f"`url` ({self.url!r}) must begin with http:// or https://"
            )
        for name in ("connect_timeout_s", "call_timeout_s"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"`{name}` ({getattr(self, name)}) must be above 0")

    @property
    def label(self) -> str:
        """What messages call it: the program or the host, no arguments, no secrets."""
        if self.url is not None:
            return urlsplit(self.url).hostname or "?"
        return PurePath(self.command[0]).name


def require_package() -> None:
    """Raise `ConfigError` when `mcp` is not installed."""
    try:
        import mcp  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            'tools of an MCP server need the mcp package: pip install "rllib_arpo[mcp]"'
        ) from error


def client_of(server: MCPServer) -> "Client":
    """A client that is not connected yet.

    Raises:
        ConfigError: a variable that the server names is not set.
    """
    from mcp import Client

    return Client(
        _over_http(server) if server.url is not None else _over_stdio(server),
        read_timeout_seconds=server.connect_timeout_s,
        cache=None,
    )


def _over_stdio(server: MCPServer) -> AbstractAsyncContextManager[Any]:
    from mcp.client.stdio import StdioServerParameters, stdio_client

    program, *arguments = server.command
    secrets = {name: _variable(name) for name in server.env_from}
    parameters = StdioServerParameters(
        command=program,
        args=arguments,
        env={**server.env, **secrets},
        cwd=server.cwd,
    )
    # What the program logs goes where our own errors go; notebooks put an object
    # without a file in the place of sys.stderr.
    return stdio_client(parameters, errlog=sys.__stderr__ or sys.stderr)


def _over_http(server: MCPServer) -> AbstractAsyncContextManager[Any]:
    headers = {
        header: _variable(name) for header, name in server.headers_from_env.items()
    }

    @asynccontextmanager
    async def connected() -> AsyncIterator[Any]:
        from mcp.client.streamable_http import streamable_http_client

        assert server.url is not None
        async with (
            httpx2.AsyncClient(headers=headers, timeout=HTTP_TIMEOUT) as http,
            streamable_http_client(
                server.url, http_client=http, max_sse_event_size=MAX_EVENT_BYTES
            ) as streams,
        ):
            yield streams

    return connected()


def _variable(name: str) -> str:
    value = os.environ.get(name)
    if not value:
        raise ConfigError(
            f"the environment variable {name}, which an MCPServer names, is not set in "
            "this process"
        )
    return value


def identity(server: MCPServer) -> object:
    """Equal for servers that may share a session."""
    return (
        tuple(server.command),
        server.url,
        tuple(sorted(server.env.items())),
        tuple(sorted(server.env_from)),
        server.cwd,
        tuple(sorted(server.headers_from_env.items())),
    )
