"""A learner drives the transfer of weights, over vLLM's own interface.

NCCL and CUDA IPC need GPUs (`tests/gpu`); here the same steps move a window of shared
memory.
"""

import base64
import pickle
from typing import Any

import numpy as np
import pytest
import ray

from tests.vllm_session import VLLMSession, ask, moved, prompt_of, reference, weights_of

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("ray_session")]


class Remote:
    """A method as Ray's actors have it."""

    def __init__(self, function: Any) -> None:
        self._function = function

    def remote(self, *args: Any) -> ray.ObjectRef:
        return ray.put(self._function(*args))


class Recorder:
    """An EnvRunner that remembers what a learner told it."""

    def __init__(self) -> None:
        self.steps: list[tuple[str, Any]] = []
        self.transfer: Any = Remote(lambda *step: self.steps.append(step))


def test_every_worker_joins_under_a_rank_of_its_own_and_all_take_every_step() -> None:
    from rllib_arpo.engines.vllm_transfer import EnvRunnerClient

    runners: list[Any] = [Recorder(), Recorder(), Recorder()]
    client = EnvRunnerClient(runners, workers_each=2)
    client.version = 7
    # Rank 0 is the learner's; each runner has two workers.
    client.init_weight_transfer_engine({"rank_offset": 1, "world_size": 7})
    client.start_weight_update()
    client.update_weights({"names": ["a"]})
    client.finish_weight_update()
    for number, runner in enumerate(runners):
        assert runner.steps == [
            ("init", {"rank_offset": 1 + 2 * number, "world_size": 7}),
            ("start", None),
            ("update", {"names": ["a"]}),
            ("finish", 7),
        ]


def test_handles_of_gpu_memory_travel_as_text() -> None:
    from rllib_arpo.engines.vllm_transfer import EnvRunnerClient

    runner: Any = Recorder()
    handles = {"GPU-1": (print, (1, 2), b"bytes")}
    EnvRunnerClient([runner], 1).update_weights({"names": [], "ipc_handles": handles})
    ((_, sent),) = runner.steps
    assert "ipc_handles" not in sent
    assert pickle.loads(base64.b64decode(sent["ipc_handles_pickled"])) == handles


def test_an_engine_takes_weights_that_a_learner_sends(vllm: VLLMSession) -> None:
    from rllib_arpo.engines.vllm_transfer import EnvRunnerClient
    from rllib_arpo.engines.vllm_weights import WeightWindow

    new = moved(vllm.model, seed=4)
    text = prompt_of(60, seed=1)
    runner: Any = Recorder()
    runner.transfer = Remote(
        lambda step, value: vllm.run(vllm.engine.transfer(step, value))
    )
    client = EnvRunnerClient([runner], 1)
    window = WeightWindow(weights_of(new))
    client.version = 5
    client.init_weight_transfer_engine(window.description)
    window.path.unlink()
    client.start_weight_update()
    for part in window.fill(weights_of(new)):
        client.update_weights(part)
    client.finish_weight_update()
    assert vllm.engine.policy_version == 5
    (chunk,) = vllm.collect(ask("a", text, 4))
    assert set(chunk.policy_versions) == {5}
    given, expected = vllm.score(text), reference(new, text[:1], text[1:])[0]
    np.testing.assert_allclose(given, expected, atol=1e-4)
