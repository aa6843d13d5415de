"""Random trees, and the smallest config that a learner can be built from."""

from typing import Any

import gymnasium as gym
import numpy as np
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.rl_module.multi_rl_module import MultiRLModuleSpec
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.utils.metrics.metrics_logger import MetricsLogger

from rllib_arpo.learner.connectors import build_learner_pipeline
from rllib_arpo.learner.sft_learner import SFTTorchLearner
from rllib_arpo.learner.torch_learner import ARPOTorchLearner
from rllib_arpo.rl_module import CausalLMRLModule
from rllib_arpo.tree import Leaf, Message, RolloutTree, Segment, Task

TASK = Task(task_id="t", messages=(Message(role="user", content="q"),), answers=("a",))


def segment(
    parent: int | None, role: str, token_ids: list[int], logprobs: Any = None
) -> Segment:
    ids = np.array(token_ids, np.int32)
    if role != "model":
        return Segment(parent=parent, role=role, token_ids=ids)
    given = [-1.0] * len(ids) if logprobs is None else logprobs
    return Segment(
        parent=parent,
        role="model",
        token_ids=ids,
        logprobs=np.array(given, np.float32),
        entropies=np.zeros(len(ids), np.float32),
        policy_versions=np.full(len(ids), 3, np.int32),
    )


def leaf(index: int, reward: float) -> Leaf:
    return Leaf(
        segment=index,
        reward=reward,
        reward_parts={"reward": reward},
        origin="initial",
        end="answer",
    )


def forked_tree(rewards: tuple[float, float] = (1.0, 0.0)) -> RolloutTree:
    """0 prompt ── 1 model ── 2 tool ─┬─ 3 model (leaf 0)
    └─ 4 model (leaf 1)"""
    return RolloutTree(
        task=TASK,
        segments=(
            segment(None, "prompt", [1, 2]),
            segment(0, "model", [3, 4, 5]),
            segment(1, "tool", [6, 7]),
            segment(2, "model", [8]),
            segment(2, "model", [9, 10]),
        ),
        leaves=(leaf(3, rewards[0]), leaf(4, rewards[1])),
    )


def random_tree(
    seed: int, *, vocab_size: int = 32, num_trunks: int = 2, length: int = 6
) -> RolloutTree:
    """`num_trunks` trunks from one prompt, each with two leaves after a tool result."""
    rng = np.random.default_rng(seed)

    def ids(low: int, high: int) -> list[int]:
        return rng.integers(0, vocab_size, rng.integers(low, high)).tolist()

    def model(parent: int) -> Segment:
        tokens = ids(2, length)
        return segment(parent, "model", tokens, -rng.uniform(2, 4, len(tokens)))

    segments = [segment(None, "prompt", ids(2, length))]
    leaves = []
    for _ in range(num_trunks):
        trunk = len(segments)
        segments += [model(0), segment(trunk, "tool", ids(1, length))]
        for _ in range(2):
            segments.append(model(trunk + 1))
            leaves.append(leaf(len(segments) - 1, float(rng.integers(0, 3))))
    return RolloutTree(task=TASK, segments=tuple(segments), leaves=tuple(leaves))


class LearnerConfig(AlgorithmConfig):
    """The settings that a learner reads, and nothing else."""

    def __init__(self, algo_class: type | None = None) -> None:
        super().__init__(algo_class)
        self.lr = 1e-2
        self.optimizer = "adamw"
        self.muon_lr = 1e-2
        self.weight_decay = 0.01
        self.adam_betas = (0.9, 0.95)
        self.lr_schedule = "constant"
        self.lr_warmup_steps = 0
        self.lr_total_steps = None
        self.grad_clip = 1.0
        self.num_epochs = 1
        self.minibatch_size = 4
        self.clip_param = 0.2
        self.clip_param_high = None
        self.dual_clip = 3.0
        self.kl_coeff = 0.0
        self.entropy_coeff = 0.0
        self.tis_cap = None
        self.old_logprobs = "rollout"
        self.loss_aggregation = "token_mean"
        self.advantage_attribution = "soft"
        self.advantage_normalization = "group"
        self.normalize_by_std = True
        self.packing = "tree"
        self.learner_strategy = "ddp"
        self.max_tokens_per_row = None
        self.max_tokens_per_microbatch = 16384
        self.max_skipped_steps = 10
        self.temperature = 1.0
        self.seed = 0

    def build_learner_connector(
        self,
        input_observation_space: gym.Space | None,
        input_action_space: gym.Space | None,
        device: Any = None,
    ) -> Any:
        return build_learner_pipeline(self, input_observation_space, input_action_space)

    def get_default_learner_class(self) -> type:
        return ARPOTorchLearner


def module_spec(model: str, **model_config: Any) -> RLModuleSpec:
    return RLModuleSpec(
        module_class=CausalLMRLModule,
        observation_space=gym.spaces.Discrete(2),
        action_space=gym.spaces.Discrete(2),
        model_config={"model": model, **model_config},
    )


def learner_config(**settings: Any) -> LearnerConfig:
    config = LearnerConfig()
    for name, value in settings.items():
        assert hasattr(config, name), name
        setattr(config, name, value)
    return config


def multi_module_spec(config: LearnerConfig, model: str, **model_config: Any):
    spec = module_spec(model, reference=bool(config.kl_coeff), **model_config)
    return MultiRLModuleSpec(rl_module_specs={DEFAULT_MODULE_ID: spec})


def build_learner(
    model: str, *, sft: bool = False, model_config: Any = None, **settings: Any
) -> ARPOTorchLearner:
    config = learner_config(**settings)
    learner = (SFTTorchLearner if sft else ARPOTorchLearner)(
        config=config,
        module_spec=multi_module_spec(config, model, **(model_config or {})),
    )
    learner.build()
    return learner


def weights(learner: ARPOTorchLearner) -> dict[str, np.ndarray]:
    return learner.language_model.get_state()


def results(reduced: Any) -> dict[str, float]:
    """The metrics of one `update` as plain numbers."""
    return MetricsLogger.peek_results(reduced)[DEFAULT_MODULE_ID]
