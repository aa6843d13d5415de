"""Sessions with MCP servers: one per server and process, shared by all paths.

A session of the `mcp` package has to be opened and closed by one and the same task, so
each lives in a task on an event loop of its own, in a thread that the first use starts.
Calls come from any event loop and run side by side in the session.

A session that is lost (the server died, or was started anew) is opened again, and the
call that found it lost is made once more: a server may see such a call twice. Sessions
are closed when the process ends; a process forked from one that has sessions opens its
own.
"""

import asyncio
import atexit
import os
import threading
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any, TypeVar

from rllib_arpo.errors import ToolError, ToolTimeoutError
from rllib_arpo.tools.mcp_server import MCPServer, client_of, identity, require_package

if TYPE_CHECKING:
    from mcp import Client
    from mcp_types import CallToolResult, Tool

T = TypeVar("T")

MAX_TOOL_PAGES = 100
# A server has two seconds to end by itself; then the mcp package ends it.
CLOSE_S = 10.0


def list_tools(server: MCPServer) -> "Future[list[Tool]]":
    """All tools of a server.

    Fails with `ToolError` when the server cannot be reached, with `ConfigError` when
    a variable that it names is not set or `mcp` is not installed.
    """
    require_package()
    sessions = _sessions()
    return sessions.submit(sessions.list_tools(server))


def call_tool(
    server: MCPServer, name: str, arguments: dict[str, Any]
) -> "Future[CallToolResult]":
    """Call a tool; fails as `list_tools` does, and with `ToolTimeoutError`."""
    require_package()
    sessions = _sessions()
    return sessions.submit(sessions.call_tool(server, name, arguments))


def close_sessions() -> None:
    """Close all sessions of this process; a later call opens them anew."""
    global _the_sessions
    with _lock:
        sessions, _the_sessions = _the_sessions, None
    if sessions is not None and sessions.pid == os.getpid():
        sessions.close()


class _Session:
    """One session and the task that it lives in."""

    def __init__(self, server: MCPServer) -> None:
        self.closing = asyncio.Event()
        self.client: asyncio.Future[Client] = asyncio.Future()
        self.task = asyncio.create_task(self._live(server, client_of(server)))

    async def _live(self, server: MCPServer, connecting: "Client") -> None:
        try:
            async with AsyncExitStack() as stack:
                async with asyncio.timeout(server.connect_timeout_s):
                    client = await stack.enter_async_context(connecting)
                self.client.set_result(client)
                await self.closing.wait()
        except Exception as error:  # boundary: whatever a transport fails with
            if self.client.done():
                return  # who calls next finds the session lost
            failure = ToolError(
                f"the MCP server {server.label} cannot be reached "
                f"({_what_happened(error)})",
                retryable=True,
            )
            failure.__cause__ = error
            self.client.set_exception(failure)
            self.client.exception()  # nobody may be waiting for it any more


class _Sessions:
    """The sessions of a process, and the thread with their event loop."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self._loop = asyncio.new_event_loop()
        self._open: dict[object, _Session] = {}
        self._ended: set[asyncio.Task[None]] = set()
        self._closed = False
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="mcp-sessions", daemon=True
        )
        self._thread.start()

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def list_tools(self, server: MCPServer) -> "list[Tool]":
        async def collect(client: "Client") -> "list[Tool]":
            tools: list[Tool] = []
            cursor = None
            for _ in range(MAX_TOOL_PAGES):
                page = await client.list_tools(cursor=cursor)
                tools += page.tools
                cursor = page.next_cursor
                if cursor is None:
                    break
            return tools

        return await self._use(server, collect)

    async def call_tool(
        self, server: MCPServer, name: str, arguments: dict[str, Any]
    ) -> "CallToolResult":
        return await self._use(
            server,
            lambda client: client.call_tool(
                name, arguments, read_timeout_seconds=server.call_timeout_s
            ),
        )

    async def _use(
        self, server: MCPServer, use: "Callable[[Client], Awaitable[T]]"
    ) -> T:
        """Run `use` in the server's session, once more in a new one if it was lost."""
        from mcp import MCPError
        from mcp_types import (
            CONNECTION_CLOSED,
            INTERNAL_ERROR,
            INVALID_REQUEST,
            REQUEST_TIMEOUT,
        )

        # The transport's own words for a server that is gone, and one that has
        # forgotten us. Every other code is an answer to this very call.
        lost_codes = (CONNECTION_CLOSED, INVALID_REQUEST)
        lost = ""
        for _ in range(2):
            session = self._session(server)
            try:
                # The session is shared: who gives up waiting must not end it.
                client = await asyncio.shield(session.client)
            except ToolError:
                self._drop(server, session)
                raise
            try:
                return await use(client)
            except MCPError as error:
                if error.code == REQUEST_TIMEOUT:
                    raise ToolTimeoutError(
                        f"the MCP server {server.label} did not answer in time"
                    ) from error
                if error.code not in lost_codes:
                    inside = error.code == INTERNAL_ERROR
                    raise ToolError(error.message, retryable=inside) from error
                lost = error.message
            self._drop(server, session)
        raise ToolError(
            f"the MCP server {server.label} failed ({lost})", retryable=True
        )

    def _session(self, server: MCPServer) -> _Session:
        if self._closed:
            raise ToolError("the sessions with MCP servers are closed", retryable=True)
        key = identity(server)
        session = self._open.get(key)
        if session is None or session.task.done():
            session = self._open[key] = _Session(server)
        return session

    def _drop(self, server: MCPServer, session: _Session) -> None:
        """Close a session, unless another call has done so already."""
        session.closing.set()
        key = identity(server)
        if self._open.get(key) is session:
            del self._open[key]
            self._ended.add(session.task)
            session.task.add_done_callback(self._ended.discard)

    async def _close_all(self) -> None:
        self._closed = True
        tasks = set(self._ended)
        for session in self._open.values():
            session.closing.set()
            tasks.add(session.task)
        self._open.clear()
        if tasks:
            await asyncio.wait(tasks, timeout=CLOSE_S)
        # Whoever still waits for a call is told that it was cancelled.
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    def close(self) -> None:
        self.submit(self._close_all()).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


_lock = threading.Lock()
_the_sessions: _Sessions | None = None


def _sessions() -> _Sessions:
    global _the_sessions
    with _lock:
        if _the_sessions is None or _the_sessions.pid != os.getpid():
            _the_sessions = _Sessions()
        return _the_sessions


def _after_fork_in_child() -> None:
    global _lock
    _lock = threading.Lock()  # the parent's may have been held by another thread


os.register_at_fork(after_in_child=_after_fork_in_child)
atexit.register(close_sessions)


def _what_happened(error: BaseException) -> str:
    """The first cause in a tree of exception groups, without its details."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, TimeoutError):
        return "no answer in time"
    return type(error).__name__
