"""A shipped fake: an engine that plays given replies.

For tests of everything around an engine (rollouts, servers, trackers) without a
model. A script is a list of replies, played in the order of the requests, or a
function of the request. Delays are `asyncio.sleep`s, so a loop with a virtual
clock plays hours in milliseconds.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np

from rllib_arpo.engines.engine import GenerationRequest, TokenChunk
from rllib_arpo.errors import EngineError
from rllib_arpo.tree import FinishReason


@dataclass(frozen=True, slots=True, kw_only=True)
class ScriptedReply:
    """One turn to play.

    Attributes:
        token_ids: the tokens; cut at the request's `max_tokens`.
        entropies: nats for each token; one number serves for all.
        logprobs: for each token; one number serves for all.
        finish_reason: of the whole reply; "length" when it was cut.
        delay_s: time before each chunk.
    """

    token_ids: Sequence[int]
    entropies: Sequence[float] | float = 0.0
    logprobs: Sequence[float] | float = 0.0
    finish_reason: FinishReason = "stop"
    delay_s: float = 0.0


Script = Callable[[GenerationRequest], ScriptedReply]


class ScriptedEngine:
    """Plays a script and remembers what it was asked.

    Attributes:
        requests: every request, in order of arrival.
        weights: the arrays of the last `update_weights`.
    """

    def __init__(self, script: Script | Sequence[ScriptedReply]) -> None:
        self.requests: list[GenerationRequest] = []
        self.weights: Mapping[str, np.ndarray] = {}
        self._policy_version = 0
        self._num_tokens = 0
        self._closed = False
        self._script = script if callable(script) else _play(iter(script))

    @property
    def policy_version(self) -> int:
        return self._policy_version

    async def generate(self, request: GenerationRequest) -> AsyncIterator[TokenChunk]:
        if self._closed:
            raise EngineError("the engine is closed")
        self.requests.append(request)
        reply = self._script(request)
        total = min(len(reply.token_ids), request.max_tokens)
        cut = total < len(reply.token_ids)
        token_ids = np.asarray(reply.token_ids[:total], np.int32)
        entropies = _per_token(reply.entropies, total)
        logprobs = _per_token(reply.logprobs, total)
        starts = range(0, max(total, 1), request.stream_interval)
        for start in starts:
            await asyncio.sleep(reply.delay_s)
            piece = slice(start, start + request.stream_interval)
            last = start == starts[-1]
            count = len(token_ids[piece])
            self._num_tokens += count
            yield TokenChunk(
                token_ids=token_ids[piece],
                logprobs=logprobs[piece],
                entropies=entropies[piece],
                policy_versions=np.full(count, self._policy_version, np.int32),
                finish_reason=("length" if cut else reply.finish_reason)
                if last
                else None,
            )

    async def score(self, token_ids: np.ndarray) -> np.ndarray:
        return np.zeros(len(token_ids) - 1, np.float32)

    async def update_weights(
        self, version: int, arrays: Mapping[str, np.ndarray]
    ) -> None:
        self._policy_version = version
        self.weights = dict(arrays)

    async def sleep(self) -> None:
        pass

    async def wake_up(self) -> None:
        pass

    def hold(self) -> AbstractContextManager[None]:
        return nullcontext()

    def metrics(self) -> dict[str, float]:
        prompt = sum(len(request.prompt_token_ids) for request in self.requests)
        return {
            "num_generated_tokens": float(self._num_tokens),
            "num_prompt_tokens": float(prompt),
            "num_cached_prompt_tokens": 0.0,
        }

    def close(self) -> None:
        self._closed = True


def _per_token(values: Sequence[float] | float, count: int) -> np.ndarray:
    array = np.asarray(values, np.float32)
    return np.broadcast_to(array, count) if array.ndim == 0 else array[:count]


def _play(replies: Iterator[ScriptedReply]) -> Script:
    def script(request: GenerationRequest) -> ScriptedReply:
        try:
            return next(replies)
        except StopIteration:
            raise EngineError("the script has no reply left") from None

    return script
