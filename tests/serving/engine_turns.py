"""Turns asked of an engine, and what came back."""

import numpy as np

from rllib_arpo.engines.engine import GenerationRequest, SamplingParams
from rllib_arpo.serving.engine_client import EngineChunk, TurnEngine

PROMPT = np.arange(5, 25, dtype=np.int32)


def request(
    request_id: str = "turn",
    *,
    prompt: np.ndarray = PROMPT,
    max_tokens: int = 12,
    stream_interval: int = 1,
    seed: int = 7,
    temperature: float = 1.0,
) -> GenerationRequest:
    return GenerationRequest(
        request_id=request_id,
        prompt_token_ids=prompt,
        max_tokens=max_tokens,
        seed=seed,
        sampling=SamplingParams(temperature=temperature),
        stream_interval=stream_interval,
    )


async def collect(
    engine: TurnEngine, asked: GenerationRequest, version: str | None = None
) -> list[EngineChunk]:
    return [chunk async for chunk in engine.generate(asked, version=version)]


def token_ids(chunks: list[EngineChunk]) -> list[int]:
    return [int(token) for chunk in chunks for token in chunk.tokens.token_ids]
