"""Turns of a model for whoever serves answers, wherever the engine runs.

`TurnEngine` is what an agent loop asks; `InProcessEngine` answers from an engine of
this process, `serve_engine.ServeEngine` from replicas of a Ray Serve deployment. One
version of the weights writes all turns of an answer: the first takes the newest, the
later ones name the version of the first.
"""

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np

from rllib_arpo.engines.engine import (
    Engine,
    GenerationRequest,
    TokenChunk,
    request_problem,
)
from rllib_arpo.errors import EngineError


class EngineLostError(EngineError):
    """The engine stopped, or its replica is gone; the same turn may be asked again."""


class EngineBusyError(EngineLostError):
    """More turns wait for the engine than may wait."""


class VersionGoneError(EngineError):
    """The version that an answer was begun with is not loaded any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineChunk:
    """Freshly sampled tokens, and who sampled them.

    Attributes:
        version: of the weights; the later turns of the answer ask for it.
        tokens: as the engine gave them.
    """

    version: str
    tokens: TokenChunk


class TurnEngine(Protocol):
    """Generates turns for an agent loop."""

    def generate(
        self, request: GenerationRequest, *, version: str | None = None
    ) -> AsyncIterator[EngineChunk]:
        """Stream one turn; closing the iterator early cancels the request.

        Args:
            request: the turn. `stream_interval` says how many tokens make a chunk:
                `max_tokens` gives the turn in one.
            version: of the weights, as in a chunk of the answer's first turn; None
                takes the newest.

        Raises:
            VersionGoneError: there is no such version any more.
            EngineLostError: the engine or its replica is gone; may be asked again.
            EngineError: the request is wrong.
        """
        ...


class InProcessEngine:
    """An engine of this process and event loop.

    Args:
        engine: closed by whoever made it.
        version: of its weights.
    """

    def __init__(self, engine: Engine, *, version: str = "local") -> None:
        self.engine = engine
        self.version = version

    async def generate(
        self, request: GenerationRequest, *, version: str | None = None
    ) -> AsyncIterator[EngineChunk]:
        """As `TurnEngine.generate`."""
        if version not in (None, self.version):
            raise version_gone(version, (self.version,))
        async with aclosing(turn(self.engine, request, self.version)) as chunks:
            async for chunk in chunks:
                yield chunk


async def turn(
    engine: Engine, request: GenerationRequest, version: str
) -> AsyncGenerator[EngineChunk, None]:
    """One turn of an engine whose weights have that version.

    Raises:
        EngineError: the request is wrong.
        EngineLostError: the engine failed or was closed.
    """
    # What the vocabulary holds is known to the tokenizer that wrote the prompt.
    problem = request_problem(request, vocab_size=np.iinfo(np.int32).max)
    if problem is not None:
        raise EngineError(f"cannot generate for {request.request_id!r}: {problem}")
    # Engines are async generators, which the protocol does not say.
    generator = cast(Any, engine.generate(request))
    try:
        async with aclosing(generator) as chunks:
            async for chunk in chunks:
                yield EngineChunk(version=version, tokens=chunk)
    except EngineError as error:
        raise EngineLostError(f"the engine stopped: {error}") from error


def version_gone(asked: str | None, held: Sequence[str]) -> VersionGoneError:
    """What to raise where a version is asked for that is not held."""
    return VersionGoneError(
        f"version {asked!r} of the weights is not loaded any more, only "
        f"{', '.join(held)}: begin the answer anew"
    )
