import asyncio
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
from pyarrow.fs import LocalFileSystem
from ray import tune
from ray.rllib.env.env_context import EnvContext

from rllib_arpo.agent_weights import export_weights, find_weights
from rllib_arpo.agents import (
    AgentSettings,
    find_agent,
    load_agent,
    require_sandboxed,
    save_agent,
    serving_env,
)
from rllib_arpo.checkpoints import CHECKPOINTS
from rllib_arpo.cli_config import no_tools
from rllib_arpo.engines.engine import SamplingParams
from rllib_arpo.envs.almanac import AlmanacEnv
from rllib_arpo.envs.tool_use_env import ToolUseEnv
from rllib_arpo.errors import CheckpointError, ConfigError
from rllib_arpo.storage import CONTENTS_FILE, write_contents
from rllib_arpo.tools.python_subprocess import SubprocessPythonTool
from rllib_arpo.tools.standard import StandardTools
from rllib_arpo.tools.tool import Tool
from rllib_arpo.tracking.registry import register_model
from rllib_arpo.tree import Message, Task, Trajectory
from tests.synced import Disk
from tests.tiny_runs import ColdStart, arpo_config, running
from tests.tools.bubblewrap import needs_bubblewrap

REGISTERED_ENV = "almanac-under-a-name"
QUESTION = Task(
    task_id="typed", messages=(Message(role="user", content="Hi?"),), answers=()
)


def almanac_under_a_name(context: EnvContext) -> AlmanacEnv:
    return AlmanacEnv({**context, "max_tool_calls": 3})


@pytest.fixture(scope="module")
def trained(
    almanac_model: str, ray_session: None, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run with adapters, in bfloat16: checkpoint and, in another place, its model."""
    tune.register_env(REGISTERED_ENV, almanac_under_a_name)
    run = tmp_path_factory.mktemp("run")
    config = arpo_config(almanac_model)
    config.environment(env=REGISTERED_ENV).engine(temperature=0.75)
    config.rl_module(
        model_config={
            "model": almanac_model,
            "dtype": "bfloat16",
            "lora": {"r": 4, "lora_alpha": 64},
        }
    )
    with running(config) as algorithm:
        algorithm.train()
        algorithm.save_to_path(str(run / CHECKPOINTS / "iteration_000001"))
        algorithm.save_pretrained(run / "saved")
    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_exported_weights_are_what_the_algorithm_saves(
    cold_start: ColdStart, tmp_path: Path
) -> None:
    exported = export_weights(cold_start.checkpoint, tmp_path / "model")
    assert contents(exported) == contents(Path(cold_start.model))


def test_adapters_are_exported_merged_and_in_the_dtype(
    trained: Path, almanac_model: str, tmp_path: Path
) -> None:
    exported = export_weights(trained, tmp_path / "model")
    assert contents(exported) == contents(trained / "saved")
    weights = (exported / "model.safetensors").read_bytes()
    assert weights != Path(almanac_model, "model.safetensors").read_bytes()


def test_a_model_that_training_began_with_and_is_gone_is_named(
    cold_start: ColdStart, tmp_path: Path
) -> None:
    gone = str(tmp_path / "gone")
    checkpoint = changed(cold_start, tmp_path, {"_model_config": {"model": gone}})
    with pytest.raises(ConfigError, match=gone):
        export_weights(checkpoint, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_model_folder_takes_tools_and_limits_from_flags(almanac_model: str) -> None:
    found = find_agent(
        almanac_model, max_tool_calls=2, temperature=0.0, browse=True, corpus=None
    )
    assert (found.folder, found.is_checkpoint) == (Path(almanac_model), False)
    assert (found.name, found.tokenizer) == (Path(almanac_model).name, almanac_model)
    settings = found.settings
    assert settings.env is ToolUseEnv
    assert settings.env_config["tools"] == StandardTools(browse=True)
    assert settings.env_config["max_tool_calls"] == 2
    assert settings.env_config["max_response_tokens"] == 1024
    assert settings.sampling == SamplingParams(temperature=0.0)
    assert (settings.engine, settings.dtype) == ("torch", "float32")


def test_a_model_folder_is_computed_in_the_dtype_it_was_saved_in(trained: Path) -> None:
    saved = str(trained / "saved")
    assert find_agent(saved).settings.dtype == "bfloat16"
    assert find_agent(saved, dtype="float32").settings.dtype == "float32"


def test_a_run_brings_its_own_settings_and_newest_checkpoint(trained: Path) -> None:
    found = find_agent(str(trained), engine_kwargs={"max_num_seqs": 2})
    assert found.name == trained.name
    assert found.folder == trained / CHECKPOINTS / "iteration_000001"
    assert find_agent(found.source).version == found.version
    settings = found.settings
    assert settings.sampling == SamplingParams(temperature=0.75)
    assert settings.dtype == "bfloat16"
    assert settings.engine_kwargs == {"max_num_seqs": 2}
    assert settings.env_config["max_response_tokens"] == 48
    env = serving_env(settings, found.tokenizer)
    assert isinstance(env, AlmanacEnv)
    assert env.max_tool_calls == 3
    with pytest.raises(ConfigError, match=r"browse.*brings its own"):
        find_agent(str(trained), browse=True)


def test_a_run_without_checkpoints_is_its_model(
    almanac_model: str, tmp_path: Path
) -> None:
    shutil.copytree(almanac_model, tmp_path / "run" / "model")
    found = find_agent(str(tmp_path / "run"))
    assert (found.name, found.folder) == ("run", tmp_path / "run" / "model")


def test_a_cold_start_with_an_environment_keeps_it(cold_start: ColdStart) -> None:
    found = find_agent(cold_start.checkpoint)
    assert found.settings.env is AlmanacEnv
    assert found.is_checkpoint


def test_a_cold_start_on_traces_takes_tools_from_flags_but_keeps_its_dialogue(
    cold_start: ColdStart, tmp_path: Path
) -> None:
    dialogue = {"type": "tags", "require_think": False}
    checkpoint = changed(
        cold_start,
        tmp_path,
        {
            "env": ToolUseEnv,
            "env_config": {"tools": no_tools, "dialogue": dialogue},
        },
    )
    settings = find_agent(str(checkpoint), python="embedded").settings
    assert settings.env_config["tools"] == StandardTools()
    assert settings.env_config["dialogue"] == dialogue
    with pytest.raises(ConfigError, match="chat_template"):
        find_agent(str(checkpoint), dialogue="chat_template")


def test_what_is_no_source_is_refused(cold_start: ColdStart, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no folder"):
        find_agent(str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="holds no checkpoint"):
        find_agent(str(tmp_path))
    partial = shutil.copytree(cold_start.checkpoint, tmp_path / "partial")
    (partial / "algorithm_state.pkl").unlink()
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        find_agent(str(partial))


def test_a_version_follows_the_weights(
    almanac_model: str, cold_start: ColdStart, tmp_path: Path
) -> None:
    copy = shutil.copytree(almanac_model, tmp_path / "copy")
    assert find_weights(str(copy)).version == find_weights(almanac_model).version
    assert find_weights(cold_start.model).version != find_weights(str(copy)).version
    moved = shutil.copytree(cold_start.checkpoint, tmp_path / "moved")
    before = find_weights(str(moved)).version
    assert before == find_weights(cold_start.checkpoint).version
    (file,) = moved.glob("learner_group/learner/rl_module/default_policy/module_*")
    state = pickle.loads(file.read_bytes())
    file.write_bytes(pickle.dumps({name: array + 1 for name, array in state.items()}))
    write_contents_of(moved)
    assert find_weights(str(moved)).version != before


def test_settings_travel_beside_the_model_with_the_code_of_a_script(
    almanac_model: str, tmp_path: Path
) -> None:
    folder = shutil.copytree(almanac_model, tmp_path / "model")
    script = """
import sys
from rllib_arpo.agents import AgentSettings, save_agent
from rllib_arpo.envs.almanac import AlmanacEnv
class ScriptEnv(AlmanacEnv):
    greeting = "made in a script"
settings = AgentSettings(env=ScriptEnv, env_config={"max_tool_calls": 1})
save_agent(settings, sys.argv[1])
"""
    subprocess.run([sys.executable, "-c", script, str(folder)], check=True)
    found = find_agent(str(folder), top_k=5)
    assert found.settings.sampling.top_k == 5
    env: Any = serving_env(found.settings, found.tokenizer)
    assert (env.greeting, env.max_tool_calls) == ("made in a script", 1)
    with pytest.raises(ConfigError, match="brings its own"):
        find_agent(str(folder), max_tool_calls=9)


# MLflow and its SQLAlchemy warn of themselves.
@pytest.mark.filterwarnings("ignore")
def test_a_registered_model_is_found_by_its_alias_and_pinned_to_its_version(
    almanac_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/store.db")
    folder = shutil.copytree(almanac_model, tmp_path / "model")
    save_agent(AgentSettings(env=AlmanacEnv, env_config={"max_tool_calls": 4}), folder)
    register_model(folder, "almanac", alias="champion")
    found = find_agent("models:/almanac@champion")
    assert (found.name, found.version) == ("almanac", "almanac/1")
    assert found.settings.env_config == {"max_tool_calls": 4}
    register_model(folder, "almanac", alias="champion")
    assert find_agent("models:/almanac@champion").source == "models:/almanac/2"
    assert find_weights(found.source).version == "almanac/1"
    with pytest.raises(ConfigError, match="rival"):
        find_agent("models:/almanac@rival")


def test_a_file_that_holds_no_agent_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no agent\.pkl"):
        load_agent(tmp_path)
    file = save_agent(AgentSettings(env=AlmanacEnv), tmp_path)
    assert load_agent(tmp_path) == AgentSettings(env=AlmanacEnv)
    file.write_bytes(pickle.dumps("something else"))
    with pytest.raises(ConfigError, match="no settings of an agent"):
        load_agent(tmp_path)
    file.write_bytes(b"cut")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_agent(tmp_path)


def test_an_agent_is_on_the_disk_before_it_replaces_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(monkeypatch)
    file = save_agent(AgentSettings(env=AlmanacEnv), tmp_path)
    before = file.stat().st_ino
    with file.open("rb") as opened:
        save_agent(AgentSettings(env=StubbornEnv), tmp_path)
        assert pickle.load(opened) == AgentSettings(env=AlmanacEnv)
    assert disk.held(file, before=file)
    assert file.stat().st_ino != before
    assert load_agent(tmp_path) == AgentSettings(env=StubbornEnv)
    assert [entry.name for entry in tmp_path.iterdir()] == [file.name]


def failing_reward(trajectory: Trajectory) -> float:
    raise AssertionError("a question without an answer was rewarded")


class StubbornEnv(AlmanacEnv):
    """Sets its reward itself, whatever the config says."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        self.reward_fn = failing_reward


@pytest.mark.parametrize("env", [AlmanacEnv, StubbornEnv])
def test_no_reward_is_computed(env: type[AlmanacEnv], almanac_model: str) -> None:
    settings = AgentSettings(env=env, env_config={"reward_fn": failing_reward})
    made = serving_env(settings, almanac_model)
    made.reset(options={"task": QUESTION})
    end = np.array([made.tokenizer.eos_token_id], np.int32)
    _, reward, *_, info = asyncio.run(made.step_async(end))
    assert reward == 0
    assert info["trajectory"].task is QUESTION


def broken(context: EnvContext) -> ToolUseEnv:
    raise KeyError("corpus")


@pytest.mark.parametrize(
    ("env", "message"),
    [(broken, r"cannot be made: KeyError: 'corpus'"), (dict, "expected a ToolUseEnv")],
)
def test_an_environment_that_cannot_be_served_is_refused(
    env: Any, message: str, almanac_model: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        serving_env(AgentSettings(env=env), almanac_model)


class Shell:
    """Runs commands as the server's user."""

    name = "search"
    description = "Runs a command."
    sandboxed = False

    async def call(self, arguments: str) -> str:
        return arguments

    def fork(self) -> Self:
        return self


def shell_for_some(task: Task) -> Sequence[Tool]:
    return [Shell()] if task.metadata["shell"] == "yes" else []


def with_tools(tools: Any, model: str) -> ToolUseEnv:
    settings = AgentSettings(env=ToolUseEnv, env_config={"tools": tools})
    return serving_env(settings, model)


@pytest.mark.parametrize("tools", [[Shell()], lambda task: [Shell()]])
def test_a_tool_that_says_it_has_no_sandbox_is_refused(
    tools: Any, almanac_model: str
) -> None:
    with pytest.raises(ConfigError, match="search tool would run"):
        require_sandboxed(with_tools(tools, almanac_model))


def test_tools_that_depend_on_the_question_are_checked_with_each(
    almanac_model: str,
) -> None:
    env = with_tools(shell_for_some, almanac_model)
    require_sandboxed(env)
    fork = env.fork()
    harmless, harmful = [
        Task(task_id=answer, messages=(), answers=(), metadata={"shell": answer})
        for answer in ("no", "yes")
    ]
    fork.reset(options={"task": harmless})
    with pytest.raises(ConfigError, match="search tool would run"):
        fork.reset(options={"task": harmful})


@pytest.mark.parametrize("tools", [StandardTools(), StandardTools(python="subprocess")])
@needs_bubblewrap
def test_python_is_served_in_its_sandbox(
    tools: StandardTools, almanac_model: str
) -> None:
    env = with_tools(tools, almanac_model)
    require_sandboxed(env)
    env.reset(options={"task": QUESTION})
    python = env._tools["python"]
    if isinstance(python, SubprocessPythonTool):
        assert python.require_sandbox
    assert asyncio.run(python.call("print(6 * 7)")) == "42"


def test_without_bubblewrap_the_subprocess_python_is_refused(
    almanac_model: str,
) -> None:
    script = """
import sys
from rllib_arpo.agents import AgentSettings, require_sandboxed, serving_env
from rllib_arpo.envs.tool_use_env import ToolUseEnv
from rllib_arpo.errors import ConfigError
from rllib_arpo.tools.python_subprocess import SubprocessPythonTool
from rllib_arpo.tools.standard import StandardTools
for tools in ([SubprocessPythonTool()], StandardTools(python="subprocess")):
    settings = AgentSettings(env=ToolUseEnv, env_config={"tools": tools})
    try:
        require_sandboxed(serving_env(settings, sys.argv[1]))
    except ConfigError as error:
        print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, almanac_model],
        env=os.environ | {"PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.count("python tool would run") == 2


def changed(cold_start: ColdStart, folder: Path, settings: Mapping[str, Any]) -> Path:
    """A copy of the checkpoint whose algorithm had other settings."""
    checkpoint = shutil.copytree(cold_start.checkpoint, folder / "checkpoint")
    file = checkpoint / "class_and_ctor_args.pkl"
    saved = pickle.loads(file.read_bytes())
    saved["ctor_args_and_kwargs"][0][0].update(settings)
    file.write_bytes(pickle.dumps(saved))
    write_contents_of(checkpoint)
    return checkpoint


def write_contents_of(checkpoint: Path) -> None:
    (checkpoint / CONTENTS_FILE).unlink()
    write_contents(str(checkpoint), LocalFileSystem())
