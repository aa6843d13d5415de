"""Weights on their way from the EnvRunner into vLLM's processes.

They stand in shared memory, but not all at once: a window holds a few layers, the
workers load them, the next layers follow. So a model that fills half of the machine
does not fill it twice. A layer is never cut: vLLM joins its matrices when it has all.
"""

import json
import mmap
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM
from vllm.distributed.weight_transfer.base import (
    WeightTransferInitRequest,
    WeightTransferUpdateRequest,
    layerwise_groups,
)
from vllm.lora.request import LoRARequest
from vllm.v1.engine.async_llm import AsyncLLM

from rllib_arpo.arrays import to_tensor
from rllib_arpo.engines.weights import check_arrays
from rllib_arpo.errors import WeightSyncError

# Name under which `vllm_worker.py` registers its way of transfer.
SHARED_MEMORY = "rllib_arpo_shared_memory"

WINDOW_BYTES = 128 * 2**20
_ALIGNMENT = 64
Names = list[str]


def parameter_shapes(
    model: str,
) -> tuple[dict[str, tuple[int, ...]], list[Names]]:
    """Shapes of what a model's state dict names, and the names of each parameter.

    Tied weights have several, the one in a checkpoint first.

    Args:
        model: folder or hub name; only its configuration is read.
    """
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    module.tie_weights()
    state = module.state_dict(keep_vars=True)
    names: dict[int, Names] = {id(p): [] for p in module.parameters()}
    for name, tensor in state.items():
        if id(tensor) in names:
            names[id(tensor)].append(name)
    return {name: tuple(t.shape) for name, t in state.items()}, list(names.values())


class VLLMWeights:
    """The weights of one vLLM.

    Args:
        llm: which.
        model: its folder or hub name.
        lora: PEFT's `LoraConfig` as a dict, where updates are adapters.

    Attributes:
        adapter: of requests to come; None before the first.
        window_bytes: shared memory for an update, more if a layer needs it.
    """

    def __init__(
        self, llm: AsyncLLM, model: str, lora: Mapping[str, Any] | None
    ) -> None:
        self._llm, self._model = llm, model
        self.adapters = None if lora is None else AdapterFolders(lora)
        self.adapter: LoRARequest | None = None
        self._num_adapters = 0
        self._parameters: tuple[dict[str, tuple[int, ...]], list[Names]] = ({}, [])
        self._window: WeightWindow | None = None
        self.window_bytes = WINDOW_BYTES

    def check(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Refuse what does not fit before anything is touched.

        Raises:
            WeightSyncError: names what is wrong.
        """
        is_adapter = [".lora_" in name for name in arrays]
        if self.adapters is not None:
            if not all(is_adapter):
                raise WeightSyncError(
                    "the engine was started with `lora`, but the weights are not an "
                    f"adapter's: {next(n for n in arrays if '.lora_' not in n)}"
                )
            return
        if any(is_adapter):
            raise WeightSyncError(
                "the weights are a LoRA adapter's: give the engine `lora`, PEFT's "
                "`LoraConfig` as a dict, in `engine_kwargs`"
            )
        if not self._parameters[0]:
            self._parameters = parameter_shapes(self._model)
        shapes, required = self._parameters
        check_arrays(arrays, shapes=shapes, required=required, model=self._model)

    async def load(self, version: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Put all weights in place, while vLLM is paused."""
        # vLLM passes by what a checkpoint of this model would not hold. Buffers that
        # are saved have no other name.
        known = {name: names[0] for names in self._parameters[1] for name in names}
        arrays = {known.get(name, name): array for name, array in arrays.items()}
        if self._window is None or not self._window.holds(arrays):
            self._window = WeightWindow(arrays, limit=self.window_bytes)
            try:
                await self._llm.init_weight_transfer_engine(
                    WeightTransferInitRequest(self._window.description)
                )
            finally:
                # All workers have mapped the file; a crash leaves nothing behind.
                self._window.path.unlink()
        await self._llm.start_weight_update()
        for part in self._window.fill(arrays):
            await self._llm.update_weights(WeightTransferUpdateRequest(part))
        await self._llm.finish_weight_update(str(version))

    def forget_window(self) -> None:
        """The workers have mapped another: the next update begins with a new one."""
        self._window = None

    def swap_adapter(self, version: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Give requests to come a new adapter, new in name and number.

        Under a known one vLLM would go on with the old weights.
        """
        assert self.adapters is not None
        self._num_adapters += 1
        folder = self.adapters.write(self._num_adapters, arrays)
        name = f"{version}/{self._num_adapters}"
        self.adapter = LoRARequest(name, self._num_adapters, str(folder))

    def close(self) -> None:
        """Remove files, and let go of vLLM."""
        del self._llm
        if self.adapters is not None:
            self.adapters.close()


class WeightWindow:
    """A file in shared memory through which weights pass.

    Args:
        arrays: the weights that will pass; later ones have the same names and sizes.
        limit: most bytes, but that the largest layer fits.

    Attributes:
        path: of the file; memory that is mapped stays when it is removed.
        size: bytes.
    """

    def __init__(
        self, arrays: Mapping[str, np.ndarray], *, limit: int = WINDOW_BYTES
    ) -> None:
        self._sizes = {name: array.nbytes for name, array in arrays.items()}
        groups = layerwise_groups(list(arrays))
        sizes = [sum(_padded(arrays[name]) for name in group) for group in groups]
        self._parts: list[Names] = [[]]
        filled = 0
        self.size = max(min(sum(sizes), limit), *sizes)
        for group, size in zip(groups, sizes, strict=True):
            if filled + size > self.size:
                self._parts.append([])
                filled = 0
            self._parts[-1] += group
            filled += size
        descriptor, path = tempfile.mkstemp(
            prefix="rllib_arpo_", dir=_shared_memory(self.size)
        )
        self.path = Path(path)
        os.ftruncate(descriptor, self.size)
        self._memory = mmap.mmap(descriptor, self.size)
        os.close(descriptor)

    @property
    def description(self) -> dict[str, Any]:
        """What `vllm_worker.WindowInfo` says."""
        return {"path": str(self.path), "size": self.size}

    def holds(self, arrays: Mapping[str, np.ndarray]) -> bool:
        """Whether these are the weights that it was made for."""
        return self._sizes == {name: array.nbytes for name, array in arrays.items()}

    def fill(self, arrays: Mapping[str, np.ndarray]) -> Iterator[dict[str, Any]]:
        """Put the weights into the window, part by part.

        Yields:
            What `vllm_worker.TensorsInfo` says of the part; the next one overwrites
            it.
        """
        window = np.frombuffer(self._memory, np.uint8)
        for names in self._parts:
            offset, offsets = 0, []
            for name in names:
                source = np.ascontiguousarray(arrays[name]).reshape(-1).view(np.uint8)
                window[offset : offset + source.size] = source
                offsets.append(offset)
                offset += _padded(arrays[name])
            yield {
                "names": names,
                "dtypes": [_dtype_name(arrays[name]) for name in names],
                "shapes": [list(arrays[name].shape) for name in names],
                "offsets": offsets,
            }


class AdapterFolders:
    """LoRA adapters as the folders that vLLM reads, one for each version.

    Args:
        lora_config: PEFT's `LoraConfig` as a dict.
    """

    def __init__(self, lora_config: Mapping[str, Any]) -> None:
        self._config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", **lora_config}
        self._root = Path(tempfile.mkdtemp(prefix="rllib_arpo_", dir=_shared_memory(0)))

    def write(self, number: int, arrays: Mapping[str, np.ndarray]) -> Path:
        """Write an adapter; the one before the last is removed.

        Args:
            number: names the folder.
            arrays: PEFT's names -> arrays, as `get_peft_model_state_dict` gives them.
        """
        folder = self._root / str(number)
        folder.mkdir(exist_ok=True)
        save_file(
            {name: to_tensor(array) for name, array in arrays.items()},
            folder / "adapter_model.safetensors",
        )
        (folder / "adapter_config.json").write_text(json.dumps(self._config))
        for old in sorted(self._root.iterdir(), key=os.path.getmtime)[:-2]:
            shutil.rmtree(old)
        return folder

    def close(self) -> None:
        """Remove all folders."""
        shutil.rmtree(self._root, ignore_errors=True)


def _padded(array: np.ndarray) -> int:
    return -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT


def _dtype_name(array: np.ndarray) -> str:
    if array.dtype == ml_dtypes.bfloat16:
        return "bfloat16"
    return array.dtype.name


def _shared_memory(size: int) -> str | None:
    """/dev/shm where it has room, which a container's often has not."""
    folder = Path("/dev/shm")
    if not folder.is_dir() or shutil.disk_usage(folder).free < 2 * size:
        return None
    return str(folder)
