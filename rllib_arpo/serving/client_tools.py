"""Tools that the client runs: how the model is told of them, and how calls are read.

A chat template tells the model of them beside the agent's own tools. With tags their
names become tags, and a system text describes them. Either way a call of one stops the
answer until the client sends what it gave.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from rllib_arpo.envs.dialogue import Dialogue, ParsedTurn, ResultTokens
from rllib_arpo.envs.tag_dialogue import TagDialogue
from rllib_arpo.serving.openai_api import InvalidRequestError, ToolDefinition
from rllib_arpo.tools.tool import ToolSpec, only_text_parameter
from rllib_arpo.tree import Message

# Making a dialogue renders its template; clients repeat their tools in every request.
MAX_CACHED_DIALOGUES = 16
CANNOT = "this agent's dialogue cannot take tools of the client; leave them out"


@runtime_checkable
class OpenDialogue(Dialogue, Protocol):
    """A dialogue that further tools can be added to."""

    def with_tools(self, tools: Sequence[ToolSpec]) -> Self:
        """The same dialogue with further tools.

        Raises:
            ValueError: they cannot be added.
        """
        ...

    def call_text(self, name: str, arguments: str) -> str:
        """A call as the model writes it, of what `ParsedTurn` holds of it."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientTool:
    """A function of the client; equal ones share a cached dialogue.

    Attributes:
        name: unique among all tools.
        description: empty without one.
        parameters: JSON schema of the arguments, as text.
    """

    name: str
    description: str
    parameters: str

    @property
    def spec(self) -> ToolSpec:
        """As dialogues read it."""
        return ToolSpec(
            name=self.name,
            description=self.description,
            parameters=json.loads(self.parameters),
        )


def client_tools(
    tools: Sequence[ToolDefinition], *, server_tools: Sequence[str]
) -> tuple[ClientTool, ...]:
    """Read a request's tools.

    Args:
        tools: as the request has them.
        server_tools: names of the agent's own tools.

    Raises:
        InvalidRequestError: a name is taken.
    """
    taken = set(server_tools)
    read: list[ClientTool] = []
    for number, tool in enumerate(tools):
        function = tool.function
        if function.name in taken:
            whose = "the agent's own" if function.name in server_tools else "another"
            raise InvalidRequestError(
                f"the name {function.name!r} is that of {whose} tool: choose another",
                param=f"tools.{number}.function.name",
            )
        taken.add(function.name)
        read.append(
            ClientTool(
                name=function.name,
                description=function.description or "",
                parameters=json.dumps(_schema(function.parameters)),
            )
        )
    return tuple(read)


def _schema(parameters: Any) -> dict[str, Any]:
    given = parameters.model_dump(exclude_unset=True) if parameters else {}
    return {"type": "object", "properties": {}, **given}


@lru_cache(maxsize=MAX_CACHED_DIALOGUES)
def dialogue_with(
    dialogue: Dialogue, tools: tuple[ClientTool, ...]
) -> "ClientToolDialogue":
    """`dialogue` with tools of the client.

    Raises:
        InvalidRequestError: it cannot have them.
    """
    if not isinstance(dialogue, OpenDialogue):
        raise InvalidRequestError(CANNOT, param="tools")
    try:
        return ClientToolDialogue(dialogue, tuple(tool.spec for tool in tools))
    except (ValueError, TypeError) as error:
        raise InvalidRequestError(
            f"these tools cannot be described to the model: {error}", param="tools"
        ) from error


def write_call(
    dialogue: Dialogue, specs: Mapping[str, ToolSpec], name: str, arguments: str
) -> str:
    """A call that the client sends back, as the model had written it.

    Args:
        dialogue: the agent's, with the client's tools.
        specs: the client's tools; a call of another is written with all its JSON.
        name: of the tool.
        arguments: as the client has them.

    Raises:
        ValueError: the arguments are no JSON object.
        InvalidRequestError: the dialogue knows of no further tools.
    """
    inner = dialogue.inner if isinstance(dialogue, ClientToolDialogue) else dialogue
    if not isinstance(inner, OpenDialogue):
        raise InvalidRequestError(CANNOT, param="messages")
    values = json_object(arguments)
    if values is None:
        raise ValueError(f"{arguments[:80]!r} is no JSON object")
    spec = specs.get(name)
    parameter = only_text_parameter(spec.parameters) if spec else None
    if parameter is not None and isinstance(values.get(parameter), str):
        return inner.call_text(name, values[parameter])
    return inner.call_text(name, json.dumps(values, ensure_ascii=False))


def call_arguments(spec: ToolSpec, arguments: str) -> str:
    """Arguments as `ParsedTurn` holds them, as the JSON object that clients read."""
    parameter = only_text_parameter(spec.parameters)
    if parameter is None:
        return arguments
    return json.dumps({parameter: arguments}, ensure_ascii=False)


def json_object(text: str) -> dict[str, Any] | None:
    """The JSON object that `text` holds, None if it holds none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


class ClientToolDialogue:
    """A dialogue that also knows tools of the client.

    Args:
        dialogue: the agent's.
        tools: the client's, at least one.
    """

    def __init__(self, dialogue: OpenDialogue, tools: Sequence[ToolSpec]) -> None:
        self.inner = dialogue.with_tools(tools)
        self.client_tools = {tool.name: tool for tool in tools}

    @property
    def stop(self) -> tuple[str, ...]:
        """Strings that end a turn of the model."""
        return self.inner.stop

    def prompt_ids(self, messages: Sequence[Message]) -> NDArray[np.int32]:
        """[T] int32: the prompt; with tags a system text describes the tools."""
        if isinstance(self.inner, TagDialogue):
            messages = _described(messages, list(self.client_tools.values()))
        return self.inner.prompt_ids(messages)

    def model_ids(self, text: str) -> NDArray[np.int32]:
        """[T] int32: a whole turn."""
        return self.inner.model_ids(text)

    def decode(self, token_ids: NDArray[np.int32]) -> tuple[str, bool]:
        """Text of a turn, and whether it ended with an end-of-text token."""
        return self.inner.decode(token_ids)

    def parse(self, text: str, *, ended: bool = True) -> ParsedTurn:
        """As the agent's dialogue; a client's tool is only called with readable JSON.

        The model is told of unreadable arguments, so no client has to.
        """
        parsed = self.inner.parse(text, ended=ended)
        spec = self.client_tools.get(parsed.tool or "")
        if spec is None or parsed.refusal is not None:
            return parsed
        if json_object(call_arguments(spec, parsed.arguments)) is not None:
            return parsed
        refusal = f"the arguments of {spec.name} must be a JSON object."
        return replace(parsed, refusal=refusal, errors=(*parsed.errors, refusal))

    def format_errors(self, turns: Sequence[ParsedTurn]) -> tuple[str, ...]:
        """What breaks the format of a finished trajectory."""
        return self.inner.format_errors(turns)

    def result_ids(
        self, text: str, max_tokens: int, *, turn_ended: bool = False
    ) -> ResultTokens:
        """Encode a tool result, at most `max_tokens` ids in all."""
        return self.inner.result_ids(text, max_tokens, turn_ended=turn_ended)


def _described(messages: Sequence[Message], tools: Sequence[ToolSpec]) -> list[Message]:
    """The messages with a system text about the tools."""
    lines = ["You can also call these tools by writing between their tags:"]
    for tool in tools:
        parameter = only_text_parameter(tool.parameters)
        held = parameter or f"JSON of {json.dumps(dict(tool.parameters))}"
        line = f"<{tool.name}> {held} </{tool.name}>"
        lines.append(f"{line}: {tool.description}" if tool.description else line)
    text = "\n".join(lines)
    first, *rest = messages
    if first.role != "system":
        return [Message(role="system", content=text), first, *rest]
    return [replace(first, content=f"{first.content}\n\n{text}"), *rest]
