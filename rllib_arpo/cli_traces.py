"""`rllib-arpo sft` and `export-traces`: from traces to a model, and back to traces."""

from functools import partial
from pathlib import Path
from typing import cast, get_args

from rllib_arpo.cli_config import check_model, local_or_hub, no_tools, per_learner
from rllib_arpo.data.data_file import BadRowRule
from rllib_arpo.data.export_traces import export_traces
from rllib_arpo.data.traces import load_traces
from rllib_arpo.envs.tool_use_env import ToolUseEnv
from rllib_arpo.errors import ConfigError
from rllib_arpo.runs import Run
from rllib_arpo.sft import SFTConfig
from rllib_arpo.tools.python import PythonTool
from rllib_arpo.tools.search import SearchTool
from rllib_arpo.tools.tool import ToolSpec, text_parameter


def sft_config(
    model: str,
    data: Path,
    *,
    tools: tuple[str, ...],
    dialogue: str,
    max_result_tokens: int,
    max_tokens: int | None,
    on_bad_row: str,
    batch_size: int,
    lr: float,
    num_learners: int,
    seed: int,
) -> SFTConfig:
    """The cold start that the flags describe.

    Raises:
        ConfigError: a flag cannot work, or there is no such model.
    """
    if on_bad_row not in get_args(BadRowRule):
        raise ConfigError(
            f'--on-bad-row ("{on_bad_row}") must be one of {get_args(BadRowRule)}'
        )
    check_model(model)
    model = local_or_hub(model)
    specs = tuple(_spec(name) for name in tools)
    return (
        SFTConfig()
        .environment(
            env=ToolUseEnv,
            env_config={
                "tools": no_tools,
                "tool_specs": specs,
                "dialogue": dialogue,
                "max_result_tokens": max_result_tokens,
            },
            train_traces=partial(
                load_traces,
                str(data.absolute()),
                model,
                tools,
                dialogue=dialogue,
                tool_specs=specs,
                max_result_tokens=max_result_tokens,
                max_tokens=max_tokens,
                on_bad_row=cast(BadRowRule, on_bad_row),
            ),
        )
        .rl_module(model_config={"model": model})
        .training(
            lr=lr,
            train_batch_size_per_learner=per_learner(batch_size, num_learners),
            minibatch_size=per_learner(batch_size, num_learners),
        )
        .learners(num_learners=num_learners)
        .env_runners(num_env_runners=0)
        .debugging(seed=seed, log_level="ERROR")
    )


def export_traces_of_run(
    folder: Path, out: Path, *, min_reward: float, max_per_task: int | None
) -> str:
    """Write the good trajectories of a run's kept trees; what was found, in a line.

    Raises:
        ConfigError: the run kept no trees.
        CheckpointError: `out` cannot be written.
    """
    files = Run(folder, resume=True).tree_files() if folder.is_dir() else {}
    if not files:
        raise ConfigError(
            f"{folder} holds no trees: give the folder of a run, trained with "
            "--save-trees above 0"
        )
    # The newest weights come first, so that they fill a task's share.
    found = export_traces(
        reversed(files.values()), out, min_reward=min_reward, max_per_task=max_per_task
    )
    return (
        f"Wrote {found.num_written} traces of {found.num_tasks} tasks to {out}, from "
        f"{found.num_trajectories} trajectories of {found.num_trees} trees."
    )


def _spec(name: str) -> ToolSpec:
    """What a chat template says of a tool that the traces call."""
    for tool in (SearchTool, PythonTool):
        if tool.name == name:
            return ToolSpec(
                name=name, description=tool.description, parameters=tool.parameters
            )
    return ToolSpec(
        name=name,
        description=f"The {name} tool.",
        parameters=text_parameter("input", "What the tool is given."),
    )
