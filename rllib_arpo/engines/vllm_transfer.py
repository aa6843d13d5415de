"""Weights from GPU to GPU: the learners' side of vLLM's own weight transfer.

The bytes go by NCCL broadcast (learner and engine on GPUs of their own) or as CUDA IPC
handles (both on the same GPU), never through the host's memory. The first learner
drives it: it calls `transfer` of every EnvRunner and sends at the same time.
"""

import base64
import math
import pickle
import socket
from collections.abc import Sequence
from typing import Any

import ray
import torch
from ray.actor import ActorHandle
from torch import nn
from vllm.distributed.weight_transfer.base import ModuleSource
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
from vllm.distributed.weight_transfer.packed_tensor import (
    DEFAULT_PACKED_BUFFER_SIZE_BYTES,
)


class EnvRunnerClient:
    """EnvRunners as vLLM's trainers see an engine (`VLLMWeightSyncClient`).

    Args:
        env_runners: actors with a method `transfer(step, argument)`.
        workers_each: GPUs of each.

    Attributes:
        version: of the weights that are sent.
    """

    def __init__(self, env_runners: Sequence[ActorHandle], workers_each: int) -> None:
        self._env_runners, self._workers_each = env_runners, workers_each
        self.version = 0

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Let every engine join, each worker under a rank of its own."""
        infos = [dict(init_info) for _ in self._env_runners]
        for number, info in enumerate(infos):
            if "rank_offset" in info:
                info["rank_offset"] += number * self._workers_each
        self._call("init", infos)

    def start_weight_update(self) -> None:
        """Pause the engines."""
        self._call("start", [None] * len(self._env_runners))

    def update_weights(self, update_info: Any) -> None:
        """Let the engines receive what this process sends meanwhile."""
        if "ipc_handles" in update_info:
            # Tuples would reach vLLM's processes as lists.
            handles = pickle.dumps(update_info.pop("ipc_handles"))
            update_info["ipc_handles_pickled"] = base64.b64encode(handles).decode()
        self._call("update", [update_info] * len(self._env_runners))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Let the engines go on, with tokens stamped `version`."""
        self._call("finish", [self.version] * len(self._env_runners))

    def _call(self, step: str, arguments: Sequence[Any]) -> None:
        calls = zip(self._env_runners, arguments, strict=True)
        ray.get([runner.transfer.remote(step, value) for runner, value in calls])


class WeightSender:
    """Sends a learner's weights to a set of EnvRunners, again and again.

    Every learner has one, since the weights may be spread over all of them.

    Args:
        model: the policy; its parameters have Hugging Face names.
        backend: "nccl" or "ipc".
        env_runners: whose engines receive.
        workers_each: GPUs of each engine.
        rank: of this learner.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        backend: str,
        env_runners: Sequence[ActorHandle],
        workers_each: int,
        rank: int,
    ) -> None:
        self._client = EnvRunnerClient(env_runners, workers_each)
        source = ModuleSource(model)
        # Learners on one machine see each other's GPUs; vLLM takes the current one.
        self._device = next(model.parameters()).device
        if backend == "nccl":
            info = NCCLTrainerInitInfo(
                rank=rank,
                master_address=ray.util.get_node_ip_address(),
                master_port=_free_port(),
                world_size=1 + len(env_runners) * workers_each,
            )
        else:
            largest = max(
                math.prod(one.shape) * one.dtype.itemsize for one in source.metadata()
            )
            info = IPCTrainerInitInfo(
                rank=rank,
                packed=True,
                packed_buffer_size_bytes=max(largest, DEFAULT_PACKED_BUFFER_SIZE_BYTES),
            )
        with torch.cuda.device(self._device):
            self._trainer = WeightTransferTrainerFactory.trainer_init(
                info, client=self._client, source=source
            )

    def send(self, version: int) -> None:
        """Send all weights; returns when every engine runs them."""
        self._client.version = version
        with torch.cuda.device(self._device):
            # vLLM reads the weights on streams that do not wait for the last step.
            torch.cuda.synchronize()
            self._trainer.send_weights()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("", 0))
        return listener.getsockname()[1]
