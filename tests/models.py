"""Tiny models with random weights, built in place."""

from pathlib import Path
from typing import Literal

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

Family = Literal["qwen2", "qwen3", "llama"]
CONFIGS: dict[str, type[PretrainedConfig]] = {
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "llama": LlamaConfig,
}


def tiny_model(
    family: Family = "qwen2",
    *,
    vocab_size: int = 32,
    hidden_size: int = 16,
    num_layers: int = 2,
    num_heads: int = 2,
    tied: bool = True,
    max_positions: int = 512,
    seed: int = 0,
) -> PreTrainedModel:
    """A model of `family`; same arguments, same weights."""
    config = CONFIGS[family](
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        head_dim=hidden_size // num_heads,
        max_position_embeddings=max_positions,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        initializer_range=0.2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config)


def save_tiny_model(folder: Path, family: Family = "qwen2", **settings) -> str:
    """Write `tiny_model` as a Hugging Face folder and return its path."""
    tiny_model(family, **settings).save_pretrained(folder)
    return str(folder)
