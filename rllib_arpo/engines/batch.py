"""The running sequences, one step at a time: fill, decode, sample, send, leave.

Each sequence has a row of numpy arrays and the pool's slot of the same number, so
bookkeeping is vectorised and Python runs per sequence only when a chunk is due. A
prompt's last token is computed by the decode step like any other: prefill never
samples, and a fork or a continuation costs that one token plus what is new.
"""

import asyncio
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch

from rllib_arpo.engines.engine import GenerationRequest, TokenChunk
from rllib_arpo.engines.kv_cache import PrefixTree, common_prefix
from rllib_arpo.engines.model_runner import ModelRunner
from rllib_arpo.engines.sampling import StopTokens, sample, uniforms
from rllib_arpo.errors import EngineError
from rllib_arpo.tree import FinishReason

_GOES_ON, _STOP, _EOS, _LENGTH = range(4)
_REASONS: tuple[FinishReason | None, ...] = (None, "stop", "eos", "length")
# A prefix that another request of the same wave computes is waited for when it
# saves this many tokens, or all that there is to save.
_WORTH_WAITING = 8
# Sets of stop strings whose tokens are not looked up again. Clients bring their own.
MAX_KNOWN_STOPS = 64


@dataclass(eq=False, slots=True)
class Sequence:
    """A request in flight; `outbox` is what its consumer awaits."""

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
        may_stop: [rows, V] bool, the tokens that a stop string may end with.
        sent: tokens already streamed, the prompt included.
    """

    _BY_POSITION = ("tokens", "logprobs", "entropies", "versions")
    _SCALARS = (
        *("length", "computed", "start", "limit", "sent", "interval"),
        *("seed", "temperature", "top_p", "top_k", "may_stop"),
    )

    def __init__(self, count: int, vocab_size: int) -> None:
        self.may_stop = np.zeros((count, vocab_size), bool)
        self.tokens, self.versions = (np.zeros((count, 0), np.int32) for _ in "12")
        self.logprobs, self.entropies = (np.zeros((count, 0), np.float32) for _ in "12")
        self.length, self.computed, self.start, self.limit = (
            np.zeros(count, np.int64) for _ in "1234"
        )
        self.sent, self.interval, self.top_k = (
            np.zeros(count, np.int64) for _ in "123"
        )
        self.seed = np.zeros(count, np.uint64)
        self.temperature, self.top_p = (np.zeros(count) for _ in "12")

    def set(
        self, row: int, request: GenerationRequest, limit: int, may_stop: np.ndarray
    ) -> None:
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
        self.may_stop[row] = may_stop
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


class Batch:
    """The sequences that run, in the slots 0..B-1 of the runner's pool.

    Args:
        runner: the model.
        pieces: the bytes of every token.
        is_eos: [V] bool.
        max_num_seqs: most sequences at a time.
        prefix_cache_tokens: tokens of finished sequences kept for reuse.
    """

    def __init__(
        self,
        runner: ModelRunner,
        pieces: list[bytes],
        is_eos: np.ndarray,
        *,
        max_num_seqs: int,
        prefix_cache_tokens: int,
    ) -> None:
        self._runner, self._bytes, self._is_eos = runner, pieces, is_eos
        self.tree = PrefixTree(prefix_cache_tokens)
        self.running: list[Sequence] = []
        self._rows = _Rows(max_num_seqs, len(pieces))
        self._may_stop = lru_cache(MAX_KNOWN_STOPS)(StopTokens(pieces).of)
        self.counts = dict.fromkeys(
            (
                *("num_generated_tokens", "num_prompt_tokens"),
                *("num_cached_prompt_tokens", "num_prefilled_tokens", "num_steps"),
            ),
            0,
        )

    def add(self, sequence: Sequence, limit: int) -> None:
        """Take in a request, which ends at `limit` tokens, with its known prefix."""
        request, row = sequence.request, len(self.running)
        self.running.append(sequence)
        stop = tuple(string.encode() for string in request.sampling.stop)
        self._rows.set(row, request, limit, self._may_stop(stop))
        self.counts["num_prompt_tokens"] += len(request.prompt_token_ids)
        self._runner.pool.reserve(row + 1, len(request.prompt_token_ids))
        self._restore(row)

    def remove(self, sequence: Sequence) -> None:
        """End a sequence before its time."""
        self._leave(self.running.index(sequence))

    def recompute(self) -> None:
        """Forget what the old weights computed; the next step fills it again."""
        self.tree.clear()
        self._rows.computed[: len(self.running)] = 0

    def clear(self) -> None:
        """End all sequences and give the memory of keys and values back."""
        self.running = []
        self.tree.clear()
        self._runner.pool.reset()

    @torch.inference_mode()
    def step(self, version: int) -> None:
        """Generate one token for every sequence and send what is due.

        Raises:
            EngineError: the model gives logits that are not finite.
        """
        rows, count = self._rows, len(self.running)
        self.counts["num_steps"] += 1
        self._runner.pool.reserve(count, int(rows.length[:count].max()))
        lacking = rows.computed[:count] < rows.length[:count] - 1
        self._fill(np.flatnonzero(lacking).tolist())
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
        rows.versions[every, length] = version
        rows.computed[:count] = length
        rows.length[:count] += 1
        self.counts["num_generated_tokens"] += count
        self._stream(tokens)

    def _restore(self, row: int) -> None:
        """Copy the longest known prefix, all but the last token at most."""
        rows, pool = self._rows, self._runner.pool
        before = int(rows.computed[row])
        tokens = rows.tokens[row, : rows.length[row] - 1]
        if len(tokens) == 0:
            return
        others = rows.tokens[: len(self.running), : len(tokens)] == tokens
        shared = np.where(others.all(1), len(tokens), others.argmin(1))
        shared = np.minimum(shared, rows.computed[: len(self.running)])
        shared[row] = before
        best = int(shared.argmax())
        match = self.tree.match(tokens)
        if match.length > shared[best]:
            start = 0
            for stored, count in match.edges:
                pool.load(row, start, stored, count)
                start += count
            rows.computed[row] = start
        elif best != row:
            pool.copy(best, row, int(shared[best]))
            rows.computed[row] = shared[best]
        if self.running[row].new:
            gained = int(rows.computed[row]) - before
            self.counts["num_cached_prompt_tokens"] += gained

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
            self.counts["num_prefilled_tokens"] += sum(map(len, tokens))
            rows.computed[first] = ends
            for row in later:
                self._restore(row)
            pending = [r for r in later if rows.computed[r] < rows.length[r] - 1]
        for sequence in self.running:
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
        rows, count = self._rows, len(self.running)
        reason = np.where(rows.length[:count] >= rows.limit[:count], _LENGTH, _GOES_ON)
        reason[self._is_eos[tokens]] = _EOS
        for row in np.flatnonzero(rows.may_stop[np.arange(count), tokens]):
            if self._stops_here(int(row)):
                reason[row] = _STOP
        unsent = rows.length[:count] - rows.sent[:count]
        for row in np.flatnonzero((unsent >= rows.interval[:count]) | (reason > 0)):
            self.running[row].outbox.put_nowait(
                self._chunk(int(row), _REASONS[reason[row]])
            )
        for row in np.flatnonzero(reason)[::-1]:
            self._leave(int(row))

    def _stops_here(self, row: int) -> bool:
        """Whether a stop string ends within the row's last token."""
        rows = self._rows
        stop = [s.encode() for s in self.running[row].request.sampling.stop]
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
        rows, pool, last = self._rows, self._runner.pool, len(self.running) - 1
        self.tree.insert(
            rows.tokens[row, : rows.computed[row]],
            lambda start, end: pool.save(row, start, end),
        )
        if row != last:
            pool.copy(last, row, int(rows.computed[last]))
            rows.move(last, row)
            self.running[row] = self.running[last]
        self.running.pop()
