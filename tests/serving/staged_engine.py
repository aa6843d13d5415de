"""An agent whose model writes given turns, and stands still where a test says so.

engine = StagedEngine([Turn(call("tags", "height")), Turn(final("tags", "44"), pause)])
with engine.server(FakeTool("vifel 44")) as server:
    ... the page at server.url asks, and shows the first half of the second turn ...
    engine.go_on(pause)
"""

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rllib_arpo.engines.engine import GenerationRequest, TokenChunk
from rllib_arpo.serving.agent import Agent
from rllib_arpo.serving.engine_client import EngineChunk
from rllib_arpo.serving.http import HttpSettings, make_http_app
from rllib_arpo.serving.service import ChatService
from tests.serving.live_server import LiveServer
from tests.serving.scripted_agents import TAGS, make_env

ENTROPY = 0.25


class Pause(asyncio.Event):
    """Where a turn stands still until `StagedEngine.go_on`."""


@dataclass(frozen=True, slots=True)
class Turn:
    """A turn to write.

    Attributes:
        text: all of it.
        half: what happens behind the first half: a pause, or an error that is raised.
    """

    text: str
    half: Pause | Exception | None = None


class StagedEngine:
    """Writes the turns in their order, whoever asks.

    Attributes:
        prompts: what the model read before each turn, as text.
        left: set when a turn was given up before its end.
    """

    def __init__(self, turns: Sequence[Turn]) -> None:
        self.prompts: list[str] = []
        self.left = threading.Event()
        self._turns = list(turns)
        self._encode = make_env().dialogue.model_ids
        self._loop: asyncio.AbstractEventLoop | None = None

    def server(self, *tools: Any, **settings: Any) -> LiveServer:
        """The real HTTP server, with the models `m` and `other`."""
        agent = Agent(env=make_env(*tools))
        service = ChatService({"m": (agent, self), "other": (agent, self)})
        return LiveServer(make_http_app(service, HttpSettings(**settings)))

    def go_on(self, pause: Pause) -> None:
        """Leave a pause; from any thread, once the turn was begun."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(pause.set)

    async def generate(
        self, request: GenerationRequest, *, version: str | None = None
    ) -> AsyncIterator[EngineChunk]:
        self._loop = asyncio.get_running_loop()
        self.prompts.append(str(TAGS.decode(request.prompt_token_ids.tolist())))
        turn = self._turns.pop(0)
        ids = self._encode(turn.text)
        middle, complete = len(ids) // 2, False
        try:
            yield _chunk(ids[:middle], last=False)
            if isinstance(turn.half, Pause):
                await turn.half.wait()
            elif turn.half is not None:
                raise turn.half
            yield _chunk(ids[middle:], last=True)
            complete = True
        finally:
            if not complete:
                self.left.set()


def _chunk(ids: np.ndarray, *, last: bool) -> EngineChunk:
    numbers = np.full(len(ids), ENTROPY, np.float32)
    tokens = TokenChunk(
        token_ids=ids,
        logprobs=-numbers,
        entropies=numbers,
        policy_versions=np.zeros(len(ids), np.int32),
        finish_reason="stop" if last else None,
    )
    return EngineChunk(version="v1", tokens=tokens)
