"""Events of an answer, as OpenAI's objects: one message, or the chunks of a stream.

What a stream's pieces join to is what the message holds: `content`,
`reasoning_content`, and the text of every turn.
"""

from dataclasses import dataclass, field
from typing import Any

from rllib_arpo.serving.events import (
    ClientCall,
    ClientToolCalls,
    Event,
    Finished,
    Thought,
    TokenUsage,
    ToolFinished,
    ToolStarted,
    TurnFinished,
    TurnReport,
    TurnText,
)
from rllib_arpo.serving.openai_api import (
    AgentToolCall,
    AgentTrace,
    AgentTurn,
    ChatCompletionChunk,
    Choice,
    ChunkChoice,
    ClientToolCall,
    Delta,
    DeltaToolCall,
    FinishReason,
    FunctionCall,
    ReplyMessage,
    Usage,
)


def collect(events: list[Event], *, index: int) -> tuple[Choice, TokenUsage]:
    """The whole answer.

    Args:
        events: all of it, `Finished` last.
        index: number of the answer.
    """
    finished = events[-1]
    assert isinstance(finished, Finished)
    reports = [event.report for event in events if isinstance(event, TurnFinished)]
    calls = [
        call
        for event in events
        if isinstance(event, ClientToolCalls)
        for call in event.calls
    ]
    thoughts = "".join(event.text for event in events if isinstance(event, Thought))
    message = ReplyMessage(
        content=finished.answer or "",
        reasoning_content=thoughts or None,
        tool_calls=[
            ClientToolCall(id=call.id, function=_function(call)) for call in calls
        ]
        or None,
        agent=AgentTrace(
            turns=[_turn(report) for report in reports],
            answer=finished.answer,
            end=finished.end,
            version=finished.version,
        ),
    )
    choice = Choice(index=index, message=message, finish_reason=finished.reason)
    return choice, finished.usage


def total_usage(usages: list[TokenUsage]) -> Usage:
    """Of all answers to a request; they share the prompt."""
    prompt = usages[0].prompt_tokens
    written = sum(usage.completion_tokens for usage in usages)
    return Usage(
        prompt_tokens=prompt, completion_tokens=written, total_tokens=prompt + written
    )


@dataclass(slots=True, kw_only=True)
class ChunkWriter:
    """Makes the chunks of a stream.

    Attributes:
        id: of the completion.
        created: Unix seconds.
        model: name of the model.
    """

    id: str
    created: int
    model: str
    _begun: set[int] = field(default_factory=set)

    def chunks(self, event: Event, *, index: int) -> list[ChatCompletionChunk]:
        """What a client is told of an event of the answer number `index`."""
        deltas = [] if index in self._begun else [Delta(role="assistant")]
        self._begun.add(index)
        reason: FinishReason | None = None
        if isinstance(event, Finished):
            reason = event.reason
            if event.answer:
                deltas.append(Delta(content=event.answer))
            deltas.append(Delta(agent=agent_event(event)))
        elif isinstance(event, Thought):
            deltas.append(Delta(reasoning_content=event.text))
        elif isinstance(event, ClientToolCalls):
            deltas.append(
                Delta(
                    tool_calls=[
                        DeltaToolCall(index=i, id=call.id, function=_function(call))
                        for i, call in enumerate(event.calls)
                    ]
                )
            )
        else:
            deltas.append(Delta(agent=agent_event(event)))
        chunks = [self._chunk(ChunkChoice(index=index, delta=d)) for d in deltas]
        if reason is not None:
            last = ChunkChoice(index=index, delta=Delta(), finish_reason=reason)
            chunks.append(self._chunk(last))
        return chunks

    def usage(self, usages: list[TokenUsage]) -> ChatCompletionChunk:
        """The last chunk, for clients that asked for the usage."""
        chunk = self._chunk()
        return chunk.model_copy(update={"usage": total_usage(usages)})

    def _chunk(self, *choices: ChunkChoice) -> ChatCompletionChunk:
        return ChatCompletionChunk(
            id=self.id, created=self.created, model=self.model, choices=list(choices)
        )


def agent_event(
    event: TurnText | ToolStarted | ToolFinished | TurnFinished | Finished,
) -> dict[str, Any]:
    """An event as `delta.agent`."""
    match event:
        case TurnText():
            return {"type": "text", "turn": event.turn, "text": event.text}
        case ToolStarted():
            return {
                "type": "tool_started",
                "turn": event.turn,
                "name": event.name,
                "arguments": event.arguments,
            }
        case ToolFinished(call=call):
            return {
                "type": "tool_finished",
                "turn": event.turn,
                "name": call.name,
                "arguments": call.arguments,
                "status": call.status,
                "result": event.result,
                "latency_s": call.latency_s,
                "truncated": call.truncated,
            }
        case TurnFinished(report=report):
            return {
                "type": "turn",
                "turn": report.turn,
                "prompt_tokens": report.prompt_tokens,
                "completion_tokens": report.completion_tokens,
                "entropy": report.entropy,
                "latency_s": report.latency_s,
            }
        case Finished():
            return {
                "type": "finished",
                "answer": event.answer,
                "end": event.end,
                "version": event.version,
            }


def _function(call: ClientCall) -> FunctionCall:
    return FunctionCall(name=call.name, arguments=call.arguments)


def _turn(report: TurnReport) -> AgentTurn:
    call = report.tool_call
    return AgentTurn(
        turn=report.turn,
        text=report.text,
        prompt_tokens=report.prompt_tokens,
        completion_tokens=report.completion_tokens,
        entropy=report.entropy,
        latency_s=report.latency_s,
        tool_call=None
        if call is None
        else AgentToolCall(
            name=call.name,
            arguments=call.arguments,
            status=call.status,
            result=report.tool_result or "",
            latency_s=call.latency_s,
            truncated=call.truncated,
        ),
    )
