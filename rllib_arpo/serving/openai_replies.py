"""Answers and errors, as they go over the wire."""

from typing import Any, Literal

from pydantic import Field, model_serializer

from rllib_arpo.serving.openai_fields import ReplyModel
from rllib_arpo.serving.openai_messages import AgentTrace, ClientToolCall

FinishReason = Literal["stop", "length", "tool_calls"]


class Usage(ReplyModel):
    """Tokens of the first prompt, and those of the model in all turns and answers."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ReplyMessage(ReplyModel):
    """The answer; the official client keeps `agent` and `reasoning_content`, too."""

    role: Literal["assistant"] = "assistant"
    content: str = Field(description="The answer, empty when the model gave none.")
    reasoning_content: str | None = None
    tool_calls: list[ClientToolCall] | None = None
    agent: AgentTrace


class Choice(ReplyModel):
    """One of `n` answers."""

    index: int
    message: ReplyMessage
    finish_reason: FinishReason


class ChatCompletion(ReplyModel):
    """The whole answer."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int = Field(description="Unix seconds.")
    model: str
    choices: list[Choice]
    usage: Usage


class DeltaToolCall(ClientToolCall):
    """A whole call: calls are not streamed in pieces."""

    index: int


class Delta(ReplyModel):
    """What is new; fields that say nothing are left out.

    `agent` is one event: `type` is text, tool_started, tool_finished, turn or finished.
    """

    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[DeltaToolCall] | None = None
    agent: dict[str, Any] | None = None

    @model_serializer(mode="plain")
    def _without_none(self) -> dict[str, Any]:
        calls = self.tool_calls
        fields = {
            "role": self.role,
            "content": self.content,
            "reasoning_content": self.reasoning_content,
            "tool_calls": calls and [call.model_dump() for call in calls],
            "agent": self.agent,
        }
        return {name: value for name, value in fields.items() if value is not None}


class ChunkChoice(ReplyModel):
    """News of one of `n` answers."""

    index: int
    delta: Delta
    finish_reason: FinishReason | None = None


class ChatCompletionChunk(ReplyModel):
    """One event of a stream; `usage` stands in the last one, if it was asked for."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None


class Model(ReplyModel):
    """An agent that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int = Field(description="Unix seconds.")
    owned_by: str = "rllib_arpo"


class ModelList(ReplyModel):
    """All agents that are served."""

    object: Literal["list"] = "list"
    data: list[Model]


class ErrorDetail(ReplyModel):
    """What went wrong."""

    message: str
    type: str = Field(description="Such as invalid_request_error.")
    param: str | None = Field(default=None, description="The dotted field.")
    code: str | None = None


class ErrorBody(ReplyModel):
    """The body of every reply that is no 2xx."""

    error: ErrorDetail
