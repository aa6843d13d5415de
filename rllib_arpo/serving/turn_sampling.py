"""Turns of one answer, sampled by an engine that may be lost or get new weights.

1. A lost engine is asked for the same turn with the same seed, which gives the same
   tokens, as long as nobody has seen a text of it.
2. All turns are written by one version of the weights, or the answer is given up.
3. Nothing is waited for beyond the request's time.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np

from rllib_arpo.engines.engine import GenerationRequest
from rllib_arpo.envs.dialogue import Dialogue
from rllib_arpo.errors import ARPOError
from rllib_arpo.serving.engine_client import (
    EngineLostError,
    TurnEngine,
    VersionGoneError,
)
from rllib_arpo.serving.events import Thought, TurnText
from rllib_arpo.serving.turn_text import ThoughtReader, TurnReader, starts_thinking

MAX_TURN_RETRIES = 2
RETRY_DELAY_S = 0.1


class RequestTimeoutError(ARPOError, TimeoutError):
    """An answer took longer than a request may."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Deadline:
    """When an answer must be complete.

    Attributes:
        at: on the clock of the event loop.
        max_request_s: how long that was from the start.
    """

    at: float
    max_request_s: float

    def __call__(self) -> "_InTime":
        """A context to wait in; only around awaits, never around a `yield`.

        Raises:
            RequestTimeoutError: the time is up.
        """
        return _InTime(self)


class _InTime:
    def __init__(self, deadline: Deadline) -> None:
        self._deadline = deadline
        self._scope = asyncio.timeout_at(deadline.at)

    async def __aenter__(self) -> None:
        await self._scope.__aenter__()

    async def __aexit__(self, *error: Any) -> None:
        try:
            await self._scope.__aexit__(*error)
        except TimeoutError as late:
            raise RequestTimeoutError(
                "the answer was not complete after "
                f"{self._deadline.max_request_s:g} seconds, the most that a request "
                "may take: ask for fewer tokens"
            ) from late


@dataclass(slots=True, kw_only=True)
class SampledTurn:
    """What the engine has streamed of a turn.

    Attributes:
        reader: its tokens and text.
        thoughts: what of the text is thinking.
        entropies: [n] float32 of each chunk, nats.
        done: whether the engine has ended the turn.
        latency_s: seconds of generation.
    """

    reader: TurnReader
    thoughts: ThoughtReader
    entropies: list[np.ndarray] = field(default_factory=list)
    done: bool = False
    latency_s: float = 0.0

    @property
    def entropy(self) -> float:
        """Nats for a token, mean over the turn; 0 for an empty one."""
        values = np.concatenate(self.entropies) if self.entropies else np.zeros(0)
        return float(values.mean()) if len(values) else 0.0


class TurnSampler:
    """Samples the turns of one answer.

    Args:
        engine: writes them.
        dialogue: reads them.
        stop: texts of the client that end a turn.
        live: text is given while it is written, not in one piece.
        deadline: of the whole answer.

    Attributes:
        version: of the weights; None before the first token.
        in_time: the deadline, for whatever else the answer waits for.
        turn: the last one.
    """

    def __init__(
        self,
        engine: TurnEngine,
        dialogue: Dialogue,
        *,
        stop: Sequence[str],
        live: bool,
        deadline: Deadline,
    ) -> None:
        self._engine = engine
        self._dialogue = dialogue
        self._stop = stop
        self._live = live
        self.in_time = deadline
        # A template that opens the think block does so for every turn.
        self._opened = starts_thinking(dialogue)
        self._has_thoughts = False
        self.version: str | None = None
        self.turn = self._new_turn()

    async def sample(
        self, request: GenerationRequest, *, number: int
    ) -> AsyncGenerator[TurnText | Thought, None]:
        """Sample one turn; then `turn` holds it.

        Args:
            request: the turn; every attempt gets an id of its own.
            number: of the turn, for its events.

        Raises:
            EngineLostError: the engine is lost, or holds other weights by now.
            RequestTimeoutError: the time is up.
        """
        attempt, seen = 0, False
        while True:
            numbered = replace(request, request_id=f"{request.request_id}/{attempt}")
            try:
                async with aclosing(self._attempt(numbered, number)) as events:
                    async for event in events:
                        seen = True
                        yield event
                return
            except VersionGoneError as error:
                raise EngineLostError(
                    f"the answer cannot be gone on with, ask again: {error}"
                ) from error
            except EngineLostError:
                if seen or attempt == MAX_TURN_RETRIES:
                    raise
            async with self.in_time():
                await asyncio.sleep(RETRY_DELAY_S * 2**attempt)
            attempt += 1

    async def _attempt(
        self, request: GenerationRequest, number: int
    ) -> AsyncGenerator[TurnText | Thought, None]:
        self.turn = turn = self._new_turn()
        start = time.monotonic()
        # Engines are async generators, which their protocol does not say.
        generator = cast(Any, self._engine.generate(request, version=self.version))
        async with aclosing(generator) as chunks:
            while True:
                async with self.in_time():
                    chunk = await anext(chunks, None)
                if chunk is None:
                    break
                self._check_version(chunk.version)
                turn.entropies.append(chunk.tokens.entropies)
                turn.done = chunk.tokens.finish_reason is not None
                text = turn.reader.feed(chunk.tokens.token_ids.tolist())
                if self._live:
                    for event in self._events(text, number):
                        yield event
        if not turn.done:
            raise EngineLostError("the engine's stream ended in the middle of a turn")
        turn.latency_s = time.monotonic() - start
        rest = turn.reader.finish()
        for event in self._events(rest if self._live else turn.reader.text, number):
            yield event
        if thought := turn.thoughts.finish():
            yield Thought(text=thought)
        self._has_thoughts = turn.thoughts.follows

    def _new_turn(self) -> SampledTurn:
        return SampledTurn(
            reader=TurnReader(self._dialogue, self._stop),
            thoughts=ThoughtReader(self._opened, self._has_thoughts),
        )

    def _events(self, text: str, number: int) -> list[TurnText | Thought]:
        if not text:
            return []
        events: list[TurnText | Thought] = [TurnText(turn=number, text=text)]
        if thought := self.turn.thoughts.feed(text):
            events.append(Thought(text=thought))
        return events

    def _check_version(self, version: str) -> None:
        if self.version not in (None, version):
            raise VersionGoneError(
                f"it was begun by version {self.version!r} of the weights, and "
                f"{version!r} answered"
            )
        self.version = version
