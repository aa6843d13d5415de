"""vLLM as an engine: one asynchronous request per turn of a path.

vLLM's scheduler and model run in processes of their own (`vllm_worker.py` says what we
add there); this is the side of the EnvRunner. Its prefix cache makes continuations and
branches cheap: both are new requests whose prompts repeat the tokens so far.

1. Log-probabilities are those of the distribution that was sampled from, after
   temperature, top-p and top-k (`logprobs_mode="processed_logprobs"`).
2. Entropies are exact, over the whole vocabulary and for every token, unless
   `entropy_top_k` asks for the approximation that vLLM offers by itself.
3. New weights are taken between two steps of requests in flight, whose keys and
   values are then computed again (`reset_prefix_cache=False` keeps the old ones).
4. LoRA adapters are swapped by request: what is in flight ends with its own.
"""

import asyncio
import itertools
import tempfile
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import (
    AbstractContextManager,
    aclosing,
    asynccontextmanager,
    contextmanager,
    nullcontext,
)
from pathlib import Path
from typing import Any, Self

import numpy as np
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from rllib_arpo.engines.engine import (
    NO_ROOM,
    GenerationRequest,
    TokenChunk,
    join,
    request_problem,
)
from rllib_arpo.engines.sampling import eos_ids
from rllib_arpo.engines.vllm_setup import start_failure, start_llm
from rllib_arpo.errors import ConfigError, EngineError


class VLLMEngine:
    """Generates with vLLM's `AsyncLLM`. Use `await VLLMEngine.start(...)`.

    The same seed and prompt give the same tokens whatever else is in flight, up to the
    rounding of batches.
    """

    def __init__(
        self,
        model: str,
        *,
        dtype: str = "float32",
        entropy_top_k: int | None = None,
        reset_prefix_cache: bool = True,
        lora: Mapping[str, Any] | None = None,
        weight_transfer: str = "object_store",
        colocate: bool = False,
        log_file: Path | None = None,
        **arguments: Any,
    ) -> None:
        self._log_file = log_file or Path(tempfile.mkdtemp()) / "vllm.log"
        self._log_start = (
            self._log_file.stat().st_size if self._log_file.exists() else 0
        )
        try:
            self._llm = start_llm(
                model,
                dtype=dtype,
                lora=lora,
                weight_transfer=weight_transfer,
                colocate=colocate,
                log_file=self._log_file,
                arguments=arguments,
            )
        except ConfigError:
            raise
        except Exception as error:  # boundary: all that can fail at a start
            raise self._start_failure(error) from error
        # These import vLLM, which is imported when it was chosen, and only then.
        from rllib_arpo.engines import vllm_requests
        from rllib_arpo.engines.vllm_weights import VLLMWeights

        self._requests = vllm_requests
        self.weights = VLLMWeights(self._llm, model, lora)
        config = AutoConfig.from_pretrained(model).get_text_config()
        self.vocab_size: int = config.vocab_size
        self.max_model_len: int = self._llm.model_config.max_model_len
        try:
            generation = GenerationConfig.from_pretrained(model)
        except OSError:  # a folder need not have one
            generation = config
        known = eos_ids(generation, AutoTokenizer.from_pretrained(model))
        self._eos_ids = [token for token in known if token < self.vocab_size]
        self._entropy_top_k = entropy_top_k
        self._reset_prefix_cache = reset_prefix_cache
        self._version = 0
        self._in_flight: set[str] = set()
        # Those of them that have not got a token yet.
        self._waiting: set[str] = set()
        self._numbers = itertools.count()
        self._busy_since = self._busy_s = 0.0
        self._closed = False
        self._counts = dict.fromkeys(
            (
                *("num_generated_tokens", "num_prompt_tokens"),
                *("num_cached_prompt_tokens", "num_context_overflows"),
            ),
            0,
        )

    @classmethod
    async def start(cls, model: str, **settings: Any) -> Self:
        """Start vLLM and check that its entropies are right.

        Args:
            model: Hugging Face folder or hub name.
            **settings:
                dtype: "float32", "bfloat16" or "float16".
                entropy_top_k: None computes exact entropies; k takes those of the k
                    most likely tokens and of the rest spread evenly.
                reset_prefix_cache: compute keys and values anew after an update.
                lora: PEFT's `LoraConfig` as a dict: updates are adapters.
                weight_transfer: "object_store", "nccl" or "ipc".
                colocate: the memory can be given back by `sleep`.
                log_file: gets vLLM's log.
                All others are vLLM's own engine arguments.

        Raises:
            ConfigError: vLLM is missing or too old or new, an argument is wrong, or
                memory does not suffice.
            EngineError: vLLM does not start, or computes other entropies.
        """
        # It takes seconds, in which another engine of this loop may generate.
        engine = await asyncio.to_thread(cls, model, **settings)
        try:
            await engine._llm.update_weight_version("0")
            await engine._check_entropies()
        except EngineError:
            engine.close()
            raise
        except Exception as error:  # boundary: the model's first steps
            engine.close()
            raise engine._start_failure(error) from error
        return engine

    def _start_failure(self, error: Exception) -> EngineError | ConfigError:
        return start_failure(error, self._log_file, self._log_start)

    async def _check_entropies(self) -> None:
        if self._entropy_top_k is not None:
            return
        exact, ours = [
            (await self._answer([0], params)).outputs[0].logprobs
            for params in (self._requests.ALL_LOGPROBS, self._requests.WITH_ENTROPY)
        ]
        self._requests.check_entropy(exact, ours)

    async def _answer(self, prompt: list[int], params: Any) -> Any:
        """The one output of a request that nothing is streamed of."""
        outputs = self._llm.generate(
            {"prompt_token_ids": prompt},
            params,
            f"internal/{next(self._numbers)}",
            lora_request=self.weights.adapter,
        )
        return [output async for output in outputs][-1]

    @property
    def policy_version(self) -> int:
        return self._version

    async def generate(self, request: GenerationRequest) -> AsyncIterator[TokenChunk]:
        """Stream one turn; closing the iterator early cancels the request.

        A prompt that fills the context gives one empty chunk, "length".

        Raises:
            EngineError: the request is wrong, or vLLM failed or died.
        """
        self._check(request)
        room = self.max_model_len - len(request.prompt_token_ids)
        if room <= 0:
            self._counts["num_context_overflows"] += 1
            yield NO_ROOM
            return
        waiting: list[TokenChunk] = []
        chunks = self._stream(request, min(request.max_tokens, room))
        with self._counted(request.request_id):
            async with aclosing(chunks):
                async for chunk in chunks:
                    waiting.append(chunk)
                    count = sum(len(one.token_ids) for one in waiting)
                    reason = chunk.finish_reason
                    if reason is None and count < request.stream_interval:
                        continue
                    if reason == "length" and room < request.max_tokens:
                        self._counts["num_context_overflows"] += 1
                    yield join(waiting)
                    waiting = []

    async def _stream(
        self, request: GenerationRequest, max_tokens: int
    ) -> AsyncGenerator[TokenChunk, None]:
        """What vLLM puts out, piece by piece; the first has one token."""
        adapter, version = self.weights.adapter, self._version
        outputs = self._llm.generate(
            {"prompt_token_ids": request.prompt_token_ids.tolist()},
            self._requests.sampling_params(
                request,
                max_tokens=max_tokens,
                eos_ids=self._eos_ids,
                entropy_top_k=self._entropy_top_k,
            ),
            # vLLM remembers an id until it has seen the end of the request.
            f"{request.request_id}/{next(self._numbers)}",
            lora_request=adapter,
        )
        sent = 0
        with self._failures(request.request_id):
            async with aclosing(outputs):
                async for output in outputs:
                    if not sent:
                        self._waiting.discard(request.request_id)
                        self._count_prompt(output)
                    count = len(output.outputs[0].token_ids)
                    if adapter is not None:
                        versions = np.full(count, version, np.int32)
                    else:
                        versions = self._requests.versions_of(
                            output, self._llm.output_processor, sent
                        )
                    sent += count
                    self._counts["num_generated_tokens"] += count
                    yield self._requests.chunk_of(
                        output,
                        greedy=request.sampling.temperature == 0,
                        versions=versions,
                        entropy_top_k=self._entropy_top_k,
                        vocab_size=self.vocab_size,
                    )

    def _count_prompt(self, output: Any) -> None:
        self._counts["num_prompt_tokens"] += len(output.prompt_token_ids)
        self._counts["num_cached_prompt_tokens"] += output.num_cached_tokens or 0

    async def score(self, token_ids: np.ndarray) -> np.ndarray:
        """Log-probabilities of given tokens, at temperature 1.

        Raises:
            EngineError: vLLM failed or died.
        """
        with self._failures("score"):
            answer = await self._answer(token_ids.tolist(), self._requests.SCORE_PROMPT)
        # The first token has no log-probability and takes no place.
        return np.array(answer.prompt_logprobs.logprobs, np.float32)

    async def update_weights(
        self, version: int, arrays: Mapping[str, np.ndarray]
    ) -> None:
        """Take new weights, or a new adapter; requests in flight go on.

        Raises:
            WeightSyncError: names or shapes differ from the model's.
            EngineError: vLLM failed, and is closed: it holds half of the weights.
        """
        self.weights.check(arrays)
        with self._failures("update of the weights"):
            if self.weights.adapters is not None:
                self.weights.swap_adapter(version, arrays)
            else:
                async with self.paused():
                    await self.weights.load(version, arrays)
        self._version = version

    async def transfer(self, step: str, argument: Any) -> None:
        """One step of an update that a learner drives (`vllm_transfer.py`).

        Args:
            step: "init", "start", "update" or "finish".
            argument: what vLLM's backend of that name expects; for "finish" the
                version.

        Raises:
            EngineError: vLLM failed. An update that fails closes it: it holds half
                of the weights.
        """
        from vllm.distributed.weight_transfer.base import (
            WeightTransferInitRequest,
            WeightTransferUpdateRequest,
        )

        with self._failures(f"transfer of weights, {step}"):
            llm = self._llm
            if step == "init":
                self.weights.forget_window()
                await llm.init_weight_transfer_engine(
                    WeightTransferInitRequest(argument)
                )
                return
            with self._closed_by_errors():
                if step == "start":
                    await self._pause()
                    await llm.start_weight_update()
                elif step == "update":
                    await llm.update_weights(WeightTransferUpdateRequest(argument))
                else:
                    await llm.finish_weight_update(str(argument))
                    await llm.resume_generation()
                    self._version = argument

    async def _pause(self) -> None:
        await self._llm.engine_core.pause_scheduler_async(
            mode="keep", clear_cache=self._reset_prefix_cache
        )

    @asynccontextmanager
    async def paused(self) -> AsyncIterator[None]:
        """For an update: no step is taken inside; requests in flight go on after it.

        An error inside leaves vLLM with half of the weights, so it closes it.
        """
        await self._pause()
        with self._closed_by_errors():
            yield
        await self._llm.resume_generation()

    @contextmanager
    def _closed_by_errors(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.close()
            raise

    async def sleep(self) -> None:
        """Give the GPU's memory back: weights wait in the host's, the cache is lost."""
        with self._failures("sleep"):
            await self._llm.sleep(level=1)

    async def wake_up(self) -> None:
        """Take the memory again."""
        with self._failures("wake up"):
            await self._llm.wake_up()

    def hold(self) -> AbstractContextManager[None]:
        """A null context: there is no deterministic mode."""
        return nullcontext()

    def metrics(self) -> dict[str, float]:
        """Counters since the start, what writes, and what waits for its first token.

        `entropy_approximated_by_top_k` is there when entropies are not exact.
        """
        busy_s = self._busy_s
        if self._in_flight:
            busy_s += time.monotonic() - self._busy_since
        found = {
            **self._counts,
            "step_time_s": busy_s,
            "num_running": len(self._in_flight) - len(self._waiting),
            "num_waiting": len(self._waiting),
        }
        if self._entropy_top_k is not None:
            found["entropy_approximated_by_top_k"] = self._entropy_top_k
        return found

    def close(self) -> None:
        """End vLLM's processes; requests in flight fail with `EngineError`."""
        if not self._closed:
            from vllm.v1.engine.exceptions import EngineDeadError

            self._closed = True
            # vLLM would leave them waiting.
            self._llm.output_processor.propagate_error(EngineDeadError())
            self._llm.shutdown()
            self.weights.close()
            # vLLM cleans up again when it is freed; too late at the interpreter's end.
            del self._llm

    def _check(self, request: GenerationRequest) -> None:
        problem = request_problem(request, self.vocab_size)
        if self._closed:
            problem = "the engine was closed"
        elif request.request_id in self._in_flight:
            problem = "a request with this id is in flight"
        if problem:
            raise EngineError(f"cannot generate for {request.request_id!r}: {problem}")

    @contextmanager
    def _counted(self, request_id: str) -> Iterator[None]:
        """Count a request, and the time in which any is in flight."""
        if not self._in_flight:
            self._busy_since = time.monotonic()
        self._in_flight.add(request_id)
        self._waiting.add(request_id)
        try:
            yield
        finally:
            self._in_flight.discard(request_id)
            self._waiting.discard(request_id)
            if not self._in_flight:
                self._busy_s += time.monotonic() - self._busy_since

    @contextmanager
    def _failures(self, what: str) -> Iterator[None]:
        """Errors of vLLM as ours."""
        from vllm.exceptions import VLLMClientError
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        if self._closed:
            raise EngineError(f"{what!r}: the engine was closed")
        try:
            yield
        except EngineDeadError as error:
            reason = f"vLLM's process is dead (log: {self._log_file})"
            if self._closed:
                reason = "the engine was closed"
            raise EngineError(f"{what!r}: {reason}") from error
        except (EngineGenerateError, VLLMClientError, ValueError) as error:
            raise EngineError(f"{what!r}: {error.__cause__ or error}") from error
