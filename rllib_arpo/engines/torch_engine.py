"""The in-process engine: a Hugging Face model, batched token by token.

This is the asynchronous shell: requests, the step loop, weights, failures. What a
step does is in `batch.py`, how the model is run in `model_runner.py`. The loop runs
as a task while there is work and between steps gives way to the paths' coroutines,
so a request may join or leave at any step.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self, TypedDict, Unpack

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rllib_arpo.engines.batch import Batch, Sequence
from rllib_arpo.engines.engine import (
    NO_ROOM,
    GenerationRequest,
    TokenChunk,
    request_problem,
)
from rllib_arpo.engines.model_runner import ModelRunner, context_length
from rllib_arpo.engines.sampling import eos_ids, token_bytes
from rllib_arpo.errors import ConfigError, EngineError
from rllib_arpo.lora import AdapterMerger

# Turns of the event loop without news after which, in deterministic mode, every
# path has made its move.
_QUIET_TURNS = 8


class Settings(TypedDict, total=False):
    """The keyword arguments of `TorchEngine`, but for `dtype` and `lora`."""

    max_num_seqs: int
    max_model_len: int | None
    prefix_cache_tokens: int
    device: str | torch.device | None
    deterministic: bool


class TorchEngine:
    """Generates with a Hugging Face causal LM in this process, on CPU or GPU.

    The same seed and prompt give the same tokens whatever else is in flight, up to
    the rounding of the batched forward pass. In deterministic mode the batches
    themselves do not depend on timing: the engine waits while a path holds it (a
    tool runs) and takes in requests by id.

    Args:
        model: any causal LM whose layers attend to all tokens.
        tokenizer: gives the tokens' bytes for stop strings, and EOS.
        max_num_seqs: most sequences that run at a time; others wait.
        max_model_len: most tokens of a sequence; None takes the model's context.
        prefix_cache_tokens: tokens of finished sequences kept for reuse.
        device: moved there when given.
        dtype: the parameters are cast to it when given.
        lora: as from `lora_settings`; updates are then adapters, which are added to
            the weights.
        deterministic: see above.

    Raises:
        ConfigError: the model or a setting cannot work.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_num_seqs: int = 64,
        max_model_len: int | None = None,
        prefix_cache_tokens: int = 65_536,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        lora: Mapping[str, Any] | None = None,
        deterministic: bool = False,
    ) -> None:
        context = context_length(model)
        if max_num_seqs < 1:
            raise ConfigError(f"`max_num_seqs` ({max_num_seqs}) must be >= 1")
        if max_model_len is not None and not 1 < max_model_len <= context:
            raise ConfigError(
                f"`max_model_len` ({max_model_len}) must lie between 2 and the "
                f"model's context of {context} tokens"
            )
        self.max_num_seqs = max_num_seqs
        self.max_model_len = max_model_len or context
        self.deterministic = deterministic
        if len(tokenizer) <= len(tokenizer.added_tokens_decoder):
            raise ConfigError(
                f"the tokenizer knows {len(tokenizer)} special tokens and no others: "
                "its folder lacks the tokenizer's files"
            )
        if device is not None:
            torch.nn.Module.to(model, device)
        for parameter in model.parameters() if dtype is not None else ():
            # Buffers, such as rotary frequencies, keep their precision.
            parameter.data = parameter.data.to(dtype)
        self._runner = ModelRunner(model)
        self._merger = None if lora is None else AdapterMerger(model, lora)
        # A configuration may name an EOS beyond the vocabulary: never sampled.
        is_eos = np.isin(
            np.arange(self._runner.vocab_size),
            eos_ids(model.generation_config or model.config, tokenizer),
        )
        self._batch = Batch(
            self._runner,
            token_bytes(tokenizer, self._runner.vocab_size),
            is_eos,
            max_num_seqs=max_num_seqs,
            prefix_cache_tokens=prefix_cache_tokens,
        )
        self._waiting: dict[str, Sequence] = {}
        self._task: asyncio.Task[None] | None = None
        self._released: asyncio.Future[None] | None = None
        self._step_time_s = 0.0
        self._holders = self._news = self._version = 0
        self._num_context_overflows = 0
        self._closed = False

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | Path,
        *,
        dtype: torch.dtype | None = None,
        lora: Mapping[str, Any] | None = None,
        **settings: Unpack[Settings],
    ) -> Self:
        """Load model and tokenizer; `settings` are the constructor's.

        Raises:
            ConfigError: there is no causal LM or no tokenizer.
        """
        try:
            model = AutoModelForCausalLM.from_pretrained(name_or_folder, dtype=dtype)
            tokenizer = AutoTokenizer.from_pretrained(name_or_folder)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"cannot load a causal LM with its tokenizer from {name_or_folder}: "
                f"{error}"
            ) from error
        return cls(model, tokenizer, lora=lora, **settings)

    @property
    def policy_version(self) -> int:
        return self._version

    def metrics(self) -> dict[str, float]:
        """Counters since the start, and what runs, waits and is cached."""
        return {
            **self._batch.counts,
            "num_context_overflows": self._num_context_overflows,
            "step_time_s": self._step_time_s,
            "num_running": len(self._batch.running),
            "num_waiting": len(self._waiting),
            "prefix_cache_tokens": self._batch.tree.num_tokens,
        }

    async def generate(self, request: GenerationRequest) -> AsyncIterator[TokenChunk]:
        """Stream one turn; closing the iterator early cancels the request.

        A prompt that fills the context gives one empty chunk, "length".

        Raises:
            EngineError: the request is wrong, the engine is closed, or a step
                failed.
        """
        self._check(request)
        room = self.max_model_len - len(request.prompt_token_ids)
        if room <= 0:
            self._num_context_overflows += 1
            yield NO_ROOM
            return
        sequence = Sequence(request)
        self._waiting[request.request_id] = sequence
        self._news += 1
        self._start()
        try:
            while True:
                item = await sequence.outbox.get()
                if isinstance(item, EngineError):
                    raise item
                if item.finish_reason == "length" and room < request.max_tokens:
                    self._num_context_overflows += 1
                yield item
                if item.finish_reason is not None:
                    return
        finally:
            self._cancel(sequence)

    @contextmanager
    def hold(self) -> Iterator[None]:
        """In deterministic mode, no step runs inside: for the time of a tool call.

        Never generate inside: the request would wait for its own release.
        """
        self._holders += 1
        self._news += 1
        try:
            yield
        finally:
            self._holders -= 1
            self._news += 1
            released, self._released = self._released, None
            if self._holders:
                self._released = released
            elif released is not None and not released.done():
                released.set_result(None)

    async def score(self, token_ids: np.ndarray) -> np.ndarray:
        """Log-probabilities of given tokens, at temperature 1."""
        return self._runner.score(token_ids)

    async def update_weights(
        self, version: int, arrays: Mapping[str, np.ndarray]
    ) -> None:
        """Take new weights; requests in flight go on with them."""
        if self._merger is None:
            self._runner.load_weights(arrays)
        else:
            self._merger.load(arrays)
        self._version = version
        self._batch.recompute()

    def forget(self) -> None:
        """Drop the prefixes of finished sequences: those computed anew round alike."""
        self._batch.tree.clear()

    async def sleep(self) -> None:
        """Give the memory of keys and values back; weights stay where they are."""
        self._fail("the engine was put to sleep", None)

    async def wake_up(self) -> None:
        """Nothing to do: memory is taken when it is needed."""

    def close(self) -> None:
        """Free memory; requests in flight fail with `EngineError`."""
        self._closed = True
        self._fail("the engine was closed", None)

    def _check(self, request: GenerationRequest) -> None:
        running = (sequence.request.request_id for sequence in self._batch.running)
        problem = request_problem(request, self._runner.vocab_size)
        if self._closed:
            problem = "the engine was closed"
        elif request.request_id in self._waiting or request.request_id in running:
            problem = "a request with this id is in flight"
        if problem:
            raise EngineError(f"cannot generate for {request.request_id!r}: {problem}")

    def _start(self) -> None:
        loop = asyncio.get_running_loop()
        if self._task is None or self._task.done() or self._task.get_loop() is not loop:
            self._task = loop.create_task(self._run())

    async def _run(self) -> None:
        """Step while there is work. The task ends with it, so no loop keeps one."""
        try:
            while self._batch.running or self._waiting:
                if self.deterministic:
                    await self._settle()
                try:
                    self._admit()
                    if self._batch.running:
                        start = time.monotonic()
                        self._batch.step(self._version)
                        self._step_time_s += time.monotonic() - start
                except Exception as error:  # the boundary to the model's code
                    self._fail(f"a step failed: {error}", error)
                await asyncio.sleep(0)
        except asyncio.CancelledError:
            self._fail("the event loop stopped the engine", None)
            raise

    async def _settle(self) -> None:
        """Wait until no path holds the engine and none has anything to say."""
        quiet = 0
        while quiet < _QUIET_TURNS:
            if self._holders:
                if self._released is None:
                    self._released = asyncio.get_running_loop().create_future()
                await self._released
                quiet = 0
            news = self._news
            await asyncio.sleep(0)
            quiet = quiet + 1 if news == self._news else 0

    def _admit(self) -> None:
        """Give free slots to waiting requests."""
        free = self.max_num_seqs - len(self._batch.running)
        if not free or not self._waiting:
            return
        names = sorted(self._waiting) if self.deterministic else [*self._waiting]
        for name in names[:free]:
            sequence = self._waiting.pop(name)
            request = sequence.request
            longest = len(request.prompt_token_ids) + request.max_tokens
            self._batch.add(sequence, min(longest, self.max_model_len))

    def _cancel(self, sequence: Sequence) -> None:
        self._news += 1
        if self._waiting.get(sequence.request.request_id) is sequence:
            del self._waiting[sequence.request.request_id]
        elif sequence in self._batch.running:
            self._batch.remove(sequence)

    def _fail(self, message: str, cause: Exception | None) -> None:
        """Fail every request and forget all keys and values."""
        failed = [*self._batch.running, *self._waiting.values()]
        self._waiting = {}
        self._batch.clear()
        for sequence in failed:
            error = EngineError(f"request {sequence.request.request_id!r}: {message}")
            error.__cause__ = cause
            sequence.outbox.put_nowait(error)
