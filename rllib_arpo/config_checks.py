"""What `ARPOConfig.validate` refuses: settings that cannot work, or not together.

Every message names the settings with their values, and the cure.
"""

from collections.abc import Iterator
from numbers import Integral
from typing import TYPE_CHECKING

from rllib_arpo.config_numbers import (
    OF_SAMPLING,
    OF_TRAINING,
    betas_faults,
    number_faults,
)
from rllib_arpo.engines.torch_engine import Settings
from rllib_arpo.errors import ConfigError
from rllib_arpo.lora import lora_settings
from rllib_arpo.rl_module import DTYPES, KEYS

if TYPE_CHECKING:
    from rllib_arpo.config import ARPOConfig

CHOICES = {
    "engine_name": ("torch", "vllm"),
    "weight_transfer": ("object_store", "nccl", "ipc"),
    "old_logprobs": ("rollout", "recompute"),
    "loss_aggregation": ("token_mean", "sequence_mean"),
    "advantage_attribution": ("soft", "hard"),
    "advantage_normalization": ("group", "batch"),
    "optimizer": ("adamw", "muon"),
    "lr_schedule": ("constant", "linear", "cosine"),
    "packing": ("tree", "paths"),
    "learner_strategy": ("ddp", "fsdp2"),
}


def faults(config: "ARPOConfig") -> Iterator[str]:
    """One message for each rule that `config` breaks.

    A config for evaluation is not asked about training.
    """
    yield from number_faults(config, OF_SAMPLING)
    if not config.in_evaluation:
        yield from number_faults(config, OF_TRAINING)
        yield from betas_faults(config.adam_betas)
    for name, choices in CHOICES.items():
        value = getattr(config, name)
        if value not in choices:
            # As methods and flags call it.
            name = "engine" if name == "engine_name" else name
            listed = ", ".join(map(repr, choices))
            yield f"`{name}` ({value!r}) must be one of {listed}."
    try:
        config.tree_settings()
    except ConfigError as error:
        yield str(error)
    yield from _model_faults(config)
    yield from _lora_faults(config)
    yield from _engine_faults(config)
    if not config.in_evaluation:
        yield from _batch_faults(config)
        yield from _loss_faults(config)
        yield from _sampling_faults(config)
        yield from _asynchronous_faults(config)
        yield from _evaluation_faults(config)


def _model_faults(config: "ARPOConfig") -> Iterator[str]:
    given = config.model_config
    # A module of the user's own may read others.
    unknown = given.keys() - {*KEYS} if config._rl_module_spec is None else ()
    for name in sorted(unknown):
        yield f"`model_config` holds `{name}`, but it takes {', '.join(KEYS)} only."
    if not given.get("model"):
        yield (
            'No model: set `.rl_module(model_config={"model": ...})` to a '
            "Hugging Face folder or hub name."
        )
    dtype = str(given.get("dtype") or "float32")
    if dtype not in DTYPES:
        yield (
            f"`model_config` holds `dtype` {dtype!r}: it must be one of "
            f"{', '.join(map(repr, DTYPES))}."
        )


def _lora_faults(config: "ARPOConfig") -> Iterator[str]:
    if "lora" in config.engine_kwargs:
        yield (
            "`engine_kwargs` holds `lora`, which learners must know as well: set "
            '`.rl_module(model_config={"lora": ...})`.'
        )
    given = config.model_config.get("lora")
    if given is None:
        return
    try:
        lora_settings(given)
    except ConfigError as error:
        yield f"{error}."
    if config.weight_transfer != "object_store":
        yield (
            f"`weight_transfer` ({config.weight_transfer!r}) sends whole models, "
            "`lora` trains adapters: take the 'object_store'."
        )


def _engine_faults(config: "ARPOConfig") -> Iterator[str]:
    if config.engine_name == "torch":
        known = sorted(Settings.__annotations__)
        for name in config.engine_kwargs.keys() - {*known}:
            yield (
                f"`engine_kwargs` holds `{name}`, unknown to the torch engine: "
                f"it takes {', '.join(known)}."
            )
        if config.weight_transfer != "object_store":
            yield (
                f"`weight_transfer` ({config.weight_transfer!r}) is vLLM's: the torch "
                "engine takes weights from the 'object_store'."
            )
        return
    yield from _transfer_faults(config)
    if config.deterministic:
        yield (
            '`deterministic` (True) is a mode of `engine` "torch": vLLM\'s batches '
            "depend on timing. Set one of them otherwise."
        )
    gpus = config.num_gpus_per_env_runner or 0
    size = config.engine_kwargs.get("tensor_parallel_size", max(int(gpus), 1))
    share = config.engine_kwargs.get("gpu_memory_utilization")
    if gpus >= 1 and gpus != size:
        yield (
            f"`num_gpus_per_env_runner` ({gpus}) must be a whole number and equal "
            f"`tensor_parallel_size` ({size}): vLLM spreads the model over all GPUs "
            "of its EnvRunner."
        )
    elif 0 < gpus < 1 and size > 1:
        yield (
            f"`num_gpus_per_env_runner` ({gpus}) is a part of one GPU, but "
            f"`tensor_parallel_size` ({size}) asks for several."
        )
    elif 0 < gpus < 1 and not config.colocate and (share is None or share > gpus):
        yield (
            f"`num_gpus_per_env_runner` ({gpus}) shares a GPU, of which vLLM takes "
            f"`gpu_memory_utilization` ({share or 'its default, about 0.9'}). Set "
            f'`engine_kwargs={{"gpu_memory_utilization": ...}}` to at most {gpus}, '
            "or `colocate=True` to take turns with a learner."
        )


def _transfer_faults(config: "ARPOConfig") -> Iterator[str]:
    way, num_learners = config.weight_transfer, config.num_learners or 1
    engine, learner = config.num_gpus_per_env_runner, config.num_gpus_per_learner
    if way == "object_store":
        return
    if not (config.num_env_runners and engine and learner):
        yield (
            f"`weight_transfer` ({way!r}) goes from GPU to GPU: set `num_env_runners`, "
            "`num_gpus_per_env_runner` and `num_gpus_per_learner`, or take the "
            "'object_store'."
        )
    elif way == "nccl" and (engine < 1 or learner < 1 or config.colocate):
        yield (
            "`weight_transfer` ('nccl') needs a GPU of its own for each process: set "
            f"`num_gpus_per_env_runner` ({engine}) and `num_gpus_per_learner` "
            f"({learner}) to at least 1 and `colocate` ({config.colocate}) to False, "
            "or take 'ipc'."
        )
    elif way == "ipc" and config.num_learners and (engine >= 1 or learner >= 1):
        yield (
            "`weight_transfer` ('ipc') stays on one GPU: set "
            f"`num_gpus_per_env_runner` ({engine}) and `num_gpus_per_learner` "
            f"({learner}) to parts of it, or take 'nccl'."
        )
    elif way == "ipc" and config.num_env_runners != num_learners:
        yield (
            "`weight_transfer` ('ipc') pairs each EnvRunner with the learner of its "
            f"GPU: `num_env_runners` ({config.num_env_runners}) must be the number of "
            f"learners ({num_learners})."
        )


def _batch_faults(config: "ARPOConfig") -> Iterator[str]:
    batch, mini = config.train_batch_size_per_learner, config.minibatch_size
    if not isinstance(mini, Integral) or not 1 <= mini <= batch:
        yield (
            f"`minibatch_size` ({mini}) must be between 1 and "
            f"`train_batch_size_per_learner` ({batch}): both count trees per learner."
        )
    row, budget = config.max_tokens_per_row, config.max_tokens_per_microbatch
    if row is not None and row > budget:
        yield (
            f"`max_tokens_per_row` ({row}) must be at most "
            f"`max_tokens_per_microbatch` ({budget}), which is also what None takes."
        )
    yield from _schedule_faults(config)


def _schedule_faults(config: "ARPOConfig") -> Iterator[str]:
    if config.lr_schedule == "constant":
        return
    warmup, total = config.lr_warmup_steps, config.lr_total_steps
    if total is None:
        yield (
            f"`lr_schedule` ({config.lr_schedule!r}) needs `lr_total_steps` (None): "
            "set the optimizer step at which the learning rate reaches 0."
        )
    elif warmup >= total:
        yield (
            f"`lr_warmup_steps` ({warmup}) must be less than `lr_total_steps` "
            f"({total}), where the learning rate is 0 again: lower the first or raise "
            "the second."
        )


def _loss_faults(config: "ARPOConfig") -> Iterator[str]:
    high = config.clip_param_high
    if high is not None and high < config.clip_param:
        yield (
            f"`clip_param_high` ({high}) must be >= `clip_param` "
            f"({config.clip_param}), or None for the same bound on both sides."
        )
    lagging = config.asynchronous and config.max_policy_lag > 0  # asked for below
    cap, old = config.tis_cap, config.old_logprobs
    if cap is not None and old == "rollout" and not lagging:
        yield (
            f"`tis_cap` ({cap}) bounds π_old / π_rollout, which `old_logprobs` "
            "('rollout') makes 1 for every token, so it would change nothing. Set "
            '`old_logprobs="recompute"`, or tis_cap=None.'
        )


def _sampling_faults(config: "ARPOConfig") -> Iterator[str]:
    if config.temperature == 0:
        yield (
            "`temperature` (0) gives every token probability 1, so nothing can be "
            "learned. Train with 1.0; evaluate greedily through "
            "`.evaluation(evaluation_config=ARPOConfig.overrides(temperature=0))`."
        )
    if (config.top_p < 1 or config.top_k > 0) and config.old_logprobs == "rollout":
        yield (
            f"`top_p` ({config.top_p}) and `top_k` ({config.top_k}) cut the sampler's "
            "distribution but not the learner's, so `old_logprobs` ('rollout') "
            'would bias every ratio. Set `old_logprobs="recompute"`, or '
            "top_p=1 and top_k=0."
        )
    roots = config.num_initial_rollouts
    if config.branch_rule != "never" and config.group_size == roots:
        yield (
            f"`num_initial_rollouts` ({roots}) equals `group_size` "
            f"({config.group_size}), so no leaf is left for a branch. "
            'Lower the first, or set `branch_rule="never"` (GRPO).'
        )


def _asynchronous_faults(config: "ARPOConfig") -> Iterator[str]:
    if not config.asynchronous:
        return
    lag = config.max_policy_lag
    if not config.num_env_runners:
        yield (
            "`asynchronous` (True) needs EnvRunners beside the driver: set "
            f"`.env_runners(num_env_runners=...)` ({config.num_env_runners}) to 1 or "
            "more."
        )
    if lag > 0 and (config.tis_cap is None or config.old_logprobs != "recompute"):
        yield (
            f"`max_policy_lag` ({lag}) trains on tokens of older weights, which needs "
            f"importance weights: `tis_cap` ({config.tis_cap}) and `old_logprobs` "
            f"({config.old_logprobs!r}). Set "
            '`.training(tis_cap=2.0, old_logprobs="recompute")`, or max_policy_lag=0.'
        )
    if lag > 0 and config.deterministic:
        yield (
            f"`deterministic` (True) cannot hold with `max_policy_lag` ({lag}): which "
            "tree meets which weights depends on timing. Set "
            "`.debugging(deterministic=False)`, or max_policy_lag=0."
        )
    if config.dynamic_sampling:
        yield (
            "`dynamic_sampling` (True) draws a batch again until it is full of trees "
            "that teach, which `asynchronous` (True) does not wait for. Set one of "
            "them to False."
        )
    if config.colocate:
        yield (
            "`colocate` (True) puts the engines to sleep while learners update, "
            "`asynchronous` (True) keeps them awake. Set one of them to False."
        )


def _evaluation_faults(config: "ARPOConfig") -> Iterator[str]:
    if config.evaluation_duration == "auto":
        yield (
            "`evaluation_duration` ('auto') is not supported: a trajectory has no "
            "fixed length. Set it to the number of evaluation tasks."
        )
    if config.evaluation_duration_unit != "episodes":
        yield (
            f"`evaluation_duration_unit` ({config.evaluation_duration_unit!r}) must "
            "be 'episodes': an episode is the tree of one task."
        )
    if config.evaluation_interval and config.eval_tasks is None:
        yield (
            f"`evaluation_interval` ({config.evaluation_interval}) is set but "
            "`eval_tasks` is None. Set `.environment(eval_tasks=...)`."
        )
