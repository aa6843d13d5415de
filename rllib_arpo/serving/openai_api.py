"""The wire types of OpenAI's chat completions, as far as an agent can honour them.

1. What would change the answer and cannot be honoured here is refused with a message
   that names the field (`logprobs`, penalties, a JSON `response_format`, ...). Fields
   that change nothing (`user`, a penalty of 0) are accepted.
2. Unknown fields are refused, but for those of an assistant's message: clients send
   back what some server gave them.
3. Nothing is converted: `"1"` is no number and 1 no boolean.
4. An answer also says how it came about: `message.agent` has the turns and tool calls.
"""

from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag

from rllib_arpo.serving.openai_fields import (
    InvalidRequestError,
    RequestModel,
    UnknownModelError,
    field_of,
    only,
    text_or_list,
)
from rllib_arpo.serving.openai_messages import (
    AgentToolCall,
    AgentTrace,
    AgentTurn,
    AssistantMessage,
    ChatMessage,
    ClientToolCall,
    FunctionCall,
    FunctionDefinition,
    FunctionParameters,
    SystemMessage,
    TextPart,
    ToolDefinition,
    ToolMessage,
    UserMessage,
)
from rllib_arpo.serving.openai_replies import (
    ChatCompletion,
    ChatCompletionChunk,
    Choice,
    ChunkChoice,
    Delta,
    DeltaToolCall,
    ErrorBody,
    ErrorDetail,
    FinishReason,
    Model,
    ModelList,
    ReplyMessage,
    Usage,
)

__all__ = [
    "AgentToolCall",
    "AgentTrace",
    "AgentTurn",
    "AssistantMessage",
    "ChatCompletion",
    "ChatCompletionChunk",
    "ChatCompletionRequest",
    "ChatMessage",
    "Choice",
    "ChunkChoice",
    "ClientToolCall",
    "Delta",
    "DeltaToolCall",
    "ErrorBody",
    "ErrorDetail",
    "FinishReason",
    "FunctionCall",
    "FunctionDefinition",
    "FunctionParameters",
    "InvalidRequestError",
    "Model",
    "ModelList",
    "ReplyMessage",
    "StreamOptions",
    "SystemMessage",
    "TextFormat",
    "TextPart",
    "ToolDefinition",
    "ToolMessage",
    "UnknownModelError",
    "Usage",
    "UserMessage",
    "field_of",
]


class TextFormat(RequestModel):
    """The only format of an answer."""

    type: Literal["text"]


class StreamOptions(RequestModel):
    """What a stream holds."""

    include_usage: bool | None = None
    include_obfuscation: Annotated[
        Literal[False] | None, only("chunks are not padded; leave it out", False)
    ] = None


StopText = Annotated[str, Field(min_length=1, max_length=64)]
Stop = Annotated[
    Annotated[StopText, Tag("@text")]
    | Annotated[
        Annotated[list[StopText], Field(min_length=1, max_length=4)], Tag("@list")
    ],
    Discriminator(text_or_list),
]
MetadataKey = Annotated[str, Field(min_length=1, max_length=64)]
MetadataText = Annotated[str, Field(max_length=8192)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]
Label = Annotated[str, Field(max_length=256)]
NoPenalty = Annotated[
    Annotated[float, Field(ge=0, le=0)] | None,
    only("only 0: tokens are sampled without penalties", 0),
]
NO_LOGPROBS = "log-probabilities are not given; `message.agent` has entropies"


class ChatCompletionRequest(RequestModel):
    """A conversation to go on with."""

    model: Annotated[str, Field(min_length=1, max_length=256)]
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=1024)]
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(
        None, description="0 takes the likeliest token. The agent's own without it."
    )
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    max_tokens: Count | None = Field(
        None, description="Most tokens that the model writes, over all its turns."
    )
    max_completion_tokens: Count | None = Field(
        None, description="The same as `max_tokens`, and goes before it."
    )
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = Field(
        None, description="Same seed, request and weights: same answer."
    )
    n: Annotated[int, Field(ge=1, le=16)] | None = Field(
        None, description="How many answers."
    )
    stop: Stop | None = Field(
        None, description="Texts that end the answer; they are cut from it."
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    tools: Annotated[list[ToolDefinition], Field(max_length=64)] | None = Field(
        None, description="Functions of the client, besides the agent's own tools."
    )
    tool_choice: (
        Annotated[
            Literal["auto", "none"],
            only("the model decides; use 'auto', or 'none'", "auto", "none"),
        ]
        | None
    ) = None
    parallel_tool_calls: bool | None = Field(
        None, description="No effect: the model makes one call at a time."
    )
    metadata: (
        Annotated[dict[MetadataKey, MetadataText], Field(max_length=16)] | None
    ) = Field(default=None, description="Given to the agent's tools.")
    user: Label | None = Field(default=None, description="No effect.")
    safety_identifier: Label | None = Field(default=None, description="No effect.")
    prompt_cache_key: Label | None = Field(default=None, description="No effect.")
    service_tier: Annotated[
        Literal["auto", "default"] | None,
        only("there is one tier; leave it out", "auto", "default"),
    ] = None

    logprobs: Annotated[Literal[False] | None, only(NO_LOGPROBS, False)] = None
    top_logprobs: Annotated[None, only(NO_LOGPROBS)] = None
    presence_penalty: NoPenalty = None
    frequency_penalty: NoPenalty = None
    logit_bias: Annotated[
        Annotated[dict[str, float], Field(max_length=0)] | None,
        only("tokens are sampled as the model gives them", {}),
    ] = None
    response_format: Annotated[
        TextFormat | None, only("answers are text", {"type": "text"})
    ] = None
    modalities: Annotated[
        Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)] | None,
        only("answers are text", ["text"]),
    ] = None
    store: Annotated[Literal[False] | None, only("answers are not stored", False)] = (
        None
    )
    audio: Annotated[None, only("answers are text")] = None
    prediction: Annotated[None, only("answers are not predicted")] = None
    reasoning_effort: Annotated[None, only("the model thinks as trained")] = None
    verbosity: Annotated[None, only("the model writes as trained")] = None
    web_search_options: Annotated[None, only("the agent has its own tools")] = None
    functions: Annotated[None, only("use `tools`")] = None
    function_call: Annotated[None, only("use `tool_choice`")] = None
