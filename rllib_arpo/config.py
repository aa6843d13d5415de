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
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import ray
from ray.rllib.algorithms.algorithm_config import (
    DEPRECATED_VALUE,
    AlgorithmConfig,
)
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.utils.annotations import override

from rllib_arpo.config_checks import faults
from rllib_arpo.config_settings import ARPOSettings
from rllib_arpo.engines.engine import Engine, SamplingParams
from rllib_arpo.errors import ConfigError
from rllib_arpo.imports import import_object
from rllib_arpo.lora import lora_settings
from rllib_arpo.rollouts.branching import BRANCH_RULES, TreeSettings

if TYPE_CHECKING:
    from rllib_arpo.arpo import ARPO
    from rllib_arpo.learner_group import ARPOLearnerGroup


class ARPOConfig(ARPOSettings):
    """Settings of `ARPO`; the defaults are those of the paper's appendix C.2."""

    @override(AlgorithmConfig)
    def build_algo(self, *args: Any, **kwargs: Any) -> "ARPO":
        return cast("ARPO", super().build_algo(*args, **kwargs))

    @override(AlgorithmConfig)
    def validate(self) -> None:
        """Refuse settings that contradict each other, naming both and the cure."""
        # RLlib's local EnvRunner would put a model into the driver, and hand its own
        # stale weights to runners that come back.
        self.create_local_env_runner = self.num_env_runners == 0
        if self._validate_config:
            # Before RLlib, which takes any number for granted.
            fault = next(faults(self), None)
            if fault is not None:
                raise ConfigError(fault)
        super().validate()

    @override(AlgorithmConfig)
    def _value_error(self, errmsg: str) -> None:
        """As RLlib's, without its advice to switch all checks off."""
        if self._validate_config:
            raise ConfigError(errmsg)
        super()._value_error(errmsg)

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
        """How the engine samples."""
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


def session_log_folder() -> str:
    """Where Ray and its tools look for logs; without Ray a new folder."""
    if ray.is_initialized():
        session: Any = ray._private.worker  # pyright: ignore
        return session._global_node.get_logs_dir_path()
    return tempfile.mkdtemp(prefix="rllib_arpo_")
