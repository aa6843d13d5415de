"""What every engine does: token ids in, a stream of sampled tokens out.

One request is one turn of one path. A continuation or a branch is a new request
whose prompt repeats the tokens so far; engines keep a prefix cache, so repeating
them is cheap. Text never enters an engine.
"""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from rllib_arpo.tree import NO_FLOATS, NO_INTS, FinishReason


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to sample.

    Attributes:
        temperature: logits are divided by it; 0 takes the most likely token (its
            logprob is then 0 and the entropy 0: the distribution is a point).
        top_p: nucleus; 1 keeps all tokens.
        top_k: keep the k most likely tokens; 0 keeps all.
        stop: strings that end the turn. They are matched on the bytes of the
            tokens, so a tag may be split over tokens in any way; the tokens that
            complete it are kept.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One turn to generate.

    Attributes:
        request_id: unique among the requests in flight.
        prompt_token_ids: [T] int32, every token of the path so far.
        max_tokens: most tokens to generate, at least 1.
        seed: all randomness of this request; same seed and prompt, same tokens.
        sampling: how to sample.
        stream_interval: a chunk is yielded after at least so many tokens, and at the
            end.
    """

    request_id: str
    prompt_token_ids: np.ndarray
    max_tokens: int
    seed: int
    sampling: SamplingParams = SamplingParams()
    stream_interval: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenChunk:
    """Freshly sampled tokens of one request.

    Attributes:
        token_ids: [n] int32.
        logprobs: [n] float32, log-probability of each token under the distribution
            that it was sampled from (after temperature, top-p and top-k).
        entropies: [n] float32, nats, of that distribution over all tokens.
        policy_versions: [n] int32.
        finish_reason: None but for the last chunk: "stop" (a stop string), "eos",
            or "length" (max_tokens or the model's context is used up).
    """

    token_ids: np.ndarray
    logprobs: np.ndarray
    entropies: np.ndarray
    policy_versions: np.ndarray
    finish_reason: FinishReason | None = None


# All that a turn gets whose prompt fills the model's context.
NO_ROOM = TokenChunk(
    token_ids=NO_INTS,
    logprobs=NO_FLOATS,
    entropies=NO_FLOATS,
    policy_versions=NO_INTS,
    finish_reason="length",
)


def join(chunks: Sequence[TokenChunk]) -> TokenChunk:
    """One chunk of at least one, in their order."""
    if len(chunks) == 1:
        return chunks[0]
    return TokenChunk(
        token_ids=np.concatenate([chunk.token_ids for chunk in chunks]),
        logprobs=np.concatenate([chunk.logprobs for chunk in chunks]),
        entropies=np.concatenate([chunk.entropies for chunk in chunks]),
        policy_versions=np.concatenate([chunk.policy_versions for chunk in chunks]),
        finish_reason=chunks[-1].finish_reason,
    )


@runtime_checkable
class Engine(Protocol):
    """Generates tokens for an EnvRunner, an evaluation or a server.

    All methods are called from the thread of one event loop.
    """

    @property
    def policy_version(self) -> int:
        """Version of the weights in use, stamped on every token."""
        ...

    def generate(self, request: GenerationRequest) -> AsyncIterator[TokenChunk]:
        """Stream one turn; closing the iterator early cancels the request.

        Raises:
            EngineError: the engine cannot generate.
        """
        ...

    async def score(self, token_ids: np.ndarray) -> np.ndarray:
        """Log-probabilities of given tokens under the weights in use.

        Args:
            token_ids: [T] int32.

        Returns:
            [T-1] float32, of each token but the first given those before it, at
            temperature 1.

        Raises:
            EngineError: the engine cannot compute.
        """
        ...

    async def update_weights(
        self, version: int, arrays: Mapping[str, np.ndarray]
    ) -> None:
        """Take new weights; requests in flight go on with them.

        Args:
            version: stamped on tokens from now on.
            arrays: Hugging Face parameter name -> array (bfloat16 as the numpy
                dtype of `ml_dtypes`); tied weights once.

        Raises:
            WeightSyncError: names or shapes differ from the model's.
        """
        ...

    async def sleep(self) -> None:
        """Give the accelerator's memory back while nothing is in flight."""
        ...

    async def wake_up(self) -> None:
        """Take the memory again; before the next request or update of weights."""
        ...

    def hold(self) -> AbstractContextManager[None]:
        """Held around a tool call by a deterministic run.

        The engine takes no step while anyone holds it, so batches do not depend on
        how long tools take. An engine without a deterministic mode returns a null
        context.
        """
        ...

    def metrics(self) -> dict[str, float]:
        """Counters since the start, and levels.

        num_generated_tokens, num_prompt_tokens, num_cached_prompt_tokens,
        num_context_overflows (turns that the model's context ended), step_time_s
        (seconds in which it generated), and whatever else the engine knows;
        `rllib_arpo.metrics` names the levels.
        """
        ...

    def close(self) -> None:
        """Free memory; requests in flight fail with `EngineError`."""
        ...


def request_problem(request: GenerationRequest, vocab_size: int) -> str | None:
    """What is wrong with a request, whatever the engine's state."""
    prompt, sampling = request.prompt_token_ids, request.sampling
    if len(prompt) == 0:
        return "the prompt is empty"
    if prompt.min() < 0 or prompt.max() >= vocab_size:
        return (
            f"token ids run from {prompt.min()} to {prompt.max()}, but the model has "
            f"a vocabulary of {vocab_size}"
        )
    if request.max_tokens < 1 or request.stream_interval < 1:
        return (
            f"max_tokens ({request.max_tokens}) and stream_interval "
            f"({request.stream_interval}) must be >= 1"
        )
    if not (sampling.temperature >= 0 < sampling.top_p <= 1):
        return (
            f"temperature ({sampling.temperature}) must be >= 0 and top_p "
            f"({sampling.top_p}) in (0, 1]"
        )
    if sampling.top_k < 0 or "" in sampling.stop:
        return f"top_k ({sampling.top_k}) must be >= 0 and stop without ''"
    return None
