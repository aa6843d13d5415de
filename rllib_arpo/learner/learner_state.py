"""What a learner holds: the model, its optimizers and the place in the schedule.

They are built here, saved, restored and given to the engines. The state is the same
for one learner, for many, and for FSDP2: whole numpy arrays, weights under Hugging
Face names, optimizers as their own state dicts. So what was saved under one strategy
is restored under another. With FSDP2 all learners are asked for it at once, and only
the first has it (see `fsdp`).
"""

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from ray.actor import ActorHandle
from ray.rllib.core import COMPONENT_RL_MODULE, DEFAULT_MODULE_ID
from ray.rllib.core.learner.torch.torch_learner import TorchLearner
from ray.rllib.utils.annotations import override
from ray.rllib.utils.metrics import WEIGHTS_SEQ_NO

from rllib_arpo.engines.weights import WEIGHT_PROBE, WEIGHTS_RESTORE
from rllib_arpo.errors import ConfigError
from rllib_arpo.learner import packing
from rllib_arpo.learner.fsdp import is_first, shard
from rllib_arpo.learner.optimizers import (
    NamedOptimizer,
    build_optimizers,
    load_optimizer_state,
    optimizer_state,
)
from rllib_arpo.learner.settings import LearnerSettings
from rllib_arpo.learner.tree_attention import attention_cost, use_tree_attention
from rllib_arpo.rl_module import CausalLMRLModule

if TYPE_CHECKING:
    from rllib_arpo.engines.vllm_transfer import WeightSender

SCHEDULE = "schedule"


class LearnerState(TorchLearner):
    """The part of `ARPOTorchLearner` that outlives an update."""

    @override(TorchLearner)
    def build(self) -> None:
        self.num_optimizer_steps = 0
        self.num_skipped_steps = 0
        self.named_optimizers: list[NamedOptimizer] = []
        self._skipped_in_a_row = 0
        self._weight_sender: WeightSender | None = None
        self._receivers: list[str] = []
        self._held_state: dict[str, Any] | None = None
        super().build()
        if self.distributed and not self.is_sharded:
            for parameter in self.language_model.parameters():
                dist.broadcast(parameter.data, src=0)

    @property
    def language_model(self) -> CausalLMRLModule:
        """The module being trained."""
        return cast(CausalLMRLModule, self.module[DEFAULT_MODULE_ID])

    @override(TorchLearner)
    def _map_module_to_device(self, module: Any) -> None:
        """Make the model ready for its rows, and spread it over learners with FSDP2.

        That is before optimizers are made, which then see this learner's part, and
        before the whole model would have to fit one device.
        """
        language_model = cast(CausalLMRLModule, module[DEFAULT_MODULE_ID])
        if not self.is_sharded:
            super()._map_module_to_device(module)
        self.row_cost = self._prepare_attention(language_model)
        if self.is_sharded:
            for scorer in language_model.scorers:
                shard(scorer, torch.device(self._device))
            super()._map_module_to_device(module)

    def _prepare_attention(self, language_model: CausalLMRLModule) -> packing.RowCost:
        """Choose the model's attention for the rows that it will get; price them."""
        settings = self.settings
        if settings.packing == "tree":
            for scorer in language_model.scorers:
                use_tree_attention(scorer.model, torch.device(self._device))
        return packing.RowCost(
            attention=attention_cost(language_model.model),
            max_tokens=settings.max_tokens_per_row
            or settings.max_tokens_per_microbatch,
        )

    @property
    def is_sharded(self) -> bool:
        """Whether each learner holds a part of the weights; needs several learners."""
        return self.distributed and self.settings.learner_strategy == "fsdp2"

    @property
    def settings(self) -> LearnerSettings:
        """The config, as far as a learner reads it."""
        return cast(LearnerSettings, self.config)

    @override(TorchLearner)
    def _make_modules_ddp_if_necessary(self) -> None:
        """Nothing to wrap: `sum_gradients` or FSDP2 adds up the gradients."""

    @override(TorchLearner)
    def configure_optimizers_for_module(
        self, module_id: str, config: Any = None
    ) -> None:
        settings = self.settings
        self.named_optimizers = build_optimizers(
            self.language_model.model,
            optimizer=settings.optimizer,
            lr=settings.lr,
            muon_lr=settings.muon_lr,
            weight_decay=settings.weight_decay,
            adam_betas=settings.adam_betas,
        )
        for named in self.named_optimizers:
            self.register_optimizer(
                module_id=module_id,
                optimizer_name=named.name,
                optimizer=named.optimizer,
                params=named.parameters,
            )

    def engine_state(self, *, weights: bool = True) -> dict[str, Any] | None:
        """What an EnvRunner needs to run this policy: weights, version, a probe.

        Args:
            weights: False leaves them out.

        Returns:
            None on all learners but the first; all of them must be asked.
        """
        if not (is_first() or self.language_model.is_spread):
            return None
        state: dict[str, Any] = {
            WEIGHTS_SEQ_NO: self._weights_seq_no,
            WEIGHT_PROBE: self.language_model.weight_probe(),
        }
        if weights:
            state |= self.get_state(components=COMPONENT_RL_MODULE, inference_only=True)
        return state if is_first() else None

    def free_memory(self) -> None:
        """Give GPU memory back that only an update needs."""
        for named in self.named_optimizers:
            named.optimizer.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()

    def send_weights(
        self,
        env_runners: Sequence[tuple[ActorHandle, str]],
        *,
        backend: str,
        workers_each: int,
    ) -> None:
        """Send the weights from GPU to GPU; all learners do so at the same time.

        Args:
            env_runners: their actors and identities; with others than before all
                meet anew.
            backend: "nccl" or "ipc".
            workers_each: GPUs of each EnvRunner.
        """
        names = [name for _, name in env_runners]
        if self._weight_sender is None or names != self._receivers:
            from rllib_arpo.engines.vllm_transfer import WeightSender

            self._receivers = names
            self._weight_sender = WeightSender(
                self.language_model.model,
                backend=backend,
                env_runners=[actor for actor, _ in env_runners],
                workers_each=workers_each,
                rank=dist.get_rank() if dist.is_initialized() else 0,
            )
        self._weight_sender.send(self._weights_seq_no)

    def get_state_of_all(self, *args: Any, **kwargs: Any) -> dict[str, Any] | None:
        """`get_state`, asked of all learners at once: None on all but the first."""
        state = self.get_state(*args, **kwargs)
        return state if is_first() else None

    def hold_state(self) -> None:
        """Put the state together, asked of all at once, for the first to save it."""
        self._held_state = self.get_state_of_all()

    def release_state(self) -> None:
        """Forget what was held."""
        self._held_state = None

    @override(TorchLearner)
    def get_state(
        self,
        components: str | Collection[str] | None = None,
        *,
        not_components: str | Collection[str] | None = None,
        inference_only: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        if self._held_state is not None:
            return self._held_state
        state = super().get_state(
            components,
            not_components=not_components,
            inference_only=inference_only,
            **kwargs,
        )
        if inference_only and COMPONENT_RL_MODULE in state:
            # Here, since RLlib's own sync drops all other keys of the state.
            name = self.language_model.restore_name
            state[COMPONENT_RL_MODULE][WEIGHTS_RESTORE] = name
        if self._check_component(SCHEDULE, components, not_components):
            state[SCHEDULE] = {
                "num_optimizer_steps": self.num_optimizer_steps,
                "num_skipped_steps": self.num_skipped_steps,
            }
        return state

    @override(TorchLearner)
    def set_state(self, state: dict[str, Any]) -> None:
        # The stock method ignores weights that are older than the ones in place; a
        # checkpoint is restored whatever its age.
        current, self._weights_seq_no = self._weights_seq_no, -1
        try:
            super().set_state(state)
        finally:
            if self._weights_seq_no == -1:
                self._weights_seq_no = state.get(WEIGHTS_SEQ_NO, current)
        if SCHEDULE in state:
            self.num_optimizer_steps = int(state[SCHEDULE]["num_optimizer_steps"])
            self.num_skipped_steps = int(state[SCHEDULE]["num_skipped_steps"])

    @override(TorchLearner)
    def _get_optimizer_state(self) -> dict[str, Any]:
        return {
            name: {
                "module_id": self._optimizer_name_to_module[name],
                "state": optimizer_state(optimizer),
            }
            for name, optimizer in self._named_optimizers.items()
        }

    @override(TorchLearner)
    def _set_optimizer_state(self, state: dict[str, Any]) -> None:
        if state.keys() != self._named_optimizers.keys():
            raise ConfigError(
                f"the checkpoint holds optimizers {sorted(state)}, this run has "
                f"{sorted(self._named_optimizers)}: keep the `optimizer` setting of "
                "the run that saved it"
            )
        for name, saved in state.items():
            load_optimizer_state(self._named_optimizers[name], saved["state"])
