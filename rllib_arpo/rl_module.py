"""A Hugging Face causal language model as an RLModule.

The learner's copy keeps float32 weights whatever the `dtype`: with "bfloat16" the
forward pass runs under autocast. A bfloat16 weight near 0.02 cannot take a step of
1e-6, it would round the step away. What leaves for the engines
(`get_state(inference_only=True)`) has the chosen dtype.

State is a flat dict of numpy arrays under Hugging Face parameter names, tied weights
once; bfloat16 travels as the numpy dtype of `ml_dtypes`. With LoRA it holds the
adapters alone.

Where FSDP2 spreads the weights over learners, all of them take part in whatever reads
whole weights, and only the first gets them (see `learner.fsdp`).
"""

import json
import uuid
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ray.rllib.core.rl_module.torch.torch_rl_module import TorchRLModule
from ray.rllib.utils.annotations import override
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from rllib_arpo import lora
from rllib_arpo.engines.weights import WeightProbe, probe_token_ids
from rllib_arpo.errors import ConfigError
from rllib_arpo.learner.fsdp import (
    is_first,
    part_like,
    read_out,
    take_apart,
    whole,
)
from rllib_arpo.learner.scoring import EntropyMode, TokenScorer
from rllib_arpo.pretrained import copy_tokenizer, load_causal_lm, quiet_loading

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Of `model_config`.
KEYS = ("model", "dtype", "gradient_checkpointing", "lora", "reference")


class CausalLMRLModule(TorchRLModule):
    """A causal language model that scores given tokens.

    `model_config` keys:
        model: folder or hub name.
        dtype: "float32" (default) or "bfloat16".
        gradient_checkpointing: recompute activations in the backward pass.
        lora: train adapters only; a dict of PEFT's `LoraConfig` (see `lora`). The
            model itself is then kept in `dtype`, the adapters in float32.
        reference: score under the first weights too, for a KL penalty; needs
            `inference_only=False`. With `lora` that is the model without adapters,
            else a frozen copy.

    Raises:
        ConfigError: the model cannot be loaded, or a key is wrong.
    """

    @override(TorchRLModule)
    def setup(self) -> None:
        config: dict[str, Any] = dict(self.model_config or {})
        if not config.get("model"):
            raise ConfigError(
                "rl_module(model_config={'model': ...}) is missing: give a Hugging "
                "Face model folder or a hub name"
            )
        self.source = str(config["model"])
        # Changes with every `set_state`; "" while it trains what `model` holds.
        self.restore_name = ""
        dtype = str(config.get("dtype") or "float32")
        if dtype not in DTYPES:
            raise ConfigError(
                f"model_config['dtype'] is {dtype!r}: expected one of {sorted(DTYPES)}"
            )
        self.compute_dtype = DTYPES[dtype]
        adapters = config.get("lora")
        frozen = self.inference_only or adapters is not None
        stored = self.compute_dtype if frozen else torch.float32
        model = load_causal_lm(self.source, stored)
        try:
            self.scorer = TokenScorer(model, self.compute_dtype)
        except AttributeError as error:  # RLlib would swallow it
            raise ConfigError(
                f"model {self.source!r} is not a causal language model that can be "
                f"trained here: {error}"
            ) from error
        self.lora: dict[str, Any] | None = None
        if adapters is not None:
            self.lora = lora.lora_settings(adapters)
            lora.add_adapters(self.model, self.lora)
        if config.get("gradient_checkpointing"):
            # Not the reentrant kind: it would give the adapters of the first layer no
            # gradient, since nothing below them is trained.
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.has_reference = bool(config.get("reference")) and not self.inference_only
        self.reference: TokenScorer | None = None
        if self.has_reference and self.lora is None:
            copy = load_causal_lm(self.source, self.compute_dtype)
            self.reference = TokenScorer(copy, self.compute_dtype)
            self.reference.requires_grad_(False)

    @property
    def model(self) -> PreTrainedModel:
        """The Hugging Face model."""
        return self.scorer.model

    @property
    def is_spread(self) -> bool:
        """Whether each learner holds a part of the weights only."""
        return isinstance(self.scorer, FSDPModule)

    @property
    def scorers(self) -> list[TokenScorer]:
        """Of the model, and of the reference if it is a copy."""
        return [s for s in (self.scorer, self.reference) if s is not None]

    @override(TorchRLModule)
    def _forward(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Tensor]:
        return self._forward_train(batch, **kwargs)

    @override(TorchRLModule)
    def _forward_train(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Tensor]:
        """Score the loss tokens (see `TokenScorer.forward`).

        Args:
            batch: what the scorer takes, and "entropy" for its second argument.
            kwargs: unused.

        Returns:
            [B, T] float32 tensors, zero outside the loss mask: logprobs, entropies
            unless "none", and ref_logprobs when there is a reference.
        """
        # First, so that a backward pass follows its own forward pass.
        ref_logprobs = self._ref_logprobs(batch) if self.has_reference else None
        out = self._score(self.scorer, batch, batch.get("entropy", "value"))
        if ref_logprobs is not None:
            out["ref_logprobs"] = ref_logprobs
        return out

    @torch.no_grad()
    def _ref_logprobs(self, batch: Mapping[str, Any]) -> Tensor:
        if self.reference is not None:
            return self._score(self.reference, batch, "none")["logprobs"]
        with lora.without_adapters(self.model):
            return self._score(self.scorer, batch, "none")["logprobs"]

    def _score(
        self, scorer: TokenScorer, batch: Mapping[str, Any], entropy: EntropyMode
    ) -> dict[str, Tensor]:
        out = scorer(batch, entropy)
        if not torch.is_grad_enabled():
            take_apart(scorer)
        return out

    @override(TorchRLModule)
    def get_state(
        self,
        components: str | Collection[str] | None = None,
        *,
        not_components: str | Collection[str] | None = None,
        inference_only: bool = False,
        **kwargs: Any,
    ) -> dict[str, np.ndarray]:
        """Copy the weights out: Hugging Face name -> array, tied weights once.

        Args:
            components: unused, the module has none.
            not_components: unused.
            inference_only: in the model's `dtype` instead of the stored float32.
            kwargs: unused.

        Returns:
            Copies that later training does not change; of weights that are spread
            over learners only on the first.
        """
        dtype = self.compute_dtype if inference_only else None
        arrays = {name: read_out(t, dtype) for name, t in self._tensors().items()}
        return {name: array for name, array in arrays.items() if array is not None}

    @torch.no_grad()
    def weight_probe(self) -> WeightProbe:
        """A fixed text and its score under the weights of now, for the engines."""
        vocab_size = self.model.config.get_text_config().vocab_size
        token_ids = probe_token_ids(vocab_size)
        ids = torch.from_numpy(token_ids.astype(np.int64))[None]
        ids = ids.to(next(self.model.parameters()).device)
        scored = torch.ones_like(ids, dtype=torch.bool)
        scored[:, 0] = False
        batch = {
            "token_ids": ids,
            "position_ids": torch.arange(ids.shape[1], device=ids.device)[None],
            "loss_mask": scored,
        }
        logprobs = self._score(self.scorer, batch, "none")["logprobs"][0, 1:]
        return WeightProbe(token_ids=token_ids, logprobs=logprobs.cpu().numpy())

    @override(TorchRLModule)
    def set_state(self, state: Mapping[str, Any]) -> None:
        """Take weights as `get_state` gave them; dtypes are converted.

        Raises:
            ConfigError: names or shapes differ from the model's; nothing was changed.
        """
        tensors = self._tensors()
        missing, unexpected = tensors.keys() - state.keys(), state.keys() - tensors
        if missing or unexpected:
            raise ConfigError(
                f"the state does not fit model {self.source!r}: missing "
                f"{sorted(missing)[:3]}, unexpected {sorted(unexpected)[:3]}"
            )
        for name, tensor in tensors.items():
            if tuple(state[name].shape) != tuple(tensor.shape):
                raise ConfigError(
                    f"the state does not fit model {self.source!r}: {name} has shape "
                    f"{tuple(state[name].shape)}, expected {tuple(tensor.shape)}"
                )
        with torch.no_grad():
            for name, tensor in tensors.items():
                tensor.copy_(part_like(tensor, state[name]))
        self.restore_name = uuid.uuid4().hex

    def _tensors(self) -> dict[str, Tensor]:
        """What `get_state` holds: everything, or with LoRA the adapters."""
        if self.lora is not None:
            return lora.adapter_tensors(self.model)
        return self._all_tensors()

    def _all_tensors(self) -> dict[str, Tensor]:
        """Parameters, tied ones once, and the buffers that Hugging Face saves."""
        aliases = {
            name for name, _ in self.model.named_parameters(remove_duplicate=False)
        }
        buffers = {
            name: tensor
            for name, tensor in self.model.state_dict().items()
            if name not in aliases
        }
        return {**dict(self.model.named_parameters()), **buffers}

    @torch.no_grad()
    def export_state(self) -> dict[str, Tensor]:
        """The weights of an ordinary model, in `dtype`: adapters are merged.

        Returns:
            Hugging Face name -> tensor, tied weights once; empty on all learners but
            the first if weights are spread over them.
        """
        tensors = self._all_tensors()
        state: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            if ".lora_" in name:
                continue
            value = whole(tensor.detach())
            stem, adapted, _ = name.partition(".base_layer.weight")
            if adapted:
                assert self.lora is not None
                a, b = (
                    whole(tensors[f"{stem}.lora_{x}.{lora.ADAPTER}.weight"])
                    for x in "AB"
                )
                value = value.float() + lora.scale(self.lora) * (b @ a)
            if value.is_floating_point():
                value = value.to(self.compute_dtype)
            if is_first() or not self.is_spread:
                state[lora.plain_name(name)] = value.cpu()
        return state

    def save_pretrained(
        self, folder: str | Path, state: Mapping[str, Tensor] | None = None
    ) -> None:
        """Write an ordinary Hugging Face folder: weights in `dtype`, and tokenizer.

        Args:
            folder: where to.
            state: what `export_state` gave, where all learners had to be asked.
        """
        folder = Path(folder)
        with quiet_loading():
            self.model.save_pretrained(
                folder, state_dict=dict(state or self.export_state())
            )
        config_file = folder / "config.json"
        config = json.loads(config_file.read_text())
        config["dtype"] = str(self.compute_dtype).removeprefix("torch.")
        config_file.write_text(json.dumps(config, indent=2) + "\n")
        copy_tokenizer(self.source, folder)
