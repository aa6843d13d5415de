"""What happens while an agent answers, in order.

    turn 0   TurnText* (and Thought*)  ToolStarted  ToolFinished  TurnFinished
    turn 1   TurnText* (and Thought*)  TurnFinished
             ClientToolCalls?  Finished

A call that is refused before it starts has a ToolFinished alone. The texts of a turn
are pieces of one text: joined, they are `TurnReport.text`.
"""

from dataclasses import dataclass
from typing import Literal

from rllib_arpo.tree import ToolCall

AnswerReason = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnText:
    """More text of the model, as it wrote it, tags included."""

    turn: int
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Thought:
    """More of what the model thinks; turns are set apart by an empty line."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolStarted:
    """A tool of the agent is about to run."""

    turn: int
    name: str
    arguments: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolFinished:
    """A tool of the agent has run, or the call was refused.

    Attributes:
        turn: number of the turn that called it.
        call: as it happened.
        result: what the model reads; paths, secrets and tracebacks are taken out of
            errors.
    """

    turn: int
    call: ToolCall
    result: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnReport:
    """One turn in numbers.

    Attributes:
        turn: from 0.
        text: all that the model wrote.
        prompt_tokens: tokens that it read.
        completion_tokens: tokens that it wrote.
        entropy: nats for a token, mean over the turn; 0 for an empty turn.
        latency_s: seconds of generation, without the tool's.
        tool_call: its call of one of the agent's tools, None without one.
        tool_result: what that gave, as in `ToolFinished`.
    """

    turn: int
    text: str
    prompt_tokens: int
    completion_tokens: int
    entropy: float
    latency_s: float
    tool_call: ToolCall | None = None
    tool_result: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnFinished:
    """A turn is over, its tool call included."""

    report: TurnReport


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientCall:
    """A call that the client has to make.

    Attributes:
        id: unique; the client's answer repeats it.
        name: of the client's tool.
        arguments: a JSON object, as text.
    """

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientToolCalls:
    """The answer goes on when the client sends what these give."""

    calls: tuple[ClientCall, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenUsage:
    """Tokens of the first prompt, and those that the model wrote in all turns."""

    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """The end of an answer.

    Attributes:
        answer: None when the model gave none.
        reason: "stop", "length" (a limit of tokens) or "tool_calls" (the client's).
        end: "answer", "no_answer", "length" or "tool_calls".
        usage: tokens.
        version: of the weights, empty when the model wrote nothing.
    """

    answer: str | None
    reason: AnswerReason
    end: str
    usage: TokenUsage
    version: str


Event = (
    TurnText
    | Thought
    | ToolStarted
    | ToolFinished
    | TurnFinished
    | ClientToolCalls
    | Finished
)
