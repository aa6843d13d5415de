"""What a tool is: an async call from text to text, and a fork of its state."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, Self, runtime_checkable


@runtime_checkable
class Tool(Protocol):
    """A tool in the hands of one trajectory.

    A tool with state (variables, a session) keeps it between calls of the same
    object; `fork` gives a branch its own copy. A stateless tool returns itself.

    A tool may also have `parameters`, the JSON schema of its arguments, for models
    that call tools by JSON; without it a call has one text, `input`. `arguments` is
    that text when the schema has a single text parameter, else a JSON object.

    Attributes:
        name: the tag that calls it, `<name>...</name>`.
        description: one or two sentences that the model may read.
    """

    name: str
    description: str

    async def call(self, arguments: str) -> str:
        """Run once and return what the model will read.

        The environment enforces the deadline, the retries and the token cap.

        Raises:
            ToolError: the call failed; the message becomes the observation.
        """
        ...

    def fork(self) -> Self:
        """A copy that shares no state with this one; must be cheap."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolSpec:
    """What a model is told about a tool.

    Attributes:
        name: of the tool.
        description: one or two sentences.
        parameters: JSON schema of the arguments, an object.
    """

    name: str
    description: str
    parameters: Mapping[str, Any]


def text_parameter(name: str, description: str) -> dict[str, Any]:
    """JSON schema of arguments that are a single text."""
    return {
        "type": "object",
        "properties": {name: {"type": "string", "description": description}},
        "required": [name],
    }


def only_text_parameter(parameters: Mapping[str, Any]) -> str | None:
    """Name of the one parameter of a schema if it is a text, else None."""
    properties = parameters.get("properties") or {}
    if len(properties) != 1:
        return None
    ((name, schema),) = properties.items()
    is_text = isinstance(schema, Mapping) and schema.get("type") == "string"
    return name if is_text else None


def tool_spec(tool: Tool) -> ToolSpec:
    """A tool's name, description and parameters."""
    parameters = getattr(tool, "parameters", None)
    return ToolSpec(
        name=tool.name,
        description=tool.description,
        parameters=parameters or text_parameter("input", "What the tool is given."),
    )
