"""The torch engine and the learner's module on a GPU."""

import asyncio

import numpy as np
import torch

from rllib_arpo.engines.engine import GenerationRequest
from rllib_arpo.engines.torch_engine import TorchEngine
from rllib_arpo.engines.weights import check_probe
from rllib_arpo.rl_module import CausalLMRLModule


async def generate(engine: TorchEngine, seed: int) -> tuple[list[int], np.ndarray]:
    request = GenerationRequest(
        request_id=str(seed),
        prompt_token_ids=np.arange(1, 30, dtype=np.int32),
        max_tokens=40,
        seed=seed,
        stream_interval=40,
    )
    chunks = [chunk async for chunk in engine.generate(request)]
    tokens = np.concatenate([chunk.token_ids for chunk in chunks])
    return tokens.tolist(), np.concatenate([chunk.logprobs for chunk in chunks])


def test_the_engine_scores_as_on_a_cpu(almanac_model: str) -> None:
    on_cpu = TorchEngine.from_pretrained(almanac_model)
    on_gpu = TorchEngine.from_pretrained(almanac_model, device="cuda")
    text = np.arange(1, 60, dtype=np.int32)
    expected = asyncio.run(on_cpu.score(text))
    np.testing.assert_allclose(asyncio.run(on_gpu.score(text)), expected, atol=1e-3)
    tokens, logprobs = asyncio.run(generate(on_gpu, 3))
    whole = np.concatenate([np.arange(1, 30), tokens]).astype(np.int32)
    scored = asyncio.run(on_cpu.score(whole))[28:]
    np.testing.assert_allclose(logprobs, scored, atol=1e-3)


def test_a_probe_of_a_bfloat16_learner_agrees_with_its_engine(
    almanac_model: str,
) -> None:
    learner = CausalLMRLModule(
        model_config={"model": almanac_model, "dtype": "bfloat16"}
    ).to("cuda")
    engine = TorchEngine.from_pretrained(
        almanac_model, device="cuda", dtype=torch.bfloat16
    )
    asyncio.run(engine.update_weights(1, learner.get_state(inference_only=True)))
    probe = learner.weight_probe()
    check_probe(probe, asyncio.run(engine.score(probe.token_ids)), dtype="bfloat16")
