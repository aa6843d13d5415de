"""`rllib-arpo tune`: a sweep of a file, with a table at its end."""

from pathlib import Path
from typing import Annotated

import typer

from rllib_arpo.cli_options import MLflow


def tune(
    file: Annotated[
        Path,
        typer.Argument(help="Python: `tuner`, or `make_tuner(storage_path)`."),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the sweep.")] = Path("runs/tune"),
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the sweep in --out.")
    ] = False,
    mlflow: MLflow = None,
) -> None:
    """Sweep over settings with Ray Tune."""
    from rllib_arpo.cli_runs import started_ray
    from rllib_arpo.progress import Console
    from rllib_arpo.sweep_console import print_table
    from rllib_arpo.sweeps import run_sweep

    console = Console()
    with started_ray():
        table = run_sweep(file, out, resume=resume, mlflow=mlflow, console=console)
    print_table(console, table)
    console.say(f"Wrote {out / 'trials.csv'} and {out / 'best.json'}.")
    statuses = {row["status"] for row in table.rows}
    if "unfinished" in statuses:
        console.say(f"Stopped; go on with: rllib-arpo tune {file} --out {out} --resume")
        raise typer.Exit(130)
    if statuses == {"failed"}:
        raise typer.Exit(1)
