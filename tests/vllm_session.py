"""A real vLLM for tests, on the event loop of a thread, as an EnvRunner has it."""

import asyncio
import contextlib
import os
import threading
from collections.abc import Coroutine, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import psutil
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from rllib_arpo.arrays import to_numpy
from rllib_arpo.engines.engine import (
    Engine,
    GenerationRequest,
    SamplingParams,
    TokenChunk,
)
from rllib_arpo.engines.sampling import truncate
from rllib_arpo.engines.vllm_engine import VLLMEngine
from tests.children import command_line

T = TypeVar("T")
PLAIN = SamplingParams()
# What a start needs on any machine: no graphs to record, and a small cache.
SMALL = {
    "enforce_eager": True,
    "kv_cache_memory_bytes": 64 * 2**20,
    "max_num_seqs": 64,
}


class VLLMSession:
    """An engine, and a loop for what is asked of it.

    Attributes:
        model: its folder.
        log_file: vLLM's.
        engine: bound to the loop, so coroutines go through `run`.
        processes: vLLM's.
    """

    def __init__(self, model: str, log_file: Path, **settings) -> None:
        self.model, self.log_file = model, log_file
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        before = set(psutil.Process().children(recursive=True))
        try:
            self.engine: VLLMEngine = self.run(
                VLLMEngine.start(model, log_file=log_file, **{**SMALL, **settings})
            )
        except BaseException:
            self._end_loop()
            raise
        started = set(psutil.Process().children(recursive=True)) - before
        self.processes = {p for p in started if "spawn_main" in command_line(p)}

    def run(self, coroutine: Coroutine[object, object, T]) -> T:
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        return future.result(timeout=280)

    def collect(self, *requests: GenerationRequest) -> list[TokenChunk]:
        """Answers to requests that are in flight together."""

        async def everything() -> list[TokenChunk]:
            tasks = [asyncio.create_task(collect(self.engine, r)) for r in requests]
            await asyncio.wait(tasks)
            return [task.result() for task in tasks]

        return self.run(everything())

    def score(self, token_ids: np.ndarray) -> np.ndarray:
        return self.run(self.engine.score(token_ids))

    def update(self, version: int, model: PreTrainedModel) -> None:
        self.run(self.engine.update_weights(version, weights_of(model)))

    def close(self) -> None:
        async def close() -> None:
            self.engine.close()

        self.run(close())
        self._end_loop()

    def _end_loop(self) -> None:
        async def cancel() -> None:
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

        self.run(cancel())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@contextlib.contextmanager
def vllm_session(model: str, log_file: Path, **settings) -> Iterator[VLLMSession]:
    session = VLLMSession(model, log_file, **settings)
    try:
        yield session
    finally:
        session.close()


@contextlib.contextmanager
def terminal_to(file: Path) -> Iterator[None]:
    """What this process writes meanwhile, and processes started in it for good."""
    before = [os.dup(1), os.dup(2)]
    with file.open("ab") as sink:
        os.dup2(sink.fileno(), 1)
        os.dup2(sink.fileno(), 2)
    try:
        yield
    finally:
        for number, descriptor in enumerate(before, start=1):
            os.dup2(descriptor, number)
            os.close(descriptor)


def ask(
    name: str, prompt: Sequence[int] | np.ndarray, max_tokens: int = 8, **settings
) -> GenerationRequest:
    settings = {"seed": 0, "stream_interval": 4, **settings}
    return GenerationRequest(
        request_id=name,
        prompt_token_ids=np.asarray(prompt, np.int32),
        max_tokens=max_tokens,
        **settings,
    )


def prompt_of(length: int, seed: int, vocab_size: int = 256) -> np.ndarray:
    return np.random.default_rng(seed).integers(vocab_size, size=length, dtype=np.int32)


def joined(chunks: Sequence[TokenChunk]) -> TokenChunk:
    return TokenChunk(
        token_ids=np.concatenate([c.token_ids for c in chunks]),
        logprobs=np.concatenate([c.logprobs for c in chunks]),
        entropies=np.concatenate([c.entropies for c in chunks]),
        policy_versions=np.concatenate([c.policy_versions for c in chunks]),
        finish_reason=chunks[-1].finish_reason,
    )


async def collect(engine: Engine, request: GenerationRequest) -> TokenChunk:
    return joined([chunk async for chunk in engine.generate(request)])


def load(folder: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder)


def moved(folder: str, seed: int, size: float = 0.05) -> PreTrainedModel:
    """The model of a folder a good step away, as after much training."""
    model = load(folder)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator)
    return model


def weights_of(model: PreTrainedModel) -> dict[str, np.ndarray]:
    return {name: to_numpy(p) for name, p in model.named_parameters()}


def log_distributions(
    model: PreTrainedModel,
    prompt: np.ndarray,
    tokens: np.ndarray,
    sampling: SamplingParams = PLAIN,
) -> torch.Tensor:
    """[n, V] of each of the tokens, by one plain forward pass over the sequence."""
    ids = torch.from_numpy(np.concatenate([prompt, tokens])).long()
    with torch.no_grad():
        logits = model(ids[None]).logits[0, len(prompt) - 1 : -1].float()
    logits = logits / sampling.temperature
    if sampling.top_p < 1 or sampling.top_k:
        rows = len(logits)
        logits = truncate(
            logits, np.full(rows, sampling.top_p), np.full(rows, sampling.top_k)
        )
    return logits.log_softmax(-1)


def reference(
    model: PreTrainedModel,
    prompt: np.ndarray,
    tokens: np.ndarray,
    sampling: SamplingParams = PLAIN,
) -> tuple[np.ndarray, np.ndarray]:
    """[n] logprobs of tokens and [n] entropies."""
    table = log_distributions(model, prompt, tokens, sampling)
    chosen = table.gather(1, torch.from_numpy(tokens).long()[:, None])[:, 0]
    entropies = -(table.exp() * table.clamp_min(-1e4)).sum(-1)
    return chosen.numpy(), entropies.numpy()


def assert_exact(
    model: PreTrainedModel,
    prompt: np.ndarray,
    result: TokenChunk,
    sampling: SamplingParams = PLAIN,
) -> None:
    logprobs, entropies = reference(model, prompt, result.token_ids, sampling)
    assert np.abs(result.logprobs - logprobs).mean() <= 1e-4
    assert np.abs(result.entropies - entropies).max() <= 1e-3
