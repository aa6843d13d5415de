"""`rllib-arpo sft` and `export-traces`: flags; `cli_traces` does what they say."""

from pathlib import Path
from typing import Annotated

import typer

from rllib_arpo.cli_options import (
    BatchSize,
    DialogueName,
    Learners,
    MLflow,
    OnBadRow,
    Out,
    ResultTokens,
    Seed,
)
from rllib_arpo.envs.env_config import DEFAULTS


def sft(
    model: Annotated[str, typer.Argument(help="Hugging Face folder or hub name.")],
    data: Annotated[
        Path,
        typer.Option(help="Traces, .jsonl or .json: chats, ShareGPT's or Alpaca's."),
    ],
    iterations: Annotated[int, typer.Option(min=1)] = 100,
    out: Out = Path("runs/sft"),
    tools: Annotated[
        str, typer.Option(help="Names of the tools in the traces, by commas.")
    ] = "search,python",
    dialogue: DialogueName = "tags",
    max_result_tokens: ResultTokens = DEFAULTS["max_result_tokens"],
    max_tokens: Annotated[
        int | None, typer.Option(help="Longer traces are bad rows.", min=1)
    ] = None,
    on_bad_row: OnBadRow = "error",
    batch_size: BatchSize = 128,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 7e-6,
    num_learners: Learners = 0,
    seed: Seed = 0,
    mlflow: MLflow = None,
) -> None:
    """Cold start: imitate multi-turn tool traces."""
    from rllib_arpo.cli_runs import start_run
    from rllib_arpo.cli_traces import sft_config

    config = sft_config(
        model,
        data,
        tools=tuple(name.strip() for name in tools.split(",")),
        dialogue=dialogue,
        max_result_tokens=max_result_tokens,
        max_tokens=max_tokens,
        on_bad_row=on_bad_row,
        batch_size=batch_size,
        lr=lr,
        num_learners=num_learners,
        seed=seed,
    )
    start_run(config, out, iterations, mlflow=mlflow, data_files=(str(data),))


def export_traces(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    out: Annotated[Path, typer.Option(help="The .jsonl file to write.")] = Path(
        "traces.jsonl"
    ),
    min_reward: Annotated[
        float, typer.Option(help="Least reward of a trajectory.")
    ] = 1.0,
    max_per_task: Annotated[
        int | None, typer.Option(help="Most rows of one task; newest first.", min=1)
    ] = None,
) -> None:
    """Write a run's good trajectories as traces for `sft`: rejection sampling."""
    from rllib_arpo.cli_traces import export_traces_of_run

    typer.echo(
        export_traces_of_run(run, out, min_reward=min_reward, max_per_task=max_per_task)
    )
