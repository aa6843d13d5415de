"""The in-process engine: a Hugging Face model, batched token by token.

A step takes in waiting requests, fills the keys and values that their prompts lack
and decodes one token for every running sequence, in one batch; a request may join
or leave at any step. All bookkeeping is a numpy row per sequence; Python runs per
sequence only when a chunk is due. A prompt's last token is computed by the decode
step like any other, so prefill never samples, and a fork or a continuation costs
that one token plus what is new.

After new weights the rows' keys count as not computed and are filled again.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rllib_arpo.engines.engine import GenerationRequest, TokenChunk
from rllib_arpo.engines.kv_cache import PrefixTree, common_prefix
from rllib_arpo.engines.model_runner import ModelRunner, context_length
from rllib_arpo.engines.sampling import could_complete, sample, token_bytes, uniforms
from rllib_arpo.errors import ConfigError, EngineError
from rllib_arpo.tree import NO_FLOATS, NO_INTS, FinishReason

_GOES_ON, _STOP, _EOS, _LENGTH = range(4)
_REASONS: tuple[FinishReason | None, ...] = (None, "stop", "eos", "length")
# A prefix that another request of the same wave computes is waited for when it
# saves this many tokens, or all that there is to save.
_WORTH_WAITING = 8
# Turns of the event loop without news after which, in deterministic mode, every
# path has made its move.
_QUIET_TURNS = 8


@dataclass(eq=False, slots=True)
class _Sequence:
    """A request in flight."""

    request: GenerationRequest
    outbox: asyncio.Queue[TokenChunk | EngineError] = field(
        default_factory=asyncio.Queue
    )
    new: bool = True


class _Rows:
    """One row per running sequence, row i in slot i.

    Attributes:
        tokens, logprobs, entropies, versions: [rows, length], by position.
        length: tokens so far. computed: how many of them have keys and values.
        start: length of the prompt. limit: length at which generation ends.
        sent: tokens already streamed, the prompt included.
    """

    _BY_POSITION = ("tokens", "logprobs", "entropies", "versions")
    _SCALARS = (
        *("length", "computed", "start", "limit", "sent", "interval", "stop"),
        *("seed", "temperature", "top_p", "top_k"),
    )

    def __init__(self, count: int) -> None:
        self.tokens, self.versions = (np.zeros((count, 0), np.int32) for _ in "12")
        self.logprobs, self.entropies = (np.zeros((count, 0), np.float32) for _ in "12")
        self.length, self.computed, self.start, self.limit = (
            np.zeros(count, np.int64) for _ in "1234"
        )
        self.sent, self.interval, self.stop, self.top_k = (
            np.zeros(count, np.int64) for _ in "1234"
        )
        self.seed = np.zeros(count, np.uint64)
        self.temperature, self.top_p = (np.zeros(count) for _ in "12")

    def set(self, row: int, request: GenerationRequest, limit: int, stop: int) -> None:
        """Take in a request."""
        prompt, sampling = request.prompt_token_ids, request.sampling
        missing = limit - self.tokens.shape[1]
        if missing > 0:
            for name in self._BY_POSITION:
                old = getattr(self, name)
                setattr(self, name, np.pad(old, ((0, 0), (0, missing + 64))))
        self.tokens[row, : len(prompt)] = prompt
        self.length[row] = self.start[row] = self.sent[row] = len(prompt)
        self.computed[row] = 0
        self.limit[row] = limit
        self.interval[row] = request.stream_interval
        self.stop[row] = stop
        self.seed[row] = request.seed & (2**64 - 1)
        self.temperature[row] = sampling.temperature
        self.top_p[row] = sampling.top_p
        self.top_k[row] = sampling.top_k

    def move(self, source: int, target: int) -> None:
        """Move a row."""
        size = self.length[source]
        for name in self._BY_POSITION:
            array = getattr(self, name)
            array[target, :size] = array[source, :size]
        for name in self._SCALARS:
            array = getattr(self, name)
            array[target] = array[source]


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
            model.to(device)
        for parameter in model.parameters() if dtype is not None else ():
            # Buffers, such as rotary frequencies, keep their precision.
            parameter.data = parameter.data.to(dtype)
        self._runner = ModelRunner(model)
        self._tree = PrefixTree(prefix_cache_tokens)
        self._bytes = token_bytes(tokenizer, self._runner.vocab_size)
        self._is_eos = np.zeros(self._runner.vocab_size, bool)
        self._is_eos[_eos_ids(model, tokenizer)] = True
        self._stops: dict[tuple[str, ...], int] = {}
        self._may_stop = np.zeros((0, self._runner.vocab_size), bool)
        self._rows = _Rows(max_num_seqs)
        self._running: list[_Sequence] = []
        self._waiting: list[_Sequence] = []
        self._task: asyncio.Task[None] | None = None
        self._released: asyncio.Future[None] | None = None
        self._holders = self._news = self._version = 0
        self._closed = False
        self._counts = dict.fromkeys(
            (
                *("num_generated_tokens", "num_prompt_tokens"),
                *("num_cached_prompt_tokens", "num_prefilled_tokens", "num_steps"),
            ),
            0,
        )

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | Path,
        *,
        dtype: torch.dtype | None = None,
        **settings: object,
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
        return cls(model, tokenizer, **settings)

    @property
    def policy_version(self) -> int:
        return self._version

    def metrics(self) -> dict[str, float]:
        """Counters since the start, and what runs, waits and is cached."""
        return {
            **self._counts,
            "num_running": len(self._running),
            "num_waiting": len(self._waiting),
            "prefix_cache_tokens": self._tree.num_tokens,
        }

    async def generate(self, request: GenerationRequest) -> AsyncIterator[TokenChunk]:
        """Stream one turn; closing the iterator early cancels the request.

        A prompt that fills the context gives one empty chunk, "length".

        Raises:
            EngineError: the request is wrong, the engine is closed, or a step
                failed.
        """
        self._check(request)
        if len(request.prompt_token_ids) >= self.max_model_len:
            yield TokenChunk(
                token_ids=NO_INTS,
                logprobs=NO_FLOATS,
                entropies=NO_FLOATS,
                policy_versions=NO_INTS,
                finish_reason="length",
            )
            return
        sequence = _Sequence(request)
        self._waiting.append(sequence)
        self._news += 1
        self._start()
        try:
            while True:
                item = await sequence.outbox.get()
                if isinstance(item, EngineError):
                    raise item
                yield item
                if item.finish_reason is not None:
                    return
        finally:
            self._cancel(sequence)

    @contextmanager
    def hold(self) -> Iterator[None]:
        """In deterministic mode, no step runs inside: for the time of a tool call."""
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

    def update_weights(self, version: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Take new weights; requests in flight go on with them."""
        self._runner.load_weights(arrays)
        self._version = version
        self._tree.clear()
        self._rows.computed[: len(self._running)] = 0

    def close(self) -> None:
        """Free memory; requests in flight fail with `EngineError`."""
        self._closed = True
        self._fail("the engine was closed", None)

    def _check(self, request: GenerationRequest) -> None:
        prompt, sampling = request.prompt_token_ids, request.sampling
        ids = (s.request.request_id for s in (*self._running, *self._waiting))
        size = self._runner.vocab_size
        problem = None
        if self._closed:
            problem = "the engine was closed"
        elif request.request_id in ids:
            problem = "a request with this id is in flight"
        elif len(prompt) == 0:
            problem = "the prompt is empty"
        elif prompt.min() < 0 or prompt.max() >= size:
            problem = (
                f"token ids run from {prompt.min()} to {prompt.max()}, but the model "
                f"has a vocabulary of {size}"
            )
        elif request.max_tokens < 1 or request.stream_interval < 1:
            problem = (
                f"max_tokens ({request.max_tokens}) and stream_interval "
                f"({request.stream_interval}) must be >= 1"
            )
        elif not (sampling.temperature >= 0 < sampling.top_p <= 1):
            problem = (
                f"temperature ({sampling.temperature}) must be >= 0 and top_p "
                f"({sampling.top_p}) in (0, 1]"
            )
        elif sampling.top_k < 0 or "" in sampling.stop:
            problem = f"top_k ({sampling.top_k}) must be >= 0 and stop without ''"
        if problem:
            raise EngineError(f"cannot generate for {request.request_id!r}: {problem}")

    def _start(self) -> None:
        loop = asyncio.get_running_loop()
        if self._task is None or self._task.done() or self._task.get_loop() is not loop:
            self._task = loop.create_task(self._run())

    async def _run(self) -> None:
        """Step while there is work. The task ends with it, so no loop keeps one."""
        try:
            while self._running or self._waiting:
                if self.deterministic:
                    await self._settle()
                try:
                    self._step()
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

    @torch.inference_mode()
    def _step(self) -> None:
        self._admit()
        count = len(self._running)
        if count == 0:
            return
        rows, self._counts["num_steps"] = self._rows, self._counts["num_steps"] + 1
        self._runner.pool.reserve(count, int(rows.length[:count].max()))
        self._fill([r for r in range(count) if rows.computed[r] < rows.length[r] - 1])
        length = rows.length[:count]
        every = np.arange(count)
        logits = self._runner.decode(rows.tokens[every, length - 1], length - 1)
        tokens, logprobs, entropies = sample(
            logits,
            uniforms(rows.seed[:count], (length - rows.start[:count]).astype("u8")),
            temperature=rows.temperature[:count],
            top_p=rows.top_p[:count],
            top_k=rows.top_k[:count],
        )
        if not np.isfinite(entropies).all():
            raise EngineError("the model's logits are not finite")
        rows.tokens[every, length] = tokens
        rows.logprobs[every, length] = logprobs
        rows.entropies[every, length] = entropies
        rows.versions[every, length] = self._version
        rows.computed[:count] = length
        rows.length[:count] += 1
        self._counts["num_generated_tokens"] += count
        self._stream(tokens)

    def _admit(self) -> None:
        """Give free slots to waiting requests and copy the prefixes known."""
        free = self.max_num_seqs - len(self._running)
        if not free or not self._waiting:
            return
        if self.deterministic:
            self._waiting.sort(key=lambda sequence: sequence.request.request_id)
        taken, self._waiting = self._waiting[:free], self._waiting[free:]
        for sequence in taken:
            request, row = sequence.request, len(self._running)
            prompt_length = len(request.prompt_token_ids)
            limit = min(prompt_length + request.max_tokens, self.max_model_len)
            stop = self._stop_number(request.sampling.stop)
            self._rows.set(row, request, limit, stop)
            self._running.append(sequence)
            self._counts["num_prompt_tokens"] += prompt_length
            self._runner.pool.reserve(row + 1, prompt_length)
            self._restore(row)

    def _stop_number(self, stop: tuple[str, ...]) -> int:
        if stop not in self._stops:
            encoded = [string.encode() for string in stop]
            row = could_complete(self._bytes, encoded)
            self._may_stop = np.vstack([self._may_stop, row])
            self._stops[stop] = len(self._stops)
        return self._stops[stop]

    def _restore(self, row: int) -> None:
        """Copy the longest known prefix, all but the last token at most."""
        rows, pool = self._rows, self._runner.pool
        before = int(rows.computed[row])
        tokens = rows.tokens[row, : rows.length[row] - 1]
        if len(tokens) == 0:
            return
        others = rows.tokens[: len(self._running), : len(tokens)] == tokens
        shared = np.where(others.all(1), len(tokens), others.argmin(1))
        shared = np.minimum(shared, rows.computed[: len(self._running)])
        shared[row] = before
        best = int(shared.argmax())
        match = self._tree.match(tokens)
        if match.length > shared[best]:
            start = 0
            for stored, count in match.edges:
                pool.load(row, start, stored, count)
                start += count
            rows.computed[row] = start
        elif best != row:
            pool.copy(best, row, int(shared[best]))
            rows.computed[row] = shared[best]
        if self._running[row].new:
            gained = int(rows.computed[row]) - before
            self._counts["num_cached_prompt_tokens"] += gained

    def _fill(self, pending: list[int]) -> None:
        """Compute all keys and values but those of each row's last token."""
        rows = self._rows
        while pending:
            first, later = self._split(pending)
            starts = [int(rows.computed[row]) for row in first]
            ends = [int(rows.length[row]) - 1 for row in first]
            bounds = zip(first, starts, ends, strict=True)
            tokens = [rows.tokens[row, a:b] for row, a, b in bounds]
            self._runner.prefill(first, tokens, starts)
            self._counts["num_prefilled_tokens"] += sum(map(len, tokens))
            rows.computed[first] = ends
            for row in later:
                self._restore(row)
            pending = [r for r in later if rows.computed[r] < rows.length[r] - 1]
        for sequence in self._running:
            sequence.new = False

    def _split(self, pending: list[int]) -> tuple[list[int], list[int]]:
        """Rows to compute, and rows to wait since they share a prefix with those."""
        rows, first, later = self._rows, [], []
        for row in pending:
            tokens = rows.tokens[row, : rows.length[row] - 1]
            known = int(rows.computed[row])
            enough = min(_WORTH_WAITING, len(tokens) - known)
            waits = any(
                common_prefix(tokens, rows.tokens[other, : rows.length[other] - 1])
                >= known + enough
                for other in first
            )
            (later if waits else first).append(row)
        return first, later

    def _stream(self, tokens: np.ndarray) -> None:
        """Find the rows that end, send the chunks that are due, free the slots."""
        rows, count = self._rows, len(self._running)
        reason = np.where(rows.length[:count] >= rows.limit[:count], _LENGTH, _GOES_ON)
        reason[self._is_eos[tokens]] = _EOS
        for row in np.flatnonzero(self._may_stop[rows.stop[:count], tokens]):
            if self._stops_here(int(row)):
                reason[row] = _STOP
        unsent = rows.length[:count] - rows.sent[:count]
        for row in np.flatnonzero((unsent >= rows.interval[:count]) | (reason > 0)):
            self._running[row].outbox.put_nowait(
                self._chunk(int(row), _REASONS[reason[row]])
            )
        for row in np.flatnonzero(reason)[::-1]:
            self._leave(int(row))

    def _stops_here(self, row: int) -> bool:
        """Whether a stop string ends within the row's last token."""
        rows = self._rows
        stop = [s.encode() for s in self._running[row].request.sampling.stop]
        position = int(rows.length[row]) - 1
        tail = self._bytes[rows.tokens[row, position]]
        needed = len(tail) + max(map(len, stop)) - 1
        while len(tail) < needed and position > rows.start[row]:
            position -= 1
            tail = self._bytes[rows.tokens[row, position]] + tail
        return any(string in tail for string in stop)

    def _chunk(self, row: int, reason: FinishReason | None) -> TokenChunk:
        rows = self._rows
        part = slice(int(rows.sent[row]), int(rows.length[row]))
        rows.sent[row] = rows.length[row]
        return TokenChunk(
            token_ids=rows.tokens[row, part].copy(),
            logprobs=rows.logprobs[row, part].copy(),
            entropies=rows.entropies[row, part].copy(),
            policy_versions=rows.versions[row, part].copy(),
            finish_reason=reason,
        )

    def _leave(self, row: int) -> None:
        """Keep the sequence's keys and values and close the hole it leaves."""
        rows, pool, last = self._rows, self._runner.pool, len(self._running) - 1
        self._tree.insert(
            rows.tokens[row, : rows.computed[row]],
            lambda start, end: pool.save(row, start, end),
        )
        if row != last:
            pool.copy(last, row, int(rows.computed[last]))
            rows.move(last, row)
            self._running[row] = self._running[last]
        self._running.pop()

    def _cancel(self, sequence: _Sequence) -> None:
        self._news += 1
        if sequence in self._waiting:
            self._waiting.remove(sequence)
        elif sequence in self._running:
            self._leave(self._running.index(sequence))

    def _fail(self, message: str, cause: Exception | None) -> None:
        """Fail every request and forget all keys and values."""
        failed = [*self._running, *self._waiting]
        self._running, self._waiting = [], []
        self._tree.clear()
        self._runner.pool.reset()
        for sequence in failed:
            error = EngineError(f"request {sequence.request.request_id!r}: {message}")
            error.__cause__ = cause
            sequence.outbox.put_nowait(error)


def _eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    configured = getattr(model.generation_config, "eos_token_id", None)
    if configured is None:
        configured = getattr(model.config, "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    return sorted({i for i in (*ids, tokenizer.eos_token_id) if i is not None})
