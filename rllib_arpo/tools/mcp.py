"""Tools of MCP servers, with their own names, descriptions and schemas.

    server = MCPServer(command=["npx", "-y", "some-mcp-server"], env_from=["SOME_KEY"])
    env_config = {"tools": mcp_tools(server), "dialogue": "chat_template"}

The tools are listed once, where the configuration is made; what travels to the runners
is the server's settings and the schemas, and each process opens its own session
(`mcp_sessions.py`). All paths of a process share it: the protocol has no copy of a
session, so a server that keeps state shows every path the changes of the others.
"""

import asyncio
import json
import re
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

from rllib_arpo.errors import ConfigError, ToolError
from rllib_arpo.tools.mcp_server import MCPServer
from rllib_arpo.tools.mcp_sessions import call_tool, close_sessions, list_tools
from rllib_arpo.tools.tool import only_text_parameter

if TYPE_CHECKING:
    from mcp_types import CallToolResult, ContentBlock, Tool

__all__ = ["MCPServer", "MCPTool", "close_sessions", "mcp_tools", "mcp_tools_async"]

MAX_OUTPUT_CHARS = 100_000


class MCPTool:
    """A tool of an MCP server.

    Args:
        server: where it runs.
        remote_name: what the server calls it.
        name: what the model calls it.
        description: of the server.
        parameters: JSON schema of the arguments, of the server.
        max_output_chars: longer results are cut; far more than any token cap.
    """

    def __init__(
        self,
        server: MCPServer,
        remote_name: str,
        *,
        name: str,
        description: str,
        parameters: Mapping[str, Any],
        max_output_chars: int = MAX_OUTPUT_CHARS,
    ) -> None:
        self.server = server
        self.remote_name = remote_name
        self.name = name
        self.description = description
        self.parameters = dict(parameters)
        self.max_output_chars = max_output_chars

    async def call(self, arguments: str) -> str:
        """Call it on the server.

        Args:
            arguments: the text of a tool with a single text parameter, else a JSON
                object; nothing at all is an object without keys.

        Raises:
            ToolError: the arguments are no object or lack a required one, the tool
                says that it failed, or the server was lost and cannot be reached
                again (retryable).
            ToolTimeoutError: no answer within the server's `call_timeout_s`.
        """
        given = self._read(arguments)
        try:
            result = await asyncio.wrap_future(
                call_tool(self.server, self.remote_name, given)
            )
        except (RuntimeError, ValueError) as error:
            if isinstance(error, (ToolError, ConfigError)):
                raise
            # The mcp package checks results against the protocol and the tool's schema.
            raise ToolError(f"the server's answer is malformed: {error}") from error
        text = _cut(_text(result), self.max_output_chars)
        if result.is_error:
            raise ToolError(text or f"the {self.name} tool failed")
        return text

    def fork(self) -> Self:
        """Itself: a session cannot be copied."""
        return self

    def _read(self, arguments: str) -> dict[str, Any]:
        parameter = only_text_parameter(self.parameters)
        if parameter is not None:
            return {parameter: arguments}
        try:
            given = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError) as error:
            raise ToolError(f"the arguments are not JSON: {error}") from error
        if not isinstance(given, dict):
            raise ToolError("the arguments must be a JSON object")
        missing = [
            key for key in self.parameters.get("required", ()) if key not in given
        ]
        if missing:
            raise ToolError(f"the arguments lack {', '.join(missing)}")
        return given


def mcp_tools(
    server: MCPServer, *, prefix: str = "", max_output_chars: int = MAX_OUTPUT_CHARS
) -> list[MCPTool]:
    """All tools of a server; waits until it has listed them.

    Args:
        server: the server; it is started or connected to.
        prefix: put before every name, to keep the tools of two servers apart.
        max_output_chars: of each tool.

    Raises:
        ConfigError: `mcp` is not installed, the server cannot be reached, or two
            tools get the same name (characters that a tag cannot hold become "_").
    """
    try:
        listed = list_tools(server).result()
    except ToolError as error:
        raise _not_listed(error) from error
    return _tools(server, listed, prefix, max_output_chars)


async def mcp_tools_async(
    server: MCPServer, *, prefix: str = "", max_output_chars: int = MAX_OUTPUT_CHARS
) -> list[MCPTool]:
    """`mcp_tools` for callers with an event loop."""
    try:
        listed = await asyncio.wrap_future(list_tools(server))
    except ToolError as error:
        raise _not_listed(error) from error
    return _tools(server, listed, prefix, max_output_chars)


def _not_listed(error: ToolError) -> ConfigError:
    return ConfigError(
        f"no tools: {error}; check `command` or `url`, and what the server prints"
    )


def _tools(
    server: MCPServer, listed: "list[Tool]", prefix: str, max_output_chars: int
) -> list[MCPTool]:
    tools = [
        MCPTool(
            server,
            tool.name,
            name=re.sub(r"[^A-Za-z0-9_-]", "_", prefix + tool.name),
            description=tool.description or tool.title or tool.name,
            parameters=tool.input_schema,
            max_output_chars=max_output_chars,
        )
        for tool in listed
    ]
    counts = Counter(tool.name for tool in tools)
    twice = sorted(name for name, count in counts.items() if count > 1)
    if twice:
        raise ConfigError(f"the MCP server {server.label} has two tools named {twice}")
    return tools


def _text(result: "CallToolResult") -> str:
    """What a model can read of a result."""
    parts = [_part(part) for part in result.content]
    if not parts and result.structured_content is not None:
        return json.dumps(result.structured_content, ensure_ascii=False)
    return "\n".join(parts)


def _part(part: "ContentBlock") -> str:
    if part.type == "text":
        return part.text
    if part.type == "resource":
        text = getattr(part.resource, "text", None)
        return text if text is not None else f"[resource {part.resource.uri}]"
    if part.type == "resource_link":
        return f"[resource {part.uri}]"
    return f"[{part.type}]"


def _cut(text: str, max_chars: int) -> str:
    if len(text) <= max_chars:
        return text
    return f"{text[:max_chars]}\n[cut: {len(text) - max_chars} more characters]"
