"""What runs inside vLLM's own processes: exact entropies, weights from shared memory.

vLLM imports this module in every worker, by the name in `worker_extension_cls`.

1. A token's entropy travels in the place of its second log-probability. vLLM offers
   the k most likely tokens, or all of them as Python objects; neither is an exact
   entropy at a price that one can pay. Requests ask for one log-probability, and get
   [that of the sampled token, the entropy]; the rank of the token, which vLLM would
   count over the vocabulary, is left out, so this costs less than what it replaces.
2. Weights come as a window of shared memory, filled by the EnvRunner, and go through
   vLLM's own reload of a checkpoint, layer by layer.
"""

import mmap
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.platforms import current_platform
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.sample.sampler import Sampler

from rllib_arpo.engines.vllm_weights import SHARED_MEMORY


class WorkerExtension:
    """Its import is what matters."""


# Numbers that fit into the cache of a CPU's core, and into the memory of a GPU that
# vLLM leaves: it does not count log-probabilities when it measures what it needs.
_AT_ONCE = {"cpu": 2**18, "cuda": 2**25}


def entropy(logprobs: Tensor) -> Tensor:
    """[B] H = -Σ p ln p in nats of [B, V] log-probabilities; -inf counts nothing."""
    return torch.cat([_entropy(part) for part in _row_parts(logprobs)])


def _row_parts(table: Tensor) -> tuple[Tensor, ...]:
    """A few rows at a time, since the steps between need tables of that size."""
    return table.split(max(_AT_ONCE[table.device.type] // table.shape[-1], 1))


def _entropy(logprobs: Tensor) -> Tensor:
    # 0 · -inf would be NaN. The fastest of the exact forms on a CPU.
    return -torch.linalg.vecdot(logprobs.exp(), logprobs.clamp_min(-1e4))


def _other_ids(token_ids: Tensor, vocab_size: int) -> Tensor:
    """Ids under which entropies travel; where vLLM makes a dict, none may be lost."""
    return (token_ids + 1) % vocab_size


_gather_logprobs = Sampler.gather_logprobs


def _gather(logprobs: Tensor, num_logprobs: int, token_ids: Tensor) -> Any:
    """`Sampler.gather_logprobs` with the entropy for one, and without ranks for none.

    Args:
        logprobs: [B, V] float32.
        num_logprobs: how many besides the sampled (or prompt) token's.
        token_ids: [B] int64.
    """
    if num_logprobs > 1:
        return _gather_logprobs(logprobs, num_logprobs, token_ids)
    ids, values = [token_ids], [logprobs.gather(-1, token_ids[:, None])[:, 0]]
    if num_logprobs == 1:
        ids.append(_other_ids(token_ids, logprobs.shape[-1]))
        values.append(entropy(logprobs))
    return LogprobsTensors(
        logprob_token_ids=torch.stack(ids, -1).to(torch.int32),
        logprobs=torch.stack(values, -1),
        selected_token_ranks=torch.zeros_like(token_ids),
    )


Sampler.gather_logprobs = staticmethod(_gather)

if current_platform.is_cuda_alike():
    # GPUs with Triton run another sampler, of functions that it imports by name; so
    # does the one that checks the tokens of speculative decoding.
    from vllm.v1.worker.gpu.sample import sampler as gpu_sampler
    from vllm.v1.worker.gpu.spec_decode import rejection_sampler

    _compute_topk_scores = gpu_sampler.compute_topk_scores

    def _scores(
        logits: Tensor, num_logprobs: int, sampled: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """`compute_topk_scores` with the entropy for one log-probability."""
        count = 0 if num_logprobs == 1 else num_logprobs
        scores = _compute_topk_scores(logits, count, sampled, *args, **kwargs)
        if num_logprobs != 1:
            return scores
        ids = scores.logprob_token_ids
        entropies = torch.cat(
            [_entropy(part.float().log_softmax(-1)) for part in _row_parts(logits)]
        )
        return scores._replace(
            logprob_token_ids=torch.cat([ids, _other_ids(ids, logits.shape[-1])], 1),
            logprobs=torch.cat([scores.logprobs, entropies[:, None]], 1),
        )

    gpu_sampler.compute_topk_scores = _scores
    rejection_sampler.compute_topk_scores = _scores


@dataclass
class WindowInfo(WeightTransferInitInfo):
    """The window.

    Attributes:
        path: a file that all workers can map.
        size: bytes.
    """

    path: str
    size: int


@dataclass
class TensorsInfo(WeightTransferUpdateInfo):
    """The tensors that stand in the window.

    Attributes:
        names: Hugging Face names.
        dtypes: as "float32".
        shapes: one for each name.
        offsets: where each begins, in bytes.
    """

    names: list[str]
    dtypes: list[str]
    shapes: list[list[int]]
    offsets: list[int]


class SharedMemoryTransfer(WeightTransferEngine[WindowInfo, TensorsInfo]):
    """Loads what the EnvRunner wrote into the window, a few layers at a time."""

    init_info_cls = WindowInfo
    update_info_cls = TensorsInfo
    _window: mmap.mmap | None = None

    def init_transfer_engine(self, init_info: WindowInfo) -> None:
        with open(init_info.path, "r+b") as file:
            self._window = mmap.mmap(file.fileno(), init_info.size)

    model: Any

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: TensorsInfo) -> None:
        assert self._window is not None
        self.model.load_weights(
            (
                name,
                torch.frombuffer(
                    self._window,
                    dtype=getattr(torch, dtype),
                    count=torch.Size(shape).numel(),
                    offset=offset,
                ).view(shape),
            )
            for name, dtype, shape, offset in zip(
                update_info.names,
                update_info.dtypes,
                update_info.shapes,
                update_info.offsets,
                strict=True,
            )
        )

        self._keep_what_waits()

    def _keep_what_waits(self) -> None:
        """Copy what vLLM has not taken yet, since the window is about to change.

        It waits with a layer until all of its elements are there. A vocabulary that
        is padded has some that never come, so it waits until the end.
        """
        first = torch.frombuffer(self._window, dtype=torch.uint8)
        window = range(first.data_ptr(), first.data_ptr() + first.numel())
        for layer in self.model.modules():
            for _, call in get_layerwise_info(layer).loaded_weights:
                for name, value in call.arguments.items():
                    if isinstance(value, Tensor) and value.data_ptr() in window:
                        call.arguments[name] = value.clone()

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        if current_platform.is_cpu():
            _repack_tied_head(self.model)

    def shutdown(self) -> None:
        self._window = None


def _repack_tied_head(model: Any) -> None:
    """On CPUs a tied output layer holds a packed copy that a reload passes by."""
    if not model.config.tie_word_embeddings:
        return
    modules = list(model.modules())
    embedding = next(m for m in modules if type(m) is VocabParallelEmbedding)
    for head in modules:
        if isinstance(head, ParallelLMHead):
            head.weight = embedding.weight
            head.quant_method.process_weights_after_loading(head)


WeightTransferEngineFactory.register_engine(SHARED_MEMORY, SharedMemoryTransfer)
