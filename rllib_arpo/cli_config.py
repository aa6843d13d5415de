"""From the words of the command line to configs, checkpoints and model folders.

Whatever is wrong is refused here, before Ray or a model is started.
"""

import runpy
import sys
from pathlib import Path
from typing import Any, cast

from transformers import AutoConfig

from rllib_arpo.arpo import ARPO
from rllib_arpo.checkpoints import CHECKPOINTS, check_whole, newest_checkpoint
from rllib_arpo.config import ARPOConfig
from rllib_arpo.data.data_file import BadRowRule, DataFile
from rllib_arpo.envs.env_config import DEFAULTS, load_tokenizer
from rllib_arpo.envs.tool_use_env import ToolUseEnv
from rllib_arpo.errors import ARPOError, ConfigError
from rllib_arpo.tools.standard import PythonBackend, StandardTools
from rllib_arpo.tree import Task

# Of --eval-data, for one evaluation during training.
MAX_EVAL_TASKS = 512


def config_of_file(file: Path, model: str | None) -> ARPOConfig:
    """The `config` that a Python file defines, with `model` in place of its own.

    Raises:
        ConfigError: the file is missing, fails, or defines none; or there is no such
            model.
    """
    if not file.is_file():
        raise ConfigError(f"there is no config file {file}")
    # As Python does for a script, so that a file can import its neighbors.
    sys.path.insert(0, str(file.absolute().parent))
    try:
        config = runpy.run_path(str(file)).get("config")
    except ARPOError:
        raise
    except Exception as error:  # boundary: a config file is a user's code
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(f"{file} cannot be run: {reason}") from error
    if not isinstance(config, ARPOConfig):
        raise ConfigError(f"{file} must define `config`, an ARPOConfig")
    if model is not None:
        config.rl_module(model_config={**config.model_config, "model": model})
    check_model(config.model_config.get("model"))
    return config


def config_of_flags(
    *,
    data: str | None,
    model: str,
    corpus: Path | None,
    max_response_tokens: int,
    num_env_runners: int,
    seed: int,
    search: str | None = None,
    search_endpoint: str | None = None,
    browse: bool = False,
    python: str = "embedded",
    tool_cache: Path | None = None,
    dialogue: str = "tags",
    max_result_tokens: int = DEFAULTS["max_result_tokens"],
    eval_data: str | None = None,
    eval_interval: int = 0,
    on_bad_row: str = "error",
    batch_size: int = 1,
    minibatch_size: int | None = None,
    group_size: int = 16,
    lr: float = 1e-6,
    max_tool_calls: int = 5,
    engine: str = "torch",
    num_learners: int = 0,
    num_saved_trees: int | None = 4,
) -> ARPOConfig:
    """ARPO on rows of a file, with Python and, if asked for, search and pages.

    Raises:
        ConfigError: a flag cannot work, or there is no such model.
        DataError: the corpus cannot be read.
    """
    check_model(model)
    tools = StandardTools(
        python=cast(PythonBackend, python),
        corpus=_absolute(corpus),
        search=search,
        search_settings={"endpoint": search_endpoint} if search_endpoint else {},
        browse=browse,
        cache=_absolute(tool_cache),
    )
    tools.open()
    config = (
        ARPOConfig()
        .environment(
            env=ToolUseEnv,
            env_config={
                "tools": tools,
                "dialogue": dialogue,
                "max_result_tokens": max_result_tokens,
                "max_response_tokens": max_response_tokens,
                "max_tool_calls": max_tool_calls,
            },
            train_tasks=_data_file(data, on_bad_row),
            eval_tasks=_data_file(eval_data, on_bad_row),
        )
        .rl_module(model_config={"model": local_or_hub(model)})
        .tree_rollout(
            group_size=group_size, num_initial_rollouts=max(group_size // 2, 1)
        )
        .training(
            train_batch_size_per_learner=per_learner(batch_size, num_learners),
            minibatch_size=per_learner(
                minibatch_size or batch_size, num_learners, flag="--minibatch-size"
            ),
            lr=lr,
        )
        .engine(engine)
        .env_runners(num_env_runners=num_env_runners)
        .learners(num_learners=num_learners)
        .evaluation(
            evaluation_interval=eval_interval or None,
            evaluation_duration=MAX_EVAL_TASKS,
        )
        .reporting(num_saved_trees=num_saved_trees)
        .debugging(seed=seed, log_level="ERROR")
    )
    if group_size == 1:
        config.tree_rollout(branch_rule="never")
    return config


def per_learner(
    batch_size: int, num_learners: int, *, flag: str = "--batch-size"
) -> int:
    """Trees of a batch for each learner."""
    learners = max(num_learners, 1)
    if batch_size % learners:
        raise ConfigError(
            f"{flag} ({batch_size}) must be a multiple of --num-learners "
            f"({num_learners})"
        )
    return batch_size // learners


def check_model(model: str | None) -> None:
    """Refuse a model or tokenizer that cannot be loaded.

    Raises:
        ConfigError: names the model and why.
    """
    if model is None:
        raise ConfigError("no model is set: give a Hugging Face folder or hub name")
    try:
        AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f'no model "{model}": give a Hugging Face folder or hub name ({reason})'
        ) from error
    load_tokenizer(model)


def local_or_hub(model: str) -> str:
    """A folder as an absolute path, for workers run elsewhere; a hub name as it is."""
    return str(Path(model).absolute()) if Path(model).is_dir() else model


def is_model_folder(folder: Path) -> bool:
    """Whether it holds a Hugging Face model."""
    return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))


def find_checkpoint(folder: Path) -> Path:
    """The newest whole checkpoint of a run's folder, or the folder if it is one.

    Raises:
        ConfigError: there is none.
        CheckpointError: the folder is a checkpoint that is not whole.
    """
    newest = newest_checkpoint(folder)
    if newest is not None:
        return newest
    if (folder / ARPO.METADATA_FILE_NAME).is_file():
        check_whole(folder)
        return folder.absolute()
    raise ConfigError(
        f"{folder} holds no checkpoint: give a run's folder, such as runs/quickstart"
    )


def checkpoint_to_resume(run: Path) -> Path:
    """The newest whole checkpoint of a run's folder, which is to be written to.

    Raises:
        ConfigError: there is none, or the folder is a checkpoint itself.
    """
    if not (run / ARPO.METADATA_FILE_NAME).is_file():
        return find_checkpoint(run)
    above = run.resolve().parent
    resume = (
        f"give --resume {above.parent} to go on from its newest one, or "
        if above.name == CHECKPOINTS
        else ""
    )
    raise ConfigError(
        f"{run} is a checkpoint, and --resume takes the folder of a run: {resume}begin "
        f"a run with these weights (rllib-arpo export {run} MODEL, then train or sft "
        "with that MODEL)"
    )


def no_tools(task: Task) -> list[Any]:
    """For an environment that is never stepped."""
    return []


def _data_file(path: str | None, on_bad_row: str) -> DataFile | None:
    if path is None:
        return None
    place = path if "://" in path else str(Path(path).absolute())
    return DataFile(place, on_bad_row=cast(BadRowRule, on_bad_row))


def _absolute(file: Path | None) -> str | None:
    return None if file is None else str(file.absolute())
