"""Our requests as vLLM's, and vLLM's outputs as our chunks.

Entropies travel where vLLM has the second of two log-probabilities (`vllm_worker.py`).
"""

import math
from typing import Any

import numpy as np
from vllm import RequestOutput, SamplingParams
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.output_processor import OutputProcessor

from rllib_arpo.engines.engine import GenerationRequest, TokenChunk
from rllib_arpo.errors import EngineError
from rllib_arpo.tree import FinishReason

# Between two ways to compute one entropy in float32, with a wide margin.
_TOLERANCE = 1e-2
_ONE_TOKEN: dict[str, Any] = {
    "max_tokens": 1,
    "seed": 0,
    "flat_logprobs": True,
    "detokenize": False,
    "output_kind": RequestOutputKind.FINAL_ONLY,
}
SCORE_PROMPT = SamplingParams(prompt_logprobs=0, **_ONE_TOKEN)
ALL_LOGPROBS = SamplingParams(logprobs=-1, **_ONE_TOKEN)
WITH_ENTROPY = SamplingParams(logprobs=1, **_ONE_TOKEN)


def sampling_params(
    request: GenerationRequest,
    *,
    max_tokens: int,
    eos_ids: list[int],
    entropy_top_k: int | None,
) -> SamplingParams:
    """How vLLM is asked for a turn."""
    sampling = request.sampling
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        seed=request.seed & (2**63 - 1),
        stop=list(sampling.stop),
        stop_token_ids=eos_ids,
        include_stop_str_in_output=True,
        # A tag may be a special token, whose text would be left out.
        skip_special_tokens=False,
        spaces_between_special_tokens=False,
        logprobs=entropy_top_k or 1,
        flat_logprobs=True,
        output_kind=RequestOutputKind.DELTA,
        # The first token comes at once, then comes one output per interval.
        stream_interval=max(request.stream_interval - 1, 1),
    )


def chunk_of(
    output: RequestOutput,
    *,
    greedy: bool,
    versions: np.ndarray,
    entropy_top_k: int | None,
    vocab_size: int,
) -> TokenChunk:
    """What is new in an output.

    Args:
        output: of a request with `sampling_params`.
        greedy: the distribution is a point.
        versions: [n] of the weights.
        entropy_top_k: as in `sampling_params`.
        vocab_size: V.
    """
    new = output.outputs[0]
    count = len(new.token_ids)
    if greedy:
        logprobs = entropies = np.zeros(count, np.float32)
    else:
        logprobs, entropies = _scores(new.logprobs, entropy_top_k, vocab_size)
    return TokenChunk(
        token_ids=np.array(new.token_ids, np.int32),
        logprobs=logprobs,
        entropies=entropies,
        policy_versions=versions,
        finish_reason=_finish_reason(new.finish_reason, new.stop_reason),
    )


def _scores(flat: Any, k: int | None, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """[n] log-probabilities and [n] entropies of `FlatLogprobs`."""
    values = np.array(flat.logprobs, np.float32)
    starts = np.array(flat.start_indices, np.int64)
    if k is None:
        return values[starts], values[starts + 1]
    # The sampled token stands first, and again among the k most likely, unless vLLM
    # has joined two outputs.
    tables = [values[end - k : end] for end in flat.end_indices]
    return values[starts], entropy_of_top_k(np.reshape(tables, (-1, k)), vocab_size)


def entropy_of_top_k(logprobs: np.ndarray, vocab_size: int) -> np.ndarray:
    """Entropy of the k most likely tokens, with the rest spread evenly.

        H ≈ -Σ_k p ln p - r·ln(r / (V - k)),  r = 1 - Σ_k p

    Args:
        logprobs: [n, k], the k most likely tokens of n distributions.
        vocab_size: V.

    Returns:
        [n] float32 nats, the largest entropy that fits the k numbers.
    """
    table = logprobs.astype(np.float64)
    p = np.exp(table)
    known = -(p * np.maximum(table, -1e4)).sum(-1)
    rest = np.clip(1.0 - p.sum(-1), 0.0, 1.0)
    others = max(vocab_size - table.shape[-1], 1)
    spread = rest * np.log(np.maximum(rest, 1e-30) / others)
    return (known - spread).astype(np.float32)


def versions_of(
    output: RequestOutput, processor: OutputProcessor, sent: int
) -> np.ndarray:
    """[n] versions of the weights that sampled the tokens of an output.

    Args:
        output: vLLM tells versions at the end of a request only.
        processor: knows them before.
        sent: tokens of the request in earlier outputs.
    """
    new = output.outputs[0]
    if new.weight_versions is not None:
        starts = [(span.version, span.start) for span in new.weight_versions]
    else:
        (name,) = processor.external_req_ids[output.request_id]
        starts = processor.request_states[name].weight_version_starts
    versions = np.zeros(len(new.token_ids), np.int32)
    for label, start in starts:
        versions[max(start - sent, 0) :] = int(label)
    return versions


def check_entropy(all_logprobs: Any, with_entropy: Any) -> None:
    """Compare one token's entropy with that of all log-probabilities.

    Args:
        all_logprobs: `FlatLogprobs` of a request with `ALL_LOGPROBS`.
        with_entropy: those of the same request with `WITH_ENTROPY`.

    Raises:
        EngineError: they differ, so this vLLM samples in a way that we miss.
    """
    sampled, *table = np.array(all_logprobs.logprobs, np.float64)
    exact = -(np.exp(table) * np.maximum(table, -1e4)).sum()
    found = with_entropy.logprobs
    if not (
        len(found) == 2
        and math.isclose(found[0], sampled, abs_tol=_TOLERANCE)
        and math.isclose(found[1], exact, abs_tol=_TOLERANCE)
    ):
        raise EngineError(
            f"vLLM reports {found} for a token of log-probability {sampled:.4f} and "
            f"entropy {exact:.4f}: its sampler is not the one that this engine "
            "extends. `engine_kwargs={'entropy_top_k': 20}` goes on with an "
            "approximation."
        )


def _finish_reason(reason: str | None, stop: int | str | None) -> FinishReason | None:
    """As ours; an end token has a number for a stop reason, or none."""
    if reason == "stop":
        return "stop" if isinstance(stop, str) else "eos"
    if reason is None or reason == "length":
        return reason
    raise EngineError(f"vLLM ended a request with {reason!r}")
