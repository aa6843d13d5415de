"""The settings that a learner reads from its `AlgorithmConfig`."""

from typing import Literal, Protocol

from rllib_arpo.learner.advantages import Attribution, Normalization
from rllib_arpo.learner.losses import Aggregation
from rllib_arpo.learner.optimizers import OptimizerName, Schedule
from rllib_arpo.learner.packing import Packing

LearnerStrategy = Literal["ddp", "fsdp2"]


class OptimizationSettings(Protocol):
    """What every learner reads."""

    lr: float
    optimizer: OptimizerName
    muon_lr: float
    weight_decay: float
    adam_betas: tuple[float, float]
    lr_schedule: Schedule
    lr_warmup_steps: int
    lr_total_steps: int | None
    grad_clip: float | None
    num_epochs: int
    minibatch_size: int | None
    packing: Packing
    max_tokens_per_row: int | None
    max_tokens_per_microbatch: int
    max_skipped_steps: int
    loss_aggregation: Aggregation
    learner_strategy: LearnerStrategy
    seed: int | None


class LearnerSettings(OptimizationSettings, Protocol):
    """What the policy gradient learner and its connectors read besides."""

    clip_param: float
    clip_param_high: float | None
    dual_clip: float | None
    kl_coeff: float
    entropy_coeff: float
    tis_cap: float | None
    old_logprobs: Literal["rollout", "recompute"]
    temperature: float
    advantage_attribution: Attribution
    advantage_normalization: Normalization
    normalize_by_std: bool
