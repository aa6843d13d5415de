"""What of vLLM a CPU cannot show: its GPU sampler, sleep, and weights by CUDA IPC.

A start checks entropies against all log-probabilities by itself.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import ray
import torch

from rllib_arpo.engines.weights import check_probe
from rllib_arpo.rl_module import CausalLMRLModule
from tests.tiny_runs import arpo_config, learned, running
from tests.vllm_session import VLLMSession, vllm_session

pytestmark = [pytest.mark.gpu, pytest.mark.vllm, pytest.mark.slow]
SETTINGS: dict[str, Any] = {"gpu_memory_utilization": 0.2, "max_num_seqs": 64}


@pytest.fixture(scope="module")
def sleeper(almanac_model, tmp_path_factory) -> Iterator[VLLMSession]:
    log_file = tmp_path_factory.mktemp("logs") / "vllm.log"
    settings = {"kv_cache_memory_bytes": 2 * 2**30, "colocate": True}
    with vllm_session(almanac_model, log_file, **settings) as session:
        yield session


def free_bytes() -> int:
    return torch.cuda.mem_get_info()[0]


def test_sleep_gives_memory_back_and_waking_restores_the_policy(sleeper) -> None:
    probe = CausalLMRLModule(model_config={"model": sleeper.model}).weight_probe()
    before = sleeper.run(sleeper.engine.score(probe.token_ids))
    taken = free_bytes()
    sleeper.run(sleeper.engine.sleep())
    assert free_bytes() - taken > 2**30
    sleeper.run(sleeper.engine.wake_up())
    after = sleeper.run(sleeper.engine.score(probe.token_ids))
    check_probe(probe, after, dtype="float32")
    torch.testing.assert_close(torch.from_numpy(after), torch.from_numpy(before))


@pytest.mark.parametrize(
    ("transfer", "colocate", "share"),
    [("object_store", True, 0.5), ("ipc", False, 0.5), ("nccl", False, 1)],
)
def test_a_learner_and_an_engine_train(
    cold_start, transfer: str, colocate: bool, share: float
) -> None:
    needed = 2 if share == 1 else 1
    if ray.cluster_resources().get("GPU", 0) < needed:
        pytest.skip(f"needs {needed} GPUs for {transfer}")
    config = (
        arpo_config(cold_start.model)
        .debugging(deterministic=False)
        .engine(
            "vllm",
            engine_kwargs=SETTINGS,
            weight_transfer=transfer,
            colocate=colocate,
        )
        .env_runners(num_env_runners=1, num_gpus_per_env_runner=share)
        .learners(num_learners=1, num_gpus_per_learner=share)
    )
    with running(config) as algorithm:
        for _ in range(2):
            result = algorithm.train()
            assert learned(result)["sampler_logprob_difference"] < 5e-3
            assert result["env_runners"]["engine"]["weight_probe_error"] < 1e-3
