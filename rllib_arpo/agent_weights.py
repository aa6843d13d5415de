"""Where a model's weights are, and a Hugging Face folder from wherever they are.

A checkpoint is a pickle, which can run any code when it is read: open only those that
you trust.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from pyarrow.fs import LocalFileSystem
from ray.rllib.core import (
    COMPONENT_LEARNER,
    COMPONENT_LEARNER_GROUP,
    COMPONENT_RL_MODULE,
    DEFAULT_MODULE_ID,
)
from transformers import AutoTokenizer

from rllib_arpo.checkpoints import CHECKPOINTS, newest_checkpoint
from rllib_arpo.cli_config import find_checkpoint, is_model_folder
from rllib_arpo.cli_runs import settings_of
from rllib_arpo.errors import ConfigError
from rllib_arpo.predictions import fingerprint_of_folder
from rllib_arpo.rl_module import CausalLMRLModule
from rllib_arpo.storage import merged_aside

REGISTERED = "models:/"
WEIGHTS = (
    *(COMPONENT_LEARNER_GROUP, COMPONENT_LEARNER),
    *(COMPONENT_RL_MODULE, DEFAULT_MODULE_ID),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """Where weights are.

    Attributes:
        name: what they are called if nobody says.
        source: leads to these very weights: a run's folder has become its newest
            checkpoint, an alias a version.
        folder: of a Hugging Face model, or a whole checkpoint.
        is_checkpoint: which of both.
        version: changes when the weights do.
    """

    name: str
    source: str
    folder: Path
    is_checkpoint: bool
    version: str


def find_weights(source: str) -> Weights:
    """Where the weights of a source are.

    Args:
        source: a Hugging Face folder; a run's folder, meaning its newest whole
            checkpoint, or its model if there is none; a checkpoint; or
            "models:/name@alias" or "models:/name/3" of an MLflow registry.

    Raises:
        ConfigError: there is nothing of the kind.
        CheckpointError: the checkpoint is not whole.
    """
    if source.startswith(REGISTERED):
        return _registered(source)
    folder = Path(source).absolute()
    if not folder.is_dir():
        raise ConfigError(
            f"there is no folder {source}: give a Hugging Face folder, a run's folder "
            f"such as runs/quickstart, a checkpoint, or {REGISTERED}NAME@ALIAS"
        )
    if is_model_folder(folder):
        return _of_model(folder, name=folder.name)
    model = folder / "model"
    if newest_checkpoint(folder) is None and is_model_folder(model):
        return _of_model(model, name=folder.name)
    checkpoint = find_checkpoint(folder)
    parent = checkpoint.parent
    return Weights(
        name=parent.parent.name if parent.name == CHECKPOINTS else checkpoint.name,
        source=str(checkpoint),
        folder=checkpoint,
        is_checkpoint=True,
        version=fingerprint_of_folder(checkpoint.joinpath(*WEIGHTS)),
    )


def vocabulary_of(weights: Weights) -> str:
    """Digest of what each token id of a model means.

    Raises:
        ConfigError: there is no tokenizer.
        CheckpointError: the checkpoint is not whole.
    """
    folder = str(weights.folder)
    if weights.is_checkpoint:
        folder = str(settings_of(weights.folder)["_model_config"]["model"])
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder} holds no tokenizer: {error}") from error
    meaning = [sorted(tokenizer.get_vocab().items()), tokenizer.eos_token]
    return hashlib.sha256(json.dumps(meaning).encode()).hexdigest()


def export_weights(checkpoint: str | Path, folder: str | Path) -> Path:
    """Write a checkpoint's weights as a Hugging Face folder, tokenizer included.

    It equals what `ARPO.save_pretrained` writes, adapters merged, but needs neither
    Ray nor the algorithm. Reading a checkpoint runs code in it.

    Args:
        checkpoint: a whole one.
        folder: it keeps its other files.

    Returns:
        `folder`, absolute.

    Raises:
        ConfigError: the model that training began with is gone.
        CheckpointError: the checkpoint is not whole, or a file cannot be written.
    """
    checkpoint, folder = find_checkpoint(Path(checkpoint)), Path(folder).absolute()
    settings = {
        **settings_of(checkpoint)["_model_config"],
        "reference": False,
        "gradient_checkpointing": False,
    }
    module = CausalLMRLModule(inference_only=False, model_config=settings)
    module.restore_from_path(
        str(checkpoint.joinpath(*WEIGHTS)), filesystem=LocalFileSystem()
    )
    with merged_aside(folder) as aside:
        module.save_pretrained(aside)
    return folder


def _registered(source: str) -> Weights:
    from rllib_arpo.tracking.registry import fetch_model

    fetched = fetch_model(source)
    name = source.removeprefix(REGISTERED).partition("@")[0].partition("/")[0]
    return Weights(
        name=name,
        source=f"{REGISTERED}{name}/{fetched.version}",
        folder=Path(fetched.folder),
        is_checkpoint=False,
        version=f"{name}/{fetched.version}",
    )


def _of_model(folder: Path, *, name: str) -> Weights:
    return Weights(
        name=name,
        source=str(folder),
        folder=folder,
        is_checkpoint=False,
        version=fingerprint_of_folder(folder),
    )
