"""Hugging Face model folders: loading them for training, and what they must be.

A model is loaded whole (a missing weight is an error, not a random number) and
without dropout, which would make the ratio of new to old probabilities differ from 1
before any step was taken.
"""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers.utils import logging

from rllib_arpo.errors import ConfigError

TOKENIZER_FILES = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "*.model",
)


def load_causal_lm(source: str, dtype: torch.dtype) -> PreTrainedModel:
    """Load a model with all of its weights and without dropout.

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

    Some families scale or cap them afterwards.

    Raises:
        ConfigError: the model has no body and head that could be told apart.
    """
    head = model.get_output_embeddings()
    if head is None or model.base_model is model:
        raise ConfigError(
            f"{type(model).__name__} is not a causal language model that can be "
            "trained here: it has no body with an output embedding behind it"
        )
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
