"""The torch engine against transformers: tokens per second for 64 requests.

    equal       generate() on one static batch; every request 96 new tokens
    unequal     generate() runs to the longest request; useful tokens count
    continuous  transformers' own continuous batching, the unequal requests

Each figure is our tokens per second over that of transformers, on the model
`wide`; `quick` is the size of the quick start. All sample at temperature 1 from
the full vocabulary, and no token ends a request early. The contenders alternate;
medians of the repetitions are compared. transformers sizes the cache of its
continuous batching by free memory, which on a CPU costs it over 90 % of its speed,
so it is given a cache that just fits.

    python benchmarks/engine.py --json engine.json
"""

import argparse
import asyncio
import logging
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import numpy as np
import torch
from report import print_table_and_write
from tokenizers import Tokenizer, decoders, models
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    ContinuousBatchingConfig,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.utils import logging as transformers_logging

from rllib_arpo.engines.engine import GenerationRequest
from rllib_arpo.engines.torch_engine import TorchEngine

NUM_REQUESTS = 64
PROMPT_TOKENS = 32
MODELS = {
    "wide": {
        "vocab_size": 8192,
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "quick": {
        "vocab_size": 700,
        "hidden_size": 64,
        "intermediate_size": 176,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}


def build_model(name: str) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    config = Qwen2Config(**MODELS[name], max_position_embeddings=2048)
    config.bos_token_id = config.eos_token_id = None
    model = Qwen2ForCausalLM(config).eval()
    model.generation_config = GenerationConfig(pad_token_id=0)
    return model


def build_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = {char: i for i, char in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def unequal_lengths(longest: int) -> list[int]:
    """Log-normal, as lengths of agent turns are: median 1/8 of the longest."""
    quantiles = (np.arange(NUM_REQUESTS) + 0.5) / NUM_REQUESTS
    normal = torch.special.ndtri(torch.from_numpy(quantiles)).numpy()
    lengths = longest / 8 * np.exp(0.9 * normal)
    return np.random.default_rng(0).permutation(np.clip(lengths, 4, longest)).tolist()


def run_engine(
    engine: TorchEngine, prompts: np.ndarray, lengths: Sequence[int]
) -> None:
    async def one(index: int) -> int:
        request = GenerationRequest(
            request_id=str(index),
            prompt_token_ids=prompts[index],
            max_tokens=lengths[index],
            seed=index,
            stream_interval=20,
        )
        return sum([len(chunk.token_ids) async for chunk in engine.generate(request)])

    async def everything() -> int:
        return sum(await asyncio.gather(*map(one, range(len(prompts)))))

    assert asyncio.run(everything()) == sum(lengths)


def run_generate(
    model: Qwen2ForCausalLM, prompts: np.ndarray, lengths: Sequence[int]
) -> None:
    with torch.inference_mode():
        output = model.generate(
            torch.from_numpy(prompts).long(),
            attention_mask=torch.ones(prompts.shape, dtype=torch.long),
            max_new_tokens=max(lengths),
            do_sample=True,
            top_k=0,
        )
    assert output.shape[1] == prompts.shape[1] + max(lengths)


def run_continuous(
    model: Qwen2ForCausalLM, prompts: np.ndarray, lengths: Sequence[int]
) -> None:
    page_size = 32
    pages = sum(math.ceil((PROMPT_TOKENS + n) / page_size) + 1 for n in lengths)
    config = ContinuousBatchingConfig(
        page_size=page_size, num_blocks=pages, max_batch_tokens=512
    )
    sampling = GenerationConfig(
        do_sample=True, top_k=0, eos_token_id=-1, max_new_tokens=max(lengths)
    )
    with model.continuous_batching_context_manager(
        generation_config=sampling, continuous_batching_config=config
    ) as manager:
        for prompt, length in zip(prompts.tolist(), lengths, strict=True):
            manager.add_request(prompt, max_new_tokens=length)
        outputs = [manager.get_result(timeout=60) for _ in lengths]
    assert sum(len(o.generated_tokens) for o in outputs if o) == sum(lengths)


def compare(
    num_tokens: int, runs: dict[str, Callable[[int], None]], repetitions: int
) -> dict[str, float]:
    """Median tokens per second of each; the first round warms up and is dropped."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repetition in range(repetitions + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run(repetition)
            if repetition:
                seconds[name].append(time.perf_counter() - start)
    return {name: num_tokens / median(times) for name, times in seconds.items()}


def measure(name: str, tokens: int, repetitions: int) -> list[dict[str, object]]:
    model, reference = build_model(name), build_model(name)
    engine = TorchEngine(model, build_tokenizer(), prefix_cache_tokens=8192)
    shape = (repetitions + 1, NUM_REQUESTS, PROMPT_TOKENS)
    # Fresh prompts for each repetition, so that no prefix cache helps.
    prompts = np.random.default_rng(0).integers(
        model.config.vocab_size, size=shape, dtype=np.int32
    )
    equal = [tokens] * NUM_REQUESTS
    unequal = [int(length) for length in unequal_lengths(2 * tokens)]
    cases = [
        ("equal", equal, run_generate),
        ("unequal", unequal, run_generate),
        ("continuous", unequal, run_continuous),
    ]
    rows: list[dict[str, object]] = []
    for case, lengths, rival in cases:
        speeds = compare(
            sum(lengths),
            {
                "ours": lambda r, n=lengths: run_engine(engine, prompts[r], n),
                "theirs": lambda r, n=lengths, f=rival: f(reference, prompts[r], n),
            },
            repetitions if rival is run_generate else max(1, repetitions // 2),
        )
        rows.append(
            {
                "model": name,
                "case": case,
                "tokens": sum(lengths),
                "ours, tokens/s": speeds["ours"],
                "transformers, tokens/s": speeds["theirs"],
                "ratio": speeds["ours"] / speeds["theirs"],
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=96, help="of an equal request")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers_logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    rows = [
        row for name in MODELS for row in measure(name, args.tokens, args.repetitions)
    ]
    names = ("ratio_equal", "ratio_unequal", "ratio_continuous_batching")
    figures = {name: row["ratio"] for name, row in zip(names, rows, strict=False)}
    print(f"{NUM_REQUESTS} requests, CPU, {torch.get_num_threads()} thread(s)\n")
    print_table_and_write(rows, figures, args.json)


if __name__ == "__main__":
    main()
