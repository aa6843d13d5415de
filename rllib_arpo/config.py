"""`ARPOConfig`: the settings of ARPO, in RLlib's chained groups.

    config = (
        ARPOConfig()
        .environment(env=ToolUseEnv, train_tasks="train.parquet")
        .rl_module(model_config={"model": "Qwen/Qwen2.5-3B-Instruct"})
        .tree_rollout(group_size=16, num_initial_rollouts=8)
        .training(lr=1e-6, train_batch_size_per_learner=128, minibatch_size=16)
    )
    algo = config.build_algo()

Where this differs from RLlib: batch sizes count trees (one per prompt), not steps,
because a tree is never split; there is no local EnvRunner beside remote ones, so that
the driver holds no model; and evaluation runs on the training EnvRunners unless
`evaluation_num_env_runners` asks for others.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

import ray
from ray.rllib.algorithms.algorithm_config import (
    DEPRECATED_VALUE,
    AlgorithmConfig,
    NotProvided,
)
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.utils.annotations import override

from rllib_arpo.config_checks import faults
from rllib_arpo.data.sources import TaskSource
from rllib_arpo.engines.engine import Engine, SamplingParams
from rllib_arpo.envs.tool_use_env import ToolUseEnv
from rllib_arpo.errors import ConfigError
from rllib_arpo.imports import import_object
from rllib_arpo.lora import lora_settings
from rllib_arpo.rollouts.branching import BRANCH_RULES, BranchRule, TreeSettings

if TYPE_CHECKING:
    from rllib_arpo.arpo import ARPO
    from rllib_arpo.learner_group import ARPOLearnerGroup

# RLlib's mark of a setting that a call leaves as it is; it has no type of its own.
NOT_PROVIDED: Any = NotProvided


class ARPOConfig(AlgorithmConfig):
    """Settings of `ARPO`; the defaults are those of the paper's appendix C.2."""

    def __init__(self, algo_class: type | None = None) -> None:
        from rllib_arpo.arpo import ARPO, evaluate_on_env_runners
        from rllib_arpo.rollouts.env_runner import ARPOEnvRunner

        super().__init__(algo_class=algo_class or ARPO)

        # environment()
        self.env = ToolUseEnv
        self.train_tasks: TaskSource | None = None
        self.eval_tasks: TaskSource | None = None

        # tree_rollout()
        self.group_size = 16
        self.num_initial_rollouts = 8
        self.branch_factor = 2
        self.branch_rule: str | BranchRule = "threshold"
        self.branch_base = 0.5
        self.branch_entropy_weight = 0.2
        self.branch_threshold = 0.5
        self.entropy_probe_tokens = 20
        self.max_tool_failure_share: float | None = 0.5

        # engine()
        self.engine_name = "torch"
        self.engine_kwargs: dict[str, Any] = {}
        self.engine_log_dir: str | None = None
        self.weight_transfer = "object_store"
        self.colocate = False
        self.temperature = 1.0
        self.top_p = 1.0
        self.top_k = 0

        # training()
        self.lr = 1e-6
        self.train_batch_size_per_learner = 128
        self.minibatch_size = 16
        self.num_epochs = 1
        self.shuffle_batch_per_epoch = True
        self.clip_param = 0.2
        self.clip_param_high: float | None = None
        self.dual_clip: float | None = 3.0
        self.kl_coeff = 0.0
        self.entropy_coeff = 0.0
        self.tis_cap: float | None = None
        self.old_logprobs = "rollout"
        self.loss_aggregation = "token_mean"
        self.advantage_attribution = "soft"
        self.advantage_normalization = "group"
        self.normalize_by_std = True
        self.optimizer = "adamw"
        self.muon_lr = 0.01
        self.weight_decay = 0.01
        self.adam_betas = (0.9, 0.999)
        self.lr_schedule = "constant"
        self.lr_warmup_steps = 0
        self.lr_total_steps: int | None = None
        self.grad_clip = 1.0
        self.grad_clip_by = "global_norm"
        self.packing = "tree"
        self.max_tokens_per_row: int | None = None
        self.max_tokens_per_microbatch = 16_384
        self.max_skipped_steps = 10
        self.dynamic_sampling = False
        self.max_dynamic_sampling_rounds = 3
        self.asynchronous = False
        self.max_policy_lag = 1
        self.max_concurrent_trees: int | None = None

        # learners()
        self.learner_strategy = "ddp"

        # debugging()
        self.deterministic = False

        # RLlib's own defaults that do not fit rollouts of minutes by a large model.
        self.env_runner_cls = ARPOEnvRunner
        self.custom_evaluation_function = evaluate_on_env_runners
        self.batch_mode = "complete_episodes"
        self.sample_timeout_s = None
        self.evaluation_sample_timeout_s = 86_400.0
        self.max_requests_in_flight_per_env_runner = 4
        self._dont_auto_sync_env_runner_states = True
        self.delay_between_env_runner_restarts_s = 1.0
        self.restart_failed_env_runners = True

    @override(AlgorithmConfig)
    def environment(
        self,
        env: Any = NOT_PROVIDED,
        *,
        train_tasks: TaskSource | None = NOT_PROVIDED,
        eval_tasks: TaskSource | None = NOT_PROVIDED,
        **kwargs: Any,
    ) -> Self:
        """Set the environment and the tasks that it is reset to.

        Args:
            env: a `ToolUseEnv` subclass, or any gymnasium env over `TokenSequence`
                spaces, as a class, a registered name or through `tune.register_env`.
                `env_config` reaches its constructor, with "tokenizer" added.
            train_tasks: a parquet or jsonl file, a list of `Task`, or a picklable
                function that returns one (called in the driver).
            eval_tasks: the same, for `evaluate()`.
            **kwargs: see `AlgorithmConfig.environment`.
        """
        super().environment(env, **kwargs)
        return self._set(train_tasks=train_tasks, eval_tasks=eval_tasks)

    def tree_rollout(
        self,
        *,
        group_size: int = NOT_PROVIDED,
        num_initial_rollouts: int = NOT_PROVIDED,
        branch_factor: int = NOT_PROVIDED,
        branch_rule: str | BranchRule = NOT_PROVIDED,
        branch_base: float = NOT_PROVIDED,
        branch_entropy_weight: float = NOT_PROVIDED,
        branch_threshold: float = NOT_PROVIDED,
        entropy_probe_tokens: int = NOT_PROVIDED,
        max_tool_failure_share: float | None = NOT_PROVIDED,
    ) -> Self:
        """Set the shape of a tree (arXiv:2507.19849, section 3.1, appendix C.2).

        Args:
            group_size: M, leaves per tree.
            num_initial_rollouts: N, paths that start at the prompt. Ignored by
                `branch_rule="never"`, which starts all M at once.
            branch_factor: Z, paths that leave a branch point (2 = one extra).
            branch_rule: "threshold" (the paper), "bernoulli", "random", "always",
                "never" (= GRPO), a function `(BranchPoint) -> bool`, or the import
                path "module:function" of one.
            branch_base: α in P = α + β·ΔH.
            branch_entropy_weight: β.
            branch_threshold: τ.
            entropy_probe_tokens: k, tokens over which an entropy is averaged.
            max_tool_failure_share: an iteration in which a larger share of the tool
                calls failed (not: answered with an error that the model caused)
                stops with `ToolOutageError`. None switches the check off.
        """
        return self._set(
            group_size=group_size,
            num_initial_rollouts=num_initial_rollouts,
            branch_factor=branch_factor,
            branch_rule=branch_rule,
            branch_base=branch_base,
            branch_entropy_weight=branch_entropy_weight,
            branch_threshold=branch_threshold,
            entropy_probe_tokens=entropy_probe_tokens,
            max_tool_failure_share=max_tool_failure_share,
        )

    def engine(
        self,
        engine: str = NOT_PROVIDED,
        *,
        engine_kwargs: Mapping[str, Any] = NOT_PROVIDED,
        weight_transfer: str = NOT_PROVIDED,
        colocate: bool = NOT_PROVIDED,
        log_dir: str | None = NOT_PROVIDED,
        temperature: float = NOT_PROVIDED,
        top_p: float = NOT_PROVIDED,
        top_k: int = NOT_PROVIDED,
    ) -> Self:
        """Set what generates tokens in the EnvRunners, and how it samples.

        Args:
            engine: "torch", in-process and exact, or "vllm".
            engine_kwargs: keyword arguments of the engine's class: `TorchEngine`, or
                `VLLMEngine.start` and with it vLLM's own engine arguments.
            weight_transfer: how weights reach vLLM: through Ray's "object_store", or
                from GPU to GPU by vLLM's "nccl" (each its own) or "ipc" (shared).
            colocate: engines and learners share GPUs: an engine gives its memory
                back while the learners step.
            log_dir: folder on the runner's machine for vLLM's logs; None takes that
                of the Ray session.
            temperature: logits are divided by it, here and in the learner.
            top_p: nucleus; 1 keeps all tokens.
            top_k: keep the k most likely tokens; 0 keeps all.
        """
        return self._set(
            engine_name=engine,
            engine_kwargs=engine_kwargs
            if engine_kwargs is NotProvided
            else dict(engine_kwargs),
            weight_transfer=weight_transfer,
            colocate=colocate,
            engine_log_dir=log_dir,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
        )

    @override(AlgorithmConfig)
    def learners(self, *, learner_strategy: str = NOT_PROVIDED, **kwargs: Any) -> Self:
        """Set how many learners there are, and what each of them holds.

        Args:
            learner_strategy: "ddp": every learner holds the whole model, and gradients
                are summed once after the last micro-batch of a step, as DDP's
                `no_sync` does. "fsdp2": every learner holds a part of the weights,
                gradients and optimizer states (PyTorch's FSDP2). Both train the same
                model, as does one learner; with fewer than two they do not differ.
            **kwargs: see `AlgorithmConfig.learners`.
        """
        super().learners(**kwargs)
        return self._set(learner_strategy=learner_strategy)

    @override(AlgorithmConfig)
    def debugging(self, *, deterministic: bool = NOT_PROVIDED, **kwargs: Any) -> Self:
        """Set the seed and how far it reaches.

        Args:
            deterministic: same seed, same run to the last bit (one EnvRunner, CPU):
                the engine takes no step while a tool call is under way, so batches
                do not depend on how long tools take.
            **kwargs: see `AlgorithmConfig.debugging`.
        """
        super().debugging(**kwargs)
        return self._set(deterministic=deterministic)

    @override(AlgorithmConfig)
    def training(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        *,
        train_batch_size_per_learner: int = NOT_PROVIDED,
        clip_param: float = NOT_PROVIDED,
        clip_param_high: float | None = NOT_PROVIDED,
        dual_clip: float | None = NOT_PROVIDED,
        kl_coeff: float = NOT_PROVIDED,
        entropy_coeff: float = NOT_PROVIDED,
        tis_cap: float | None = NOT_PROVIDED,
        old_logprobs: str = NOT_PROVIDED,
        loss_aggregation: str = NOT_PROVIDED,
        advantage_attribution: str = NOT_PROVIDED,
        advantage_normalization: str = NOT_PROVIDED,
        normalize_by_std: bool = NOT_PROVIDED,
        optimizer: str = NOT_PROVIDED,
        muon_lr: float = NOT_PROVIDED,
        weight_decay: float = NOT_PROVIDED,
        adam_betas: tuple[float, float] = NOT_PROVIDED,
        lr_schedule: str = NOT_PROVIDED,
        lr_warmup_steps: int = NOT_PROVIDED,
        lr_total_steps: int | None = NOT_PROVIDED,
        packing: str = NOT_PROVIDED,
        max_tokens_per_row: int | None = NOT_PROVIDED,
        max_tokens_per_microbatch: int = NOT_PROVIDED,
        max_skipped_steps: int = NOT_PROVIDED,
        dynamic_sampling: bool = NOT_PROVIDED,
        max_dynamic_sampling_rounds: int = NOT_PROVIDED,
        asynchronous: bool = NOT_PROVIDED,
        max_policy_lag: int = NOT_PROVIDED,
        max_concurrent_trees: int | None = NOT_PROVIDED,
        **kwargs: Any,
    ) -> Self:
        """Set the loss and the optimizer.

        Args:
            train_batch_size_per_learner: trees per learner and iteration.
            clip_param: ε below, and above unless `clip_param_high` is given.
            clip_param_high: ε above (DAPO's clip-higher).
            dual_clip: bound on the ratio for negative advantages; None = off.
            kl_coeff: weight of the k3 KL to the frozen initial model; 0 loads none.
            entropy_coeff: weight of the entropy bonus.
            tis_cap: upper bound of truncated importance weights between sampler and
                learner; None = off.
            old_logprobs: "rollout" takes the sampler's log-probabilities as the
                denominator of the ratio, "recompute" a forward pass of the learner.
            loss_aggregation: "token_mean" or "sequence_mean".
            advantage_attribution: "soft" (each leaf's advantage flows to all its
                tokens) or "hard" (a shared segment gets the mean over its leaves).
            advantage_normalization: "group" (GRPO) or "batch" (REINFORCE++).
            normalize_by_std: divide by the standard deviation of the rewards.
            optimizer: "adamw" or "muon" (matrices of the layers; rest AdamW).
            muon_lr: learning rate of Muon's part.
            weight_decay: decoupled weight decay.
            adam_betas: β₁, β₂ of AdamW.
            lr_schedule: "constant", "linear" or "cosine", by optimizer step.
            lr_warmup_steps: optimizer steps from 0 to `lr`.
            lr_total_steps: where "linear" and "cosine" reach 0.
            packing: "tree" computes a token that trajectories share once; "paths"
                makes every trajectory a row of its own. Both give the same step.
            max_tokens_per_row: longer rows of a tree are cut where it branches; None
                takes `max_tokens_per_microbatch`.
            max_tokens_per_microbatch: padded tokens per forward and backward pass.
            max_skipped_steps: optimizer steps in a row that may be skipped because
                their gradient is not finite; one more stops the run.
            dynamic_sampling: replace trees whose leaves all have the same reward
                (DAPO), in at most `max_dynamic_sampling_rounds` extra rounds.
            max_dynamic_sampling_rounds: see `dynamic_sampling`.
            asynchronous: EnvRunners go on sampling while learners update; new
                weights reach trees that are growing.
            max_policy_lag: with `asynchronous`, how many updates the oldest token of
                a tree may lie behind the learner when it is trained on; an older
                tree is grown again. 0 is the synchronous algorithm. More than 0
                needs `tis_cap` and `old_logprobs="recompute"`.
            max_concurrent_trees: with `asynchronous`, trees that an EnvRunner grows
                at a time; None takes its share of a batch.
            **kwargs: see `AlgorithmConfig.training`; `minibatch_size` counts trees
                per learner and optimizer step.
        """
        super().training(
            train_batch_size_per_learner=train_batch_size_per_learner, **kwargs
        )
        return self._set(
            clip_param=clip_param,
            clip_param_high=clip_param_high,
            dual_clip=dual_clip,
            kl_coeff=kl_coeff,
            entropy_coeff=entropy_coeff,
            tis_cap=tis_cap,
            old_logprobs=old_logprobs,
            loss_aggregation=loss_aggregation,
            advantage_attribution=advantage_attribution,
            advantage_normalization=advantage_normalization,
            normalize_by_std=normalize_by_std,
            optimizer=optimizer,
            muon_lr=muon_lr,
            weight_decay=weight_decay,
            adam_betas=adam_betas,
            lr_schedule=lr_schedule,
            lr_warmup_steps=lr_warmup_steps,
            lr_total_steps=lr_total_steps,
            packing=packing,
            max_tokens_per_row=max_tokens_per_row,
            max_tokens_per_microbatch=max_tokens_per_microbatch,
            max_skipped_steps=max_skipped_steps,
            dynamic_sampling=dynamic_sampling,
            max_dynamic_sampling_rounds=max_dynamic_sampling_rounds,
            asynchronous=asynchronous,
            max_policy_lag=max_policy_lag,
            max_concurrent_trees=max_concurrent_trees,
        )

    @override(AlgorithmConfig)
    def build_algo(self, *args: Any, **kwargs: Any) -> "ARPO":
        return cast("ARPO", super().build_algo(*args, **kwargs))

    @override(AlgorithmConfig)
    def validate(self) -> None:
        """Refuse settings that contradict each other, naming both and the cure."""
        # RLlib's local EnvRunner would put a model into the driver, and hand its own
        # stale weights to runners that come back.
        self.create_local_env_runner = self.num_env_runners == 0
        super().validate()
        for fault in faults(self):
            self._refuse(fault)

    def _refuse(self, message: str) -> None:
        # RLlib's own `_value_error` adds how to switch validation off.
        try:
            self._value_error(message)
        except ValueError as error:
            raise ConfigError(str(error)) from None

    @override(AlgorithmConfig)
    def get_evaluation_config_object(self) -> AlgorithmConfig | None:
        """As RLlib's, with one independent rollout per task unless overridden."""
        config = super().get_evaluation_config_object()
        if config is not None:
            overrides = self.evaluation_config or {}
            defaults = {
                "group_size": 1,
                "num_initial_rollouts": 1,
                "branch_rule": "never",
                # RLlib itself brings weights to EnvRunners for evaluation.
                "weight_transfer": "object_store",
            }
            for name, value in defaults.items():
                if name not in overrides:
                    setattr(config, name, value)
        return config

    @override(AlgorithmConfig)
    def get_default_learner_class(self) -> type:
        from rllib_arpo.learner.torch_learner import ARPOTorchLearner

        return ARPOTorchLearner

    @override(AlgorithmConfig)
    def get_default_rl_module_spec(self) -> RLModuleSpec:
        from rllib_arpo.rl_module import CausalLMRLModule

        return RLModuleSpec(module_class=CausalLMRLModule)

    @override(AlgorithmConfig)
    def build_learner_group(
        self,
        *,
        env: Any = None,
        spaces: Any = None,
        rl_module_spec: Any = None,
        placement_group: Any = None,
    ) -> "ARPOLearnerGroup":
        from rllib_arpo.learner_group import ARPOLearnerGroup

        return ARPOLearnerGroup(
            config=self.copy(),
            module_spec=rl_module_spec
            or self.get_multi_rl_module_spec(env=env, spaces=spaces),
            placement_group=placement_group,
        )

    @property
    @override(AlgorithmConfig)
    def _model_config_auto_includes(self) -> dict[str, Any]:
        return {"reference": self.kl_coeff > 0}

    @override(AlgorithmConfig)
    def build_learner_connector(
        self,
        input_observation_space: Any,
        input_action_space: Any,
        device: Any = None,
    ) -> Any:
        from rllib_arpo.learner.connectors import build_learner_pipeline

        return build_learner_pipeline(self, input_observation_space, input_action_space)

    @override(AlgorithmConfig)
    def build_env_to_module_connector(
        self, env: Any = None, spaces: Any = None, device: Any = None
    ) -> Any:
        """Empty: an engine takes the environment's token ids as they are."""
        from ray.rllib.connectors.env_to_module import EnvToModulePipeline

        return EnvToModulePipeline(connectors=[])

    @override(AlgorithmConfig)
    def build_module_to_env_connector(self, env: Any = None, spaces: Any = None) -> Any:
        """Empty: the environment takes the engine's token ids as they are."""
        from ray.rllib.connectors.module_to_env import ModuleToEnvPipeline

        return ModuleToEnvPipeline(connectors=[])

    @override(AlgorithmConfig)
    def get_state(self) -> dict[str, Any]:
        """As RLlib's, which drops every setting that equals -1, with those kept."""
        dropped = {
            name: value
            for name, value in vars(self).items()
            if value == DEPRECATED_VALUE and name not in ("algo_class", "_is_frozen")
        }
        return dropped | super().get_state()

    def tree_settings(self) -> TreeSettings:
        """The settings of `grow_tree`, with the branching rule resolved.

        Raises:
            ConfigError: a number is out of range or the rule does not exist.
        """
        rule = self.branch_rule
        if isinstance(rule, str):
            if ":" in rule:
                rule = import_object(rule, setting="branch_rule")
            elif rule in BRANCH_RULES:
                rule = BRANCH_RULES[rule]
            else:
                raise ConfigError(
                    f'`branch_rule` ("{rule}") must be one of '
                    + ", ".join(BRANCH_RULES)
                    + ', or an import path "package.module:function".'
                )
        return TreeSettings(
            group_size=self.group_size,
            num_initial_rollouts=self.num_initial_rollouts,
            branch_factor=self.branch_factor,
            branch_rule=rule,
            branch_base=self.branch_base,
            branch_entropy_weight=self.branch_entropy_weight,
            branch_threshold=self.branch_threshold,
            entropy_probe_tokens=self.entropy_probe_tokens,
        )

    def sampling_params(self) -> SamplingParams:
        """How the engine samples.

        Raises:
            ConfigError: a number is out of range.
        """
        if self.temperature < 0:
            raise ConfigError(f"`temperature` ({self.temperature}) must be >= 0.")
        if not 0.0 < self.top_p <= 1.0:
            raise ConfigError(f"`top_p` ({self.top_p}) must lie in (0, 1].")
        if self.top_k < 0:
            raise ConfigError(
                f"`top_k` ({self.top_k}) must be >= 0; 0 keeps all tokens."
            )
        return SamplingParams(
            temperature=self.temperature, top_p=self.top_p, top_k=self.top_k
        )

    async def make_engine(self, worker_index: int = 0) -> Engine:
        """Start the engine named by `.engine(...)` for this process.

        Args:
            worker_index: of the EnvRunner; it names the log file.

        Raises:
            ConfigError: the model folder or an engine setting is wrong.
            EngineError: the engine does not start.
        """
        model = str(self.model_config["model"])
        dtype: Any = self.model_config.get("dtype") or "float32"
        given = self.model_config.get("lora")
        lora = None if given is None else lora_settings(given)
        if self.engine_name == "torch":
            from rllib_arpo.engines.torch_engine import TorchEngine

            return TorchEngine.from_pretrained(
                model,
                dtype=dtype,
                lora=lora,
                deterministic=self.deterministic,
                **self.engine_kwargs,
            )
        from rllib_arpo.engines.vllm_engine import VLLMEngine

        folder = Path(self.engine_log_dir or session_log_folder())
        gpus = int(self.num_gpus_per_env_runner or 0) if self.num_env_runners else 0
        settings = {"tensor_parallel_size": max(gpus, 1), **self.engine_kwargs}
        return await VLLMEngine.start(
            model,
            dtype=dtype,
            lora=lora,
            weight_transfer=self.weight_transfer,
            colocate=self.colocate,
            log_file=folder / f"vllm_{worker_index}.log",
            **settings,
        )

    def _set(self, **values: Any) -> Self:
        for name, value in values.items():
            if value is not NotProvided:
                setattr(self, name, value)
        return self


def session_log_folder() -> str:
    """Where Ray and its tools look for logs; without Ray a new folder."""
    if ray.is_initialized():
        session: Any = ray._private.worker  # pyright: ignore
        return session._global_node.get_logs_dir_path()
    return tempfile.mkdtemp(prefix="rllib_arpo_")
