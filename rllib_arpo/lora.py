"""LoRA: small matrices that are trained beside the frozen ones of a model.

    y = W·x + s·B·A·x     s = alpha / r, or alpha / √r with `use_rslora`
                          LoRA, arXiv:2106.09685; rsLoRA, arXiv:2312.03732

Only A and B are trained, sent to the engines and saved, under PEFT's names
(`base_model.model.<layer>.lora_A.weight`). B starts at zero, so the first policy is
the model itself, which is also the reference of a KL penalty.

The torch engine adds s·B·A to its weights when they arrive; vLLM keeps adapters apart.
"""

import contextlib
import importlib.util
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rllib_arpo.arrays import to_tensor
from rllib_arpo.errors import ConfigError, WeightSyncError

# Keys of PEFT's `LoraConfig` that every engine can serve.
KEYS = (
    *("r", "lora_alpha", "target_modules", "exclude_modules", "use_rslora"),
    *("layers_to_transform", "layers_pattern", "init_lora_weights"),
)
DEFAULTS = {
    "r": 8,
    "lora_alpha": 8,
    "target_modules": "all-linear",
    "use_rslora": False,
    # PEFT names its own; vLLM wants to see it.
    "bias": "none",
}
# Values that other keys may have: those that leave them out of play.
NEUTRAL = {"lora_dropout": 0, "bias": "none", "task_type": "CAUSAL_LM"}
INITS = (True, False, "gaussian", "orthogonal")
PREFIX = "base_model.model."
ADAPTER = "default"  # PEFT's name of the only adapter


def lora_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of an adapter, checked and with defaults filled in.

    Args:
        given: keys of PEFT's `LoraConfig`.

    Raises:
        ConfigError: names the key and what is expected.
    """
    for name, value in given.items():
        if name in NEUTRAL and value != NEUTRAL[name]:
            why = {
                "lora_dropout": "with dropout the ratio of new to old probabilities "
                "would differ from 1 before any step was taken",
                "bias": "engines take no biases of an adapter",
                "task_type": "the model writes text",
            }[name]
            raise ConfigError(
                f"`lora` sets {name} to {value!r}, expected {NEUTRAL[name]!r}: {why}"
            )
        if name not in KEYS and name not in NEUTRAL:
            raise ConfigError(
                f"`lora` holds `{name}`, expected keys of PEFT's LoraConfig that all "
                f"engines can serve: {', '.join(KEYS)}"
            )
    settings = {**DEFAULTS, **given}
    if not (isinstance(settings["r"], int) and settings["r"] >= 1):
        raise ConfigError(f"`lora` has rank `r` {settings['r']!r}: expected 1 or more")
    if settings.get("init_lora_weights", True) not in INITS:
        raise ConfigError(
            f"`lora` sets init_lora_weights to {settings['init_lora_weights']!r}, "
            f"expected one of {INITS}: others change the model's own weights, which "
            "engines read from its folder"
        )
    if importlib.util.find_spec("peft") is None:
        raise ConfigError("`lora` needs PEFT: install `rllib_arpo[lora]`")
    if not isinstance(settings["target_modules"], str):
        settings["target_modules"] = sorted(settings["target_modules"])
    return settings


def scale(settings: Mapping[str, Any]) -> float:
    """S, what B·A is multiplied with."""
    rank = settings["r"]
    return settings["lora_alpha"] / (
        math.sqrt(rank) if settings["use_rslora"] else rank
    )


def add_adapters(model: PreTrainedModel, settings: Mapping[str, Any]) -> None:
    """Put adapters into a model; all other parameters are frozen.

    Their first values are the same in every process and run. They are float32, as
    whatever is trained.

    Raises:
        ConfigError: PEFT cannot put them where they are asked for, or they are not in
            linear layers below the head.
    """
    import peft

    config = peft.LoraConfig(task_type="CAUSAL_LM", **settings)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            peft.inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"`lora` does not fit the model: {error}") from error
    outer = {model.get_input_embeddings(), model.get_output_embeddings()}
    for name, layer in adapted_layers(model):
        if layer in outer or not isinstance(layer.base_layer, nn.Linear):
            raise ConfigError(
                f"`lora` adapts {name}, but engines take adapters of linear layers "
                "below the head only: narrow `target_modules` "
                f"({settings['target_modules']!r})"
            )
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def adapted_layers(model: nn.Module) -> list[tuple[str, Any]]:
    """Names and PEFT's modules of the layers that have an adapter."""
    return [(n, m) for n, m in model.named_modules() if hasattr(m, "lora_A")]


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """PEFT's name -> parameter of all adapters."""
    return {
        PREFIX + name.replace(f".{ADAPTER}.", "."): parameter
        for name, parameter in model.named_parameters()
        if ".lora_" in name
    }


@contextlib.contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """The model as it was before; no gradient is taken inside."""
    layers = [layer for _, layer in adapted_layers(model)]
    # PEFT's public switch sets `requires_grad` besides, which FSDP2 must not see.
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def plain_name(name: str) -> str:
    """What a parameter was called before there were adapters."""
    return name.replace(".base_layer.", ".")


class AdapterMerger:
    """Adds adapters to the weights of a model that has no layers for them.

    Args:
        model: its weights are those that the adapters were trained on.
        settings: as from `lora_settings`.
    """

    def __init__(self, model: PreTrainedModel, settings: Mapping[str, Any]) -> None:
        self._parameters = dict(model.named_parameters())
        self._scale = scale(settings)
        self._name = type(model).__name__
        self._bases: dict[str, Tensor] = {}

    @torch.no_grad()
    def load(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Put W + s·B·A in place of W; nothing changes if an array is wrong.

        Each W is kept, so that adapters which follow do not add up.

        Raises:
            WeightSyncError: a name is unknown or missing, or a shape differs.
        """
        pairs = self._pairs(arrays)
        for name, (a, b) in pairs.items():
            weight = self._parameters[name]
            base = self._bases.setdefault(name, weight.detach().clone())
            a, b = (to_tensor(array).to(weight.device).float() for array in (a, b))
            weight.copy_(base.float() + self._scale * (b @ a))

    def _pairs(
        self, arrays: Mapping[str, np.ndarray]
    ) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        pairs: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        problems: list[str] = []
        for name in arrays:
            stem, _, kind = name.removeprefix(PREFIX).partition(".lora_")
            target = f"{stem}.weight"
            if kind not in ("A.weight", "B.weight") or target not in self._parameters:
                problems.append(f"unknown {name}")
                continue
            a, b = (arrays.get(f"{PREFIX}{stem}.lora_{x}.weight") for x in "AB")
            rows, columns = self._parameters[target].shape
            if a is None or b is None:
                problems.append(f"{name} without its other half")
            elif a.shape != (len(a), columns) or b.shape != (rows, len(a)):
                problems.append(
                    f"{stem} has adapters of shapes {a.shape} and {b.shape}, expected "
                    f"(r, {columns}) and ({rows}, r)"
                )
            else:
                pairs[target] = a, b
        problems += [f"missing {name}" for name in self._bases.keys() - pairs]
        if problems:
            raise WeightSyncError(
                f"the adapters do not fit {self._name}: {'; '.join(problems[:8])}"
            )
        return pairs
