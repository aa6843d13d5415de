"""A Hugging Face causal language model as an RLModule.

The learner's copy keeps float32 weights whatever the `dtype`: with "bfloat16" the
forward pass runs under autocast. A bfloat16 weight near 0.02 cannot take a step of
1e-6, it would round the step away. What leaves for the engines
(`get_state(inference_only=True)`) has the chosen dtype.

State is a flat dict of numpy arrays under Hugging Face parameter names, tied weights
once; bfloat16 travels as the numpy dtype of `ml_dtypes`.
"""

import contextlib
import json
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from ray.rllib.core.rl_module.torch.torch_rl_module import TorchRLModule
from ray.rllib.utils.annotations import override
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers.utils import logging

from rllib_arpo.arrays import to_numpy, to_tensor
from rllib_arpo.engines.weights import WeightProbe, probe_token_ids
from rllib_arpo.errors import ConfigError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TOKENIZER_FILES = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "*.model",
)
# Logits are made in pieces of at most this many numbers, so that a long micro-batch
# and a large vocabulary do not have to fit into memory at once.
MAX_LOGITS = 2**27

EntropyMode = Literal["none", "value", "gradient"]
Head = Callable[[Tensor], Tensor]


class CausalLMRLModule(TorchRLModule):
    """A causal language model that scores given tokens.

    `model_config` keys:
        model: folder or hub name.
        dtype: "float32" (default) or "bfloat16".
        gradient_checkpointing: recompute activations in the backward pass.
        reference: keep a frozen copy of the first weights, for a KL penalty; needs
            `inference_only=False`.

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
        dtype = str(config.get("dtype") or "float32")
        if dtype not in DTYPES:
            raise ConfigError(
                f"model_config['dtype'] is {dtype!r}: expected one of {sorted(DTYPES)}"
            )
        self.compute_dtype = DTYPES[dtype]
        stored = self.compute_dtype if self.inference_only else torch.float32
        self.model = load_causal_lm(self.source, stored)
        try:
            self.head_is_plain = head_is_plain(self.model)
        except AttributeError as error:  # RLlib would swallow it
            raise ConfigError(
                f"model {self.source!r} is not a causal language model that can be "
                f"trained here: {error}"
            ) from error
        if config.get("gradient_checkpointing"):
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.reference: PreTrainedModel | None = None
        if config.get("reference") and not self.inference_only:
            self.reference = load_causal_lm(self.source, self.compute_dtype)
            self.reference.requires_grad_(False)

    @override(TorchRLModule)
    def _forward(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Tensor]:
        return self._forward_train(batch, **kwargs)

    @override(TorchRLModule)
    def _forward_train(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Tensor]:
        """Score the loss tokens under the distribution that the engine samples from.

        Args:
            batch: token_ids, position_ids [B, T] int64 and loss_mask [B, T] bool
                (False in the first column); "temperature" (default 1) divides the
                logits; "entropy" is "none", "value" (default) or "gradient".
            kwargs: unused.

        Returns:
            [B, T] float32 tensors, zero outside the loss mask: logprobs of the tokens
            given those before them; entropies in nats, unless "none"; ref_logprobs
            when there is a reference model.
        """
        out = self._score(self.model, batch, batch.get("entropy", "value"))
        if self.reference is not None:
            with torch.no_grad():
                ref = self._score(self.reference, batch, "none")
            out["ref_logprobs"] = ref["logprobs"]
        return out

    def _score(
        self, model: PreTrainedModel, batch: Mapping[str, Any], entropy: EntropyMode
    ) -> dict[str, Tensor]:
        ids: Tensor = batch["token_ids"]
        rows, columns = batch["loss_mask"].nonzero(as_tuple=True)
        targets = ids[rows, columns]
        inputs = {
            "input_ids": ids,
            "position_ids": batch["position_ids"],
            "use_cache": False,
        }
        head: Head
        with self._autocast(ids.device):
            # Padding stands on the right, so causal attention alone keeps it out.
            if self.head_is_plain:
                hidden = model.base_model(**inputs).last_hidden_state
                head = cast(Head, model.get_output_embeddings())
            else:
                hidden, head = model(**inputs).logits, _identity
            logprobs, entropies = score_targets(
                hidden[rows, columns - 1],
                targets,
                head,
                vocab_size=model.config.get_text_config().vocab_size,
                temperature=float(batch.get("temperature", 1.0)),
                entropy=entropy,
            )
        blank = torch.zeros(ids.shape, dtype=torch.float32, device=ids.device)
        out = {"logprobs": blank.index_put((rows, columns), logprobs)}
        if entropies is not None:
            out["entropies"] = blank.index_put((rows, columns), entropies)
        return out

    def _autocast(self, device: torch.device) -> contextlib.AbstractContextManager:
        if self.compute_dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(device.type, dtype=self.compute_dtype)

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
            Copies that later training does not change.
        """
        dtype = self.compute_dtype if inference_only else None
        return {name: to_numpy(t, dtype) for name, t in self._tensors().items()}

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
        logprobs = self._score(self.model, batch, "none")["logprobs"][0, 1:]
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
                tensor.copy_(to_tensor(state[name]))

    def _tensors(self) -> dict[str, Tensor]:
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

    def save_pretrained(self, folder: str | Path) -> None:
        """Write an ordinary Hugging Face folder: weights in `dtype`, and tokenizer."""
        folder = Path(folder)
        state = {
            name: tensor.detach().to(self.compute_dtype)
            if tensor.is_floating_point()
            else tensor
            for name, tensor in self.model.state_dict().items()
        }
        with quiet_loading():
            self.model.save_pretrained(folder, state_dict=state)
        config_file = folder / "config.json"
        config = json.loads(config_file.read_text())
        config["dtype"] = str(self.compute_dtype).removeprefix("torch.")
        config_file.write_text(json.dumps(config, indent=2) + "\n")
        copy_tokenizer(self.source, folder)


def _identity(logits: Tensor) -> Tensor:
    return logits


def score_targets(
    hidden: Tensor,
    targets: Tensor,
    head: Head,
    *,
    vocab_size: int,
    temperature: float,
    entropy: EntropyMode,
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of given tokens and entropy, from hidden states.

        log π(y) = z_y/τ - log Σ_j exp(z_j/τ),  H = -Σ_j π_j log π_j,  z = head(h)

    Args:
        hidden: [n, D], one state before each target.
        targets: [n] int64.
        head: [m, D] -> [m, V] logits.
        vocab_size: V, to choose the size of pieces.
        temperature: τ > 0.
        entropy: whether to compute H, and with gradient.

    Returns:
        [n] float32 logprobs, and [n] float32 entropies or None.
    """

    def score(part: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        logits = head(part).float()
        if temperature != 1:
            logits = logits / temperature
        table = logits.log_softmax(-1)
        chosen = table.gather(-1, wanted[:, None]).squeeze(-1)
        if entropy == "none":
            return chosen, chosen
        with torch.set_grad_enabled(entropy == "gradient" and torch.is_grad_enabled()):
            return chosen, -(table.exp() * table).sum(-1)

    size = max(MAX_LOGITS // vocab_size, 1)
    if len(targets) <= size:
        logprobs, entropies = score(hidden, targets)
    else:
        parts = [
            checkpoint(score, part, wanted, use_reentrant=False)
            for part, wanted in zip(
                hidden.split(size), targets.split(size), strict=True
            )
        ]
        logprobs = torch.cat([part[0] for part in parts])
        entropies = torch.cat([part[1] for part in parts])
    return logprobs, None if entropy == "none" else entropies


def load_causal_lm(source: str, dtype: torch.dtype) -> PreTrainedModel:
    """Load a model with all of its weights and without dropout.

    Dropout would make the ratio of new to old probabilities differ from 1 before any
    step was taken.

    Args:
        source: folder or hub name.
        dtype: of the parameters.

    Raises:
        ConfigError: no such model, or its files are not whole.
    """
    folder = Path(source).expanduser()
    looks_local = folder.exists() or source.startswith((".", "/", "~"))
    if looks_local and not (folder / "config.json").is_file():
        raise ConfigError(
            f"model folder {source!r} has no config.json: give a Hugging Face model "
            "folder or a hub name"
        )
    name = str(folder) if looks_local else source
    # Boundary: a wrong folder makes the library below raise about anything, and an
    # AttributeError in `setup` would be swallowed by RLlib.
    try:
        with quiet_loading():
            return _load(name, dtype)
    except ConfigError:
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"cannot load model {source!r}: {reason}") from error


def _load(name: str, dtype: torch.dtype) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(name)
    for key, value in config.to_dict().items():
        if ("dropout" in key or "pdrop" in key) and isinstance(value, float):
            setattr(config, key, 0.0)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        name, config=config, dtype=dtype, output_loading_info=True
    )
    model, report = loaded
    absent = sorted(report["missing_keys"])
    if absent:
        raise ConfigError(
            f"cannot load model {name!r}: its files lack {len(absent)} weights, "
            f"first {absent[0]}"
        )
    return model


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """No progress bars of the library, which would break into ours."""
    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def head_is_plain(model: PreTrainedModel) -> bool:
    """Whether logits are just the output embedding of the last hidden state.

    Some families scale or cap them afterwards; those are given their whole forward
    pass instead of one that skips the positions without loss.
    """
    head = model.get_output_embeddings()
    if head is None or model.base_model is model:
        return False
    ids = torch.arange(4)[None] % model.config.get_text_config().vocab_size
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        return torch.equal(head(hidden), logits)


def copy_tokenizer(source: str, folder: Path) -> None:
    """Put the tokenizer of `source` into `folder`, byte for byte if it is local."""
    origin = Path(source).expanduser()
    if not origin.is_dir():
        AutoTokenizer.from_pretrained(source).save_pretrained(folder)
        return
    for pattern in TOKENIZER_FILES:
        for file in origin.glob(pattern):
            if file.resolve() != (folder / file.name).resolve():
                shutil.copy(file, folder / file.name)
