"""What happened in an answer and when, for whoever keeps it, as it passes by."""

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Protocol

from rllib_arpo.serving.events import Event, Finished, TurnFinished, TurnReport


@dataclass(slots=True, kw_only=True)
class AnswerLog:
    """One answer.

    Attributes:
        request_id: of its request.
        choice: number of the answer among those of the request.
        model: name that the client asked for.
        messages: of the request, Pydantic models.
        begun_ns: nanoseconds since 1970.
        turns: each with the seconds since the beginning at which it was over, its tool
            call included.
        finished: the end; None: it failed, or nobody waited for it any more.
        error: why it failed.
        seconds: from the beginning to the end.
    """

    request_id: str
    choice: int
    model: str
    messages: Sequence[Any]
    begun_ns: int = field(default_factory=time.time_ns)
    turns: list[tuple[TurnReport, float]] = field(default_factory=list)
    finished: Finished | None = None
    error: str | None = None
    seconds: float = 0.0


class AnswerSink(Protocol):
    """Keeps some answers; it neither waits nor raises."""

    def wants(self) -> bool:
        """Whether the next answer is one of those."""
        ...

    def put(self, log: AnswerLog) -> None:
        """Take an answer that is over."""
        ...


async def logged(
    events: AsyncGenerator[Event, None], log: AnswerLog, sink: AnswerSink
) -> AsyncGenerator[Event, None]:
    """The same events; what they say is in the sink at their end."""
    begin = time.perf_counter()
    try:
        async with aclosing(events):
            async for event in events:
                if isinstance(event, TurnFinished):
                    log.turns.append((event.report, time.perf_counter() - begin))
                elif isinstance(event, Finished):
                    log.finished = event
                yield event
    except Exception as error:
        log.error = f"{type(error).__name__}: {error}"
        raise
    finally:
        log.seconds = time.perf_counter() - begin
        sink.put(log)
