"""What an agent is besides its weights: environment, tools, limits, how to sample.

An agent is found by its source: a Hugging Face folder, a run's folder, a checkpoint of
ARPO or SFT, or a model of a registry. What a source does not bring along, flags say.
A checkpoint is a pickle, which can run any code when it is read: open only those that
you trust.
"""

import json
import logging
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypedDict, Unpack, cast

import cloudpickle
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.env.env_context import EnvContext

from rllib_arpo.agent_weights import Weights, find_weights
from rllib_arpo.cli_config import (
    config_of_flags,
    no_tools,
)
from rllib_arpo.cli_runs import settings_of
from rllib_arpo.engines.engine import SamplingParams
from rllib_arpo.envs.env_config import DEFAULTS
from rllib_arpo.envs.tool_use_env import ToolUseEnv
from rllib_arpo.errors import ARPOError, ConfigError
from rllib_arpo.rl_module import DTYPES
from rllib_arpo.storage import file_aside
from rllib_arpo.tools.python_subprocess import SubprocessPythonTool
from rllib_arpo.tools.tool import Tool
from rllib_arpo.tree import Message, Task, Trajectory

logger = logging.getLogger(__name__)

# Beside the files of a Hugging Face model.
AGENT_FILE = "agent.pkl"


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentSettings:
    """All of an agent but its weights; can be pickled by cloudpickle.

    Attributes:
        env: class of the environment, or a function from an RLlib `EnvContext` to one.
        env_config: RLlib's; it may hold any objects.
        sampling: how it samples unless a request says otherwise.
        dtype: "float32" or "bfloat16", of the weights in the engine.
        engine: "torch" or "vllm".
        engine_kwargs: of the engine, as in `ARPOConfig.engine`.
    """

    env: Any
    env_config: Mapping[str, Any] = field(default_factory=dict)
    sampling: SamplingParams = field(default_factory=SamplingParams)
    dtype: str = "float32"
    engine: str = "torch"
    engine_kwargs: Mapping[str, Any] = field(default_factory=dict)


class ToolFlags(TypedDict, total=False):
    """Tools and limits, for weights that bring none; None is as if it were not given.

    They are those of `rllib-arpo evaluate`.
    """

    corpus: Path | None
    search: str | None
    search_endpoint: str | None
    browse: bool | None
    python: str | None
    tool_cache: Path | None
    dialogue: str | None
    max_response_tokens: int | None
    max_tool_calls: int | None
    max_result_tokens: int | None


class AgentFlags(ToolFlags, total=False):
    """What `find_agent` takes; the further ones go before what a source brings."""

    engine: str | None
    engine_kwargs: Mapping[str, Any] | None
    dtype: str | None
    temperature: float | None
    top_p: float | None
    top_k: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentSource(Weights):
    """Weights, and the rest of the agent that they belong to.

    Attributes:
        settings: the rest.
        tokenizer: folder or hub name.
    """

    settings: AgentSettings
    tokenizer: str


def find_agent(source: str, **flags: Unpack[AgentFlags]) -> AgentSource:
    """The agent of a source; reading a checkpoint or `agent.pkl` runs code in it.

    Args:
        source: as in `find_weights`.
        flags: tools and limits of a Hugging Face folder, or of an SFT checkpoint
            whose traces came from elsewhere, which brings its dialogue; sampling and
            engine of any.

    Raises:
        ConfigError: there is nothing of the kind, a flag cannot work, or it has no
            effect since the source brings tools and limits of its own.
        CheckpointError: the checkpoint is not whole.
        DataError: the corpus cannot be read.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    weights = find_weights(source)
    folder, tokenizer = weights.folder, str(weights.folder)
    if weights.is_checkpoint:
        saved = settings_of(folder)
        tokenizer = str(saved["_model_config"]["model"])
        settings = _of_checkpoint(saved, weights, given)
    elif (folder / AGENT_FILE).is_file():
        _refuse_tool_flags(weights.source, given)
        settings = load_agent(folder)
    else:
        settings = _of_flags(tokenizer, given)
        settings = replace(settings, dtype=_dtype_of(folder))
    settings = _with_flags(settings, given)
    return AgentSource(
        **{one.name: getattr(weights, one.name) for one in fields(weights)},
        settings=settings,
        tokenizer=tokenizer,
    )


def agent_of_config(config: Any) -> AgentSettings:
    """The agent that an `ARPOConfig` trains."""
    return _settings(vars(config))


def save_agent(settings: AgentSettings, folder: str | Path) -> Path:
    """Put an agent's settings beside the Hugging Face files of its model.

    What comes from a script or a notebook is stored with its code, what comes from a
    module by its name.

    Returns:
        The file.

    Raises:
        ConfigError: a setting cannot be stored, such as a lock.
        OSError: the file cannot be written.
    """
    file = Path(folder) / AGENT_FILE
    try:
        stored = cloudpickle.dumps(settings)
    except Exception as error:  # boundary: objects of users say why in their own way
        raise ConfigError(f"the agent's settings cannot be stored: {error}") from error
    with file_aside(file) as aside:
        aside.write_bytes(stored)
    return file


def load_agent(folder: str | Path) -> AgentSettings:
    """What `save_agent` wrote; reading it runs code in it.

    Raises:
        ConfigError: there is none, or a module that it needs is not installed.
    """
    file = Path(folder) / AGENT_FILE
    if not file.is_file():
        raise ConfigError(f"{folder} holds no {AGENT_FILE}")
    try:
        settings = pickle.loads(file.read_bytes())
    except Exception as error:  # boundary: unpickling runs users' code
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(f"{file} cannot be read: {reason}") from error
    if not isinstance(settings, AgentSettings):
        raise ConfigError(f"{file} holds no settings of an agent")
    return settings


def serving_env(settings: AgentSettings, tokenizer: str) -> ToolUseEnv:
    """The agent's environment, for questions that have no answer: nothing is rewarded.

    Args:
        settings: of the agent.
        tokenizer: folder or hub name, unless the settings bring one.

    Raises:
        ConfigError: it cannot be made, or is no `ToolUseEnv`.
    """
    context = EnvContext(
        {"tokenizer": tokenizer, **settings.env_config, "reward_fn": no_reward},
        worker_index=0,
    )
    try:
        made = settings.env(context)
    except ARPOError:
        raise
    except Exception as error:  # boundary: environments are users' code
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(f"the environment cannot be made: {reason}") from error
    env = getattr(made, "unwrapped", None)
    if not isinstance(env, ToolUseEnv):
        raise ConfigError(
            f"the environment is {made!r}, expected a ToolUseEnv: others cannot be "
            "served"
        )
    # One that ignores the setting would compare with an answer that is not there.
    env.reward_fn = no_reward
    return env


def no_reward(trajectory: Trajectory) -> float:
    """For questions without answers."""
    return 0.0


no_reward.in_thread = False  # type: ignore[attr-defined]


def require_sandboxed(env: ToolUseEnv) -> None:
    """Let an environment run code in a sandbox only, from now on.

    A tool is asked by its attribute `sandboxed`; one without the attribute runs no
    code or is safe by itself. A tool that wraps another answers for it.

    Args:
        env: its forks do as it does. Tools that depend on the question are looked at
            with each question too.

    Raises:
        ConfigError: a tool runs code without a sandbox. `reset` raises it as well.
    """
    kind = type(env)
    env.__class__ = type(f"Sandboxed{kind.__name__}", (_SandboxedTools, kind), {})
    asked = Task(task_id="", messages=(Message(role="user", content=""),), answers=())
    try:
        env.make_tools(asked)
    except ConfigError:
        raise
    except Exception as error:  # boundary: users' code, which may need a real task
        logger.debug("tools are checked with each question only", exc_info=error)


class _SandboxedTools(ToolUseEnv):
    """Before the class of an environment: it then makes no other tools."""

    def make_tools(self, task: Task) -> Sequence[Tool]:
        return [_confined(tool) for tool in super().make_tools(task)]


def _confined(tool: Tool) -> Tool:
    if isinstance(tool, SubprocessPythonTool):
        tool = tool.fork()
        tool.require_sandbox = True
    if not getattr(tool, "sandboxed", True):
        raise ConfigError(
            f"the {tool.name} tool would run what strangers have the model write, "
            "without a sandbox: install bubblewrap, take the embedded Python, or "
            "leave the tool out"
        )
    return tool


def _of_checkpoint(
    saved: Mapping[str, Any], weights: Weights, given: dict[str, Any]
) -> AgentSettings:
    """Settings of a checkpoint; those it was never to need come from the flags."""
    if saved["env_config"].get("tools") is not no_tools:
        _refuse_tool_flags(weights.source, given)
        return _settings(saved)
    dialogue = saved["env_config"].get("dialogue", DEFAULTS["dialogue"])
    if given.get("dialogue", dialogue) != dialogue:
        raise ConfigError(
            f"`dialogue` ({given['dialogue']!r}) is not that of {weights.source} "
            f"({dialogue!r}), with which the model was trained: leave it out"
        )
    model = str(saved["_model_config"]["model"])
    settings = _of_flags(model, {**given, "dialogue": dialogue})
    return replace(settings, dtype=_settings(saved).dtype)


def _of_flags(model: str, given: Mapping[str, Any]) -> AgentSettings:
    """An agent with the standard tools, as the flags say."""
    tools = {
        "corpus": None,
        **{name: DEFAULTS[name] for name in ("max_response_tokens", "max_tool_calls")},
        **{name: given[name] for name in ToolFlags.__annotations__ if name in given},
    }
    config = config_of_flags(
        data=None, model=model, num_env_runners=0, seed=0, **cast(Any, tools)
    )
    return _settings(vars(config))


def _settings(values: Mapping[str, Any]) -> AgentSettings:
    """From the attributes of an `ARPOConfig`."""
    _, creator = Algorithm._get_env_id_and_creator(values["env"], cast(Any, values))
    env = values["env"]
    return AgentSettings(
        # A name that is registered is known in this process only.
        env=creator if isinstance(env, str) else env,
        env_config=dict(values["env_config"]),
        sampling=SamplingParams(
            temperature=values["temperature"],
            top_p=values["top_p"],
            top_k=values["top_k"],
        ),
        dtype=str(values["_model_config"].get("dtype") or "float32"),
        engine=values["engine_name"],
        engine_kwargs=dict(values["engine_kwargs"]),
    )


def _with_flags(settings: AgentSettings, given: Mapping[str, Any]) -> AgentSettings:
    def chosen(*names: str) -> dict[str, Any]:
        return {name: given[name] for name in names if name in given}

    return replace(
        settings,
        sampling=replace(settings.sampling, **chosen("temperature", "top_p", "top_k")),
        **chosen("engine", "engine_kwargs", "dtype"),
    )


def _dtype_of(folder: Path) -> str:
    """What the weights of a Hugging Face folder were saved in, if we compute in it."""
    config = json.loads((folder / "config.json").read_text())
    dtype = str(config.get("dtype") or config.get("torch_dtype"))
    return dtype if dtype in DTYPES else "float32"


def _refuse_tool_flags(source: str, given: Mapping[str, Any]) -> None:
    useless = [name for name in ToolFlags.__annotations__ if name in given]
    if useless:
        raise ConfigError(
            f"{', '.join(useless)} cannot be chosen for {source}, which brings its own "
            "tools and limits: leave it out"
        )
