"""The learner: RLlib's host, our loop.

One `update()` takes `num_epochs` times ⌈trees / minibatch_size⌉ optimizer steps:

    trees ─ connectors ─► rows ─ per epoch: shuffle trees, split into minibatches
    minibatch ─ rows of similar length ─► micro-batches ─► Σ gradients ─► one step

Where this differs from RLlib's own loop, and why:
1. A minibatch is a number of trees. RLlib's slices rows and repeats rows to fill the
   last slice.
2. The loss is divided by the token (or row) count of the whole step over all learners,
   so micro-batches and learners add up to the exact full-batch gradient. Learners may
   differ in their number of micro-batches: "ddp" sums gradients by hand after the last
   one, and with "fsdp2" a learner that has none left computes blank ones.
3. One check of the total gradient norm decides for all learners whether to step.
4. The learning rate follows the number of optimizer steps, and is checkpointed.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any, cast

import numpy as np
import torch
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.learner.learner import Learner
from ray.rllib.core.learner.training_data import TrainingData
from ray.rllib.utils.annotations import override
from ray.rllib.utils.metrics import ALL_MODULES, NUM_ENV_STEPS_TRAINED
from torch import Tensor

from rllib_arpo.arrays import to_numpy
from rllib_arpo.errors import DivergenceError
from rllib_arpo.learner import fsdp, losses, microbatches, packing
from rllib_arpo.learner.connectors import REWARD_MEAN, REWARD_STD, ROW_COST
from rllib_arpo.learner.learner_state import LearnerState
from rllib_arpo.learner.optimizers import set_learning_rate
from rllib_arpo.learner.reduction import (
    MicrobatchSums,
    StepTotals,
    TokenLosses,
    gather,
    sum_gradients,
    summarize,
)
from rllib_arpo.learner.scoring import EntropyMode
from rllib_arpo.learner.training_data import TreeTrainingData, as_tree_data
from rllib_arpo.learner.tree_attention import BLOCK, uses_flex_attention
from rllib_arpo.metrics import ENTROPY
from rllib_arpo.metrics import SAMPLER_LOGPROB_DIFFERENCE as DIFFERENCE
from rllib_arpo.tree import RolloutTree


class ARPOTorchLearner(LearnerState):
    """Trains a `CausalLMRLModule` on rollout trees.

    To change the objective, override `compute_token_losses`.
    """

    @property
    def temperature(self) -> float:
        """Temperature of the distribution that the tokens were sampled from."""
        return self.settings.temperature

    @property
    def entropy_mode(self) -> EntropyMode:
        """Whether the loss needs entropies, and with gradient."""
        return "gradient" if self.settings.entropy_coeff else "value"

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
        self._log_update(
            [s for s in steps if s is not None],
            data.trees,
            num_epochs=num_epochs or self.settings.num_epochs,
        )
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
        scored = np.flatnonzero(microbatches.loss_tokens(columns))
        for rows in self._microbatches(columns, scored):
            if rows is None:
                self._forward_blank("none")
                continue
            logprobs = self._forward(columns, rows, "none")[1]["logprobs"]
            index, valid = microbatches.row_index(lengths, rows)
            # Rows may be padded further for the attention kernel.
            scores[index[valid]] = to_numpy(logprobs)[:, : valid.shape[1]][valid]
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
    ) -> list[np.ndarray | None]:
        """Rows of each micro-batch; None for a blank one, to keep step with others."""
        groups: list[np.ndarray | None] = [
            *microbatches.split_rows(
                columns[packing.ROW_LENGTHS],
                rows,
                max_tokens=self.settings.max_tokens_per_microbatch,
            )
        ]
        if self.is_sharded:
            most = max(gather(len(groups), distributed=True))
            groups += [None] * (most - len(groups))
        return groups

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
            multiple_of=self._multiple_of,
        )
        return batch, self.language_model.forward_train(batch)

    def _forward_blank(self, entropy: EntropyMode) -> Tensor:
        """Take part in the other learners' forward pass; 0, with a gradient of 0."""
        batch = fsdp.blank_batch(
            device=self._device,
            length=self._multiple_of,
            packed=self.settings.packing == "tree",
        )
        batch["entropy"] = entropy
        return self.language_model.forward_train(batch)["logprobs"].sum()

    @property
    def _multiple_of(self) -> int:
        return BLOCK if uses_flex_attention(self.language_model.model) else 1

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
            ENTROPY: fwd_out["entropies"],
            "clip_fraction": policy.clipped.float(),
            "ratio_mean": policy.ratio,
            # KL(sampler ‖ policy): the tokens were drawn by the sampler.
            "kl_to_sampler": losses.kl_k3(rollout, logprobs),
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
            if chosen is None:
                self._forward_blank(self.entropy_mode).backward()
                continue
            batch, fwd_out = self._forward(columns, chosen, self.entropy_mode)
            token_losses = self.compute_token_losses(batch, fwd_out)
            loss = self._weigh(batch, token_losses, total)
            loss.backward()
            sums.add(loss, token_losses, batch[packing.LOSS_WEIGHTS])
            sums.num_row_tokens += int(columns[packing.ROW_LENGTHS][chosen].sum())
        return self._apply_step(sums, own)

    def _apply_step(self, sums: MicrobatchSums, own: tuple[int, float]) -> StepTotals:
        """Clip and step, unless the gradient of any learner is not finite."""
        parameters = [p for named in self.named_optimizers for p in named.parameters]
        if self.distributed and not self.is_sharded:
            sum_gradients(parameters)
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = fsdp.whole(torch.nn.utils.get_total_norm(gradients))
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

    def _log_update(
        self, steps: list[StepTotals], trees: list[RolloutTree], *, num_epochs: int
    ) -> None:
        """Log figures over all learners, the same on each: RLlib averages over them.

        `tokens_processed` are the tokens of all rows that one epoch computes, padding
        excluded, `tokens_unique` those of the trees; a ratio of 1 means that every
        token was computed once.
        """
        unique = sum(tree.num_tokens for tree in trees)
        unique = sum(gather(unique, distributed=self.distributed))
        processed = sum(step.num_row_tokens for step in steps) // num_epochs
        values: dict[str, float] = {
            "learning_rate": self.named_optimizers[0].optimizer.param_groups[0]["lr"],
            "num_optimizer_steps": self.num_optimizer_steps,
            "num_skipped_steps": self.num_skipped_steps,
            "tokens_processed": processed,
            "tokens_unique": unique,
        }
        if unique:
            values["tokens_processed_per_unique"] = processed / unique
        values |= summarize(steps, first_step_only=(DIFFERENCE,))
        for name, value in values.items():
            self.metrics.log_value((DEFAULT_MODULE_ID, name), value, window=1)
        turns = (ALL_MODULES, NUM_ENV_STEPS_TRAINED)
        self.metrics.log_value(turns, sum(map(len, trees)), reduce="sum")
