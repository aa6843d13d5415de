"""The learner: RLlib's host, our loop.

One `update()` takes `num_epochs` times ⌈trees / minibatch_size⌉ optimizer steps:

    trees ─ connectors ─► rows ─ per epoch: shuffle trees, split into minibatches
    minibatch ─ rows of similar length ─► micro-batches ─► Σ gradients ─► one step

Where this differs from RLlib's own loop, and why:
1. A minibatch is a number of trees. RLlib's slices rows and repeats rows to fill the
   last slice.
2. The loss is divided by the token (or row) count of the whole step over all learners,
   so micro-batches and learners add up to the exact full-batch gradient. Gradients are
   summed by hand after the last micro-batch; learners may differ in their number.
3. One check of the total gradient norm decides for all learners whether to step.
4. The learning rate follows the number of optimizer steps, and is checkpointed.
"""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
import torch.distributed as dist
from ray.actor import ActorHandle
from ray.rllib.core import COMPONENT_RL_MODULE, DEFAULT_MODULE_ID
from ray.rllib.core.learner.learner import Learner
from ray.rllib.core.learner.torch.torch_learner import TorchLearner
from ray.rllib.core.learner.training_data import TrainingData
from ray.rllib.utils.annotations import override
from ray.rllib.utils.metrics import ALL_MODULES, NUM_ENV_STEPS_TRAINED, WEIGHTS_SEQ_NO
from torch import Tensor

from rllib_arpo.arrays import to_numpy
from rllib_arpo.engines.weights import WEIGHT_PROBE
from rllib_arpo.errors import ConfigError, DivergenceError
from rllib_arpo.learner import losses, microbatches, packing
from rllib_arpo.learner.connectors import REWARD_MEAN, REWARD_STD, ROW_COST
from rllib_arpo.learner.optimizers import (
    NamedOptimizer,
    build_optimizers,
    load_optimizer_state,
    optimizer_state,
    set_learning_rate,
)
from rllib_arpo.learner.reduction import (
    MicrobatchSums,
    StepTotals,
    TokenLosses,
    gather,
    sum_gradients,
    summarize,
)
from rllib_arpo.learner.scoring import EntropyMode
from rllib_arpo.learner.settings import LearnerSettings
from rllib_arpo.learner.training_data import TreeTrainingData, as_tree_data
from rllib_arpo.learner.tree_attention import (
    BLOCK,
    attention_cost,
    use_tree_attention,
    uses_flex_attention,
)
from rllib_arpo.rl_module import CausalLMRLModule
from rllib_arpo.tree import RolloutTree

if TYPE_CHECKING:
    from rllib_arpo.engines.vllm_transfer import WeightSender

SCHEDULE = "schedule"
DIFFERENCE = "sampler_logprob_difference"


class ARPOTorchLearner(TorchLearner):
    """Trains a `CausalLMRLModule` on rollout trees.

    To change the objective, override `compute_token_losses`.
    """

    @override(TorchLearner)
    def build(self) -> None:
        self.num_optimizer_steps = 0
        self.num_skipped_steps = 0
        self._skipped_in_a_row = 0
        self.named_optimizers: list[NamedOptimizer] = []
        self._weight_sender: WeightSender | None = None
        self._receivers: list[str] = []
        super().build()
        self.row_cost = self._prepare_attention()
        if self.distributed:
            for parameter in self.language_model.parameters():
                dist.broadcast(parameter.data, src=0)

    def _prepare_attention(self) -> packing.RowCost:
        """Make the model ready for the rows that it will get, and price them."""
        settings, model = self.settings, self.language_model.model
        if settings.packing == "tree":
            for scorer in self.language_model.scorers:
                use_tree_attention(scorer.model, torch.device(self._device))
        return packing.RowCost(
            attention=attention_cost(model),
            max_tokens=settings.max_tokens_per_row
            or settings.max_tokens_per_microbatch,
        )

    @property
    def settings(self) -> LearnerSettings:
        """The config, as far as a learner reads it."""
        return cast(LearnerSettings, self.config)

    @property
    def language_model(self) -> CausalLMRLModule:
        """The module being trained."""
        return cast(CausalLMRLModule, self.module[DEFAULT_MODULE_ID])

    @property
    def temperature(self) -> float:
        """Temperature of the distribution that the tokens were sampled from."""
        return self.settings.temperature

    @property
    def entropy_mode(self) -> EntropyMode:
        """Whether the loss needs entropies, and with gradient."""
        return "gradient" if self.settings.entropy_coeff else "value"

    @override(TorchLearner)
    def _make_modules_ddp_if_necessary(self) -> None:
        """Nothing to wrap: `sum_gradients` adds up the learners' gradients."""

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

    @override(Learner)
    def update(
        self,
        batch: Any = None,
        batches: Any = None,
        batch_refs: Any = None,
        episodes: Any = None,
        episodes_refs: Any = None,
        data_iterators: Any = None,
        training_data: TrainingData | None = None,
        *,
        timesteps: dict[str, Any] | None = None,
        num_total_minibatches: int = 0,
        num_epochs: int | None = None,
        minibatch_size: int | None = None,
        shuffle_batch_per_epoch: bool = True,
        _no_metrics_reduce: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Train on whole trees, given as `TreeTrainingData`, `episodes` or their refs.

        `num_epochs` and `minibatch_size` (trees per step and learner; None takes all
        trees in one step) default to the config's. The number of steps is agreed on
        between learners; RLlib's other forms of data and arguments are not read.
        """
        self._check_is_built()
        self.before_gradient_based_update(timesteps=timesteps or {})
        data = as_tree_data(training_data, episodes, episodes_refs)
        self._weights_seq_no += 1
        columns = self.prepare_columns(self._run_connectors(data))
        steps = [
            self._train_step(columns, rows)
            for rows in self._minibatches(
                columns,
                num_trees=len(data.trees),
                num_epochs=num_epochs or self.settings.num_epochs,
                minibatch_size=minibatch_size or self.settings.minibatch_size,
                shuffle=shuffle_batch_per_epoch,
            )
        ]
        self._log_update([s for s in steps if s is not None], data.trees)
        self.after_gradient_based_update(timesteps=timesteps or {})
        return None if _no_metrics_reduce else self.metrics.reduce()

    def _run_connectors(self, data: TreeTrainingData) -> packing.FlatColumns:
        pipeline = self._learner_connector
        if pipeline is None or not data.trees:
            return packing.pack_paths([])
        batch = pipeline(
            rl_module=self.module,
            batch={},
            episodes=cast(list, data.trees),
            shared_data={
                REWARD_MEAN: data.reward_mean,
                REWARD_STD: data.reward_std,
                ROW_COST: self.row_cost,
            },
            metrics=self.metrics,
        )
        return batch[DEFAULT_MODULE_ID]

    def prepare_columns(self, columns: packing.FlatColumns) -> packing.FlatColumns:
        """Add `old_logprobs`: the sampler's, or recomputed before the first step."""
        old = columns[packing.ROLLOUT_LOGPROBS]
        if self.settings.old_logprobs == "recompute":
            old = self._score_rows(columns)
        return {**columns, packing.OLD_LOGPROBS: old}

    @torch.no_grad()
    def _score_rows(self, columns: packing.FlatColumns) -> np.ndarray:
        """[N] float32 log-probabilities under the weights as they are."""
        lengths = columns[packing.ROW_LENGTHS]
        scores = np.zeros(len(columns[packing.TOKEN_IDS]), np.float32)
        for rows in self._microbatches(columns, np.arange(len(lengths))):
            logprobs = self._forward(columns, rows, "none")[1]["logprobs"]
            index, valid = microbatches.row_index(lengths, rows)
            scores[index[valid]] = to_numpy(logprobs)[valid]
        return scores

    def _minibatches(
        self,
        columns: packing.FlatColumns,
        *,
        num_trees: int,
        num_epochs: int,
        minibatch_size: int | None,
        shuffle: bool,
    ) -> Iterator[np.ndarray]:
        """Row indices of each optimizer step; equally many steps on all learners."""
        wanted = math.ceil(num_trees / (minibatch_size or max(num_trees, 1)))
        num_steps = max(gather(wanted, distributed=self.distributed))
        for epoch in range(num_epochs if num_steps else 0):
            order = np.arange(num_trees)
            if shuffle:
                seed = (self.settings.seed or 0, self._weights_seq_no, epoch)
                np.random.default_rng(seed).shuffle(order)
            for part in np.array_split(order, num_steps):
                yield microbatches.rows_of_trees(columns, part)

    def _microbatches(
        self, columns: packing.FlatColumns, rows: np.ndarray
    ) -> list[np.ndarray]:
        return microbatches.split_rows(
            columns[packing.ROW_LENGTHS],
            rows,
            max_tokens=self.settings.max_tokens_per_microbatch,
        )

    def _forward(
        self, columns: packing.FlatColumns, rows: np.ndarray, entropy: EntropyMode
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        batch: dict[str, Any] = {"temperature": self.temperature, "entropy": entropy}
        model = self.language_model.model
        batch |= microbatches.collate(
            columns,
            rows,
            device=self._device,
            dtype=torch.promote_types(model.dtype, torch.float32),
            multiple_of=BLOCK if uses_flex_attention(model) else 1,
        )
        return batch, self.language_model.forward_train(batch)

    def compute_token_losses(
        self, batch: Mapping[str, Any], fwd_out: Mapping[str, Tensor]
    ) -> TokenLosses:
        """The objective, one value per token; override it to change the algorithm.

            L = w·L_policy + β·KL - c·H        (see `losses` for each term)

        Args:
            batch: a padded micro-batch, as from `microbatches.collate`.
            fwd_out: what `CausalLMRLModule._forward_train` returned.

        Returns:
            Losses and metrics, all [B, T].
        """
        settings = self.settings
        logprobs = fwd_out["logprobs"]
        rollout, old = batch[packing.ROLLOUT_LOGPROBS], batch[packing.OLD_LOGPROBS]
        policy = losses.policy_loss(
            logprobs,
            old,
            batch[packing.POSITIVE_ADVANTAGES],
            batch[packing.NEGATIVE_ADVANTAGES],
            clip_param=settings.clip_param,
            clip_param_high=settings.clip_param_high,
            dual_clip=settings.dual_clip,
        )
        loss = policy.loss
        metrics = {
            "policy_loss": policy.loss,
            "entropy": fwd_out["entropies"],
            "clip_fraction": policy.clipped.float(),
            "ratio_mean": policy.ratio,
            "kl_to_sampler": losses.kl_k3(logprobs, rollout),
            DIFFERENCE: (logprobs - rollout).abs(),
        }
        if settings.tis_cap is not None:
            weights = losses.importance_weights(old, rollout, cap=settings.tis_cap)
            loss = weights * loss
            metrics["tis_fraction_capped"] = (weights >= settings.tis_cap).float()
        if settings.kl_coeff:
            kl = losses.kl_k3(logprobs, fwd_out["ref_logprobs"])
            loss = loss + settings.kl_coeff * kl
            metrics["kl"] = kl
        if settings.entropy_coeff:
            loss = loss - settings.entropy_coeff * fwd_out["entropies"]
        return TokenLosses(loss, metrics, {"ratio_max": policy.ratio})

    @override(Learner)
    def compute_loss_for_module(
        self, *, module_id: str, config: Any, batch: Any, fwd_out: Any
    ) -> Tensor:
        """RLlib's hook: the loss of a padded batch taken as one whole step."""
        total = float(batch[packing.LOSS_WEIGHTS].sum())
        return self._weigh(batch, self.compute_token_losses(batch, fwd_out), total)

    def _weigh(
        self, batch: Mapping[str, Any], token_losses: TokenLosses, total: float
    ) -> Tensor:
        """Weighted sum of a micro-batch; `total` is Σ W of the whole step."""
        weights = batch[packing.LOSS_WEIGHTS]
        losses = token_losses.loss.where(batch[packing.LOSS_MASK], 0.0)
        return (weights / total * losses).sum()

    def _train_step(
        self, columns: packing.FlatColumns, rows: np.ndarray
    ) -> StepTotals | None:
        """One optimizer step; None when no learner has a loss token."""
        tokens = microbatches.loss_tokens(columns)[rows]
        own = (int(tokens.sum()), microbatches.loss_weight(columns, rows))
        total = sum(weight for _, weight in gather(own, distributed=self.distributed))
        if total == 0:
            return None
        for named in self.named_optimizers:
            named.optimizer.zero_grad(set_to_none=True)
        sums = MicrobatchSums()
        for chosen in self._microbatches(columns, rows[tokens > 0]):
            batch, fwd_out = self._forward(columns, chosen, self.entropy_mode)
            token_losses = self.compute_token_losses(batch, fwd_out)
            loss = self._weigh(batch, token_losses, total)
            loss.backward()
            sums.add(loss, token_losses, batch[packing.LOSS_WEIGHTS])
        return self._apply_step(sums, own)

    def _apply_step(self, sums: MicrobatchSums, own: tuple[int, float]) -> StepTotals:
        """Clip and step, unless the gradient of any learner is not finite."""
        parameters = [p for named in self.named_optimizers for p in named.parameters]
        if self.distributed:
            sum_gradients(parameters)
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        totals = StepTotals()
        for part in gather(sums.totals(*own, norm), distributed=self.distributed):
            totals.add(part)
        if not math.isfinite(totals.grad_norm):
            self._count_skipped_step()
            return totals
        self._skipped_in_a_row = 0
        if (grad_clip := self.settings.grad_clip) is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, grad_clip, norm)
        set_learning_rate(
            self.named_optimizers,
            self.num_optimizer_steps,
            schedule=self.settings.lr_schedule,
            warmup_steps=self.settings.lr_warmup_steps,
            total_steps=self.settings.lr_total_steps,
        )
        for named in self.named_optimizers:
            named.optimizer.step()
        self.num_optimizer_steps += 1
        return totals

    def _count_skipped_step(self) -> None:
        """All learners come here together, for they saw the same norms."""
        self.num_skipped_steps += 1
        self._skipped_in_a_row += 1
        limit = self.settings.max_skipped_steps
        if self._skipped_in_a_row > limit:
            raise DivergenceError(
                f"{self._skipped_in_a_row} optimizer steps in a row had a gradient "
                f"that is not finite, more than `max_skipped_steps` ({limit}). The "
                "weights are those before the first of them. Look for a reward that "
                "is not finite; else lower `lr` or `grad_clip`, or take "
                "`dtype` 'float32', and resume from the last checkpoint."
            )

    def _log_update(self, steps: list[StepTotals], trees: list[RolloutTree]) -> None:
        values: dict[str, float] = {
            "learning_rate": self.named_optimizers[0].optimizer.param_groups[0]["lr"],
            "num_optimizer_steps": self.num_optimizer_steps,
            "num_skipped_steps": self.num_skipped_steps,
        }
        values |= summarize(steps, first_step_only=(DIFFERENCE,))
        for name, value in values.items():
            self.metrics.log_value((DEFAULT_MODULE_ID, name), value, window=1)
        turns = (ALL_MODULES, NUM_ENV_STEPS_TRAINED)
        self.metrics.log_value(turns, sum(map(len, trees)), reduce="sum")

    def engine_state(self, *, weights: bool = True) -> dict[str, Any]:
        """What an EnvRunner needs to run this policy: weights, version, a probe."""
        state: dict[str, Any] = {
            WEIGHTS_SEQ_NO: self._weights_seq_no,
            WEIGHT_PROBE: self.language_model.weight_probe(),
        }
        if weights:
            state |= self.get_state(components=COMPONENT_RL_MODULE, inference_only=True)
        return state

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

    @override(TorchLearner)
    def get_state(
        self,
        components: str | Collection[str] | None = None,
        *,
        not_components: str | Collection[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        state = super().get_state(components, not_components=not_components, **kwargs)
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
