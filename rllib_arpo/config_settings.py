"""The settings of ARPO, in RLlib's chained groups, each explained where it is set.

What is made of them (engines, learners, checks) is in `config.py`.
"""

from collections.abc import Mapping
from typing import Any, Self

from ray.rllib.algorithms.algorithm_config import AlgorithmConfig, NotProvided
from ray.rllib.utils.annotations import override

from rllib_arpo.alarms import AlarmSettings
from rllib_arpo.data.sources import TaskSource
from rllib_arpo.envs.tool_use_env import ToolUseEnv
from rllib_arpo.rollouts.branching import BranchRule

# RLlib's mark of a setting that a call leaves as it is; it has no type of its own.
NOT_PROVIDED: Any = NotProvided


class ARPOSettings(AlgorithmConfig):
    """What can be set; the defaults are those of the paper's appendix C.2."""

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

        # reporting()
        self.num_saved_trees: int | None = 4
        self.alarms: AlarmSettings | None = AlarmSettings()

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
            train_tasks: a file or folder of rows by its path or URI; a `DataFile`
                that says how to read it, or a mapping of its arguments; a `Mixture`
                of several with weights; a list of `Task`; or a picklable function
                that returns one (called in the driver).
            eval_tasks: the same, for `evaluate()`; no mixture.
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
    def reporting(
        self,
        *,
        num_saved_trees: int | None = NOT_PROVIDED,
        alarms: AlarmSettings | None = NOT_PROVIDED,
        **kwargs: Any,
    ) -> Self:
        """Set what is kept of an iteration and what is said about it.

        Args:
            num_saved_trees: trees of every iteration that `ARPO.saved_trees` holds and
                that a run's folder keeps (`trees/`); None: all, for rejection sampling
                by `rllib-arpo export-traces`.
            alarms: when `result["alarms"]` tells that a run goes wrong; None: never.
            **kwargs: see `AlgorithmConfig.reporting`.
        """
        super().reporting(**kwargs)
        return self._set(num_saved_trees=num_saved_trees, alarms=alarms)

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
                learner, for `old_logprobs="recompute"`; None = off.
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

    def _set(self, **values: Any) -> Self:
        for name, value in values.items():
            if value is not NotProvided:
                setattr(self, name, value)
        return self
