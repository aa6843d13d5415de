"""Messages and tools of a chat, as they come over the wire."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Discriminator, Field, Tag

from rllib_arpo.serving.openai_fields import (
    EchoModel,
    RequestModel,
    only,
    shallow,
    text_or_list,
)
from rllib_arpo.tree import ToolStatus

MAX_TEXT_CHARS = 1_000_000
TOOL_NAME = r"^[a-zA-Z0-9_-]{1,64}$"


class TextPart(RequestModel):
    """A piece of a message; only text can be read."""

    type: Annotated[
        Literal["text"], only("messages hold text; use type 'text'", "text")
    ]
    text: Annotated[str, Field(max_length=MAX_TEXT_CHARS)]


Text = Annotated[str, Field(max_length=MAX_TEXT_CHARS)]
Content = Annotated[
    Annotated[Text, Tag("@text")]
    | Annotated[
        Annotated[list[TextPart], Field(min_length=1, max_length=64)], Tag("@list")
    ],
    Discriminator(text_or_list),
]
Name = Annotated[str, Field(min_length=1, max_length=64)]
CallId = Annotated[str, Field(min_length=1, max_length=128)]


class SystemMessage(RequestModel):
    """The operator's instructions."""

    role: Literal["system", "developer"]
    content: Content
    name: Name | None = None


class UserMessage(RequestModel):
    """What the user says."""

    role: Literal["user"]
    content: Content
    name: Name | None = None


class FunctionCall(EchoModel):
    """A call of one of the client's functions."""

    name: Annotated[str, Field(pattern=TOOL_NAME)]
    arguments: Annotated[
        str, Field(max_length=MAX_TEXT_CHARS, description="A JSON object, as text.")
    ]


class ClientToolCall(EchoModel):
    """A call that the client has to make."""

    id: CallId
    type: Literal["function"] = "function"
    function: FunctionCall


class AgentToolCall(EchoModel):
    """A call of one of the agent's own tools, and what it gave."""

    name: str
    arguments: str
    status: ToolStatus = "ok"
    result: Text = Field(
        description="What the model read, without the paths in errors."
    )
    latency_s: float = 0.0
    truncated: bool = False


class AgentTurn(EchoModel):
    """One turn of the model."""

    turn: int = Field(default=0, description="From 0.")
    text: Text = Field(description="All that the model wrote, tags included.")
    prompt_tokens: int = 0
    completion_tokens: int = 0
    entropy: float = Field(
        default=0.0, description="Nats for a token, mean over the turn."
    )
    latency_s: float = Field(default=0.0, description="Seconds of generation.")
    tool_call: AgentToolCall | None = None


class AgentTrace(EchoModel):
    """How an answer came about."""

    turns: Annotated[list[AgentTurn], Field(max_length=256)]
    answer: str | None = None
    end: str = Field(default="", description="answer, no_answer, length or tool_calls.")
    version: str = Field(default="", description="Of the weights that wrote it.")


class AssistantMessage(EchoModel):
    """What the model said before, as the client got it.

    `agent.turns` gives the model its own turns back when it goes on after a call of
    the client's tools. Without it the model only sees what is visible here.
    """

    role: Literal["assistant"]
    content: Content | None = None
    reasoning_content: Text | None = None
    tool_calls: Annotated[list[ClientToolCall], Field(max_length=64)] | None = None
    agent: AgentTrace | None = None


class ToolMessage(RequestModel):
    """What a tool of the client gave."""

    role: Literal["tool"]
    tool_call_id: CallId
    content: Content
    name: Name | None = None


def _role(value: Any) -> str | None:
    role = (
        value.get("role") if isinstance(value, dict) else getattr(value, "role", None)
    )
    known = {"developer": "@system", "system": "@system", "user": "@user"}
    known |= {"assistant": "@assistant", "tool": "@tool"}
    return known.get(role) if isinstance(role, str) else None


ChatMessage = Annotated[
    Annotated[SystemMessage, Tag("@system")]
    | Annotated[UserMessage, Tag("@user")]
    | Annotated[AssistantMessage, Tag("@assistant")]
    | Annotated[ToolMessage, Tag("@tool")],
    Discriminator(
        _role,
        custom_error_type="unknown_role",
        custom_error_message=(
            "a message is an object whose `role` is system, developer, user, "
            "assistant or tool"
        ),
    ),
]


class FunctionParameters(RequestModel):
    """JSON schema of a function's arguments: an object."""

    model_config = ConfigDict(extra="allow")

    type: Literal["object"] = "object"
    properties: dict[str, dict[str, Any]] = Field(default_factory=dict)
    required: list[str] | None = None


class FunctionDefinition(RequestModel):
    """A function of the client."""

    name: Annotated[str, Field(pattern=TOOL_NAME)]
    description: Annotated[str, Field(max_length=4096)] | None = None
    parameters: Annotated[FunctionParameters, BeforeValidator(shallow)] | None = None
    strict: bool | None = Field(
        default=None,
        description="Taken, as OpenAI's clients send it, and without effect: the model "
        "reads the schema, but its arguments need not match it. They are always a JSON "
        "object; check them.",
    )


class ToolDefinition(RequestModel):
    """A tool that the client runs itself."""

    type: Annotated[
        Literal["function"], only("tools are functions; use 'function'", "function")
    ]
    function: FunctionDefinition
