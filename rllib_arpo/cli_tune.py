"""`rllib-arpo tune`: a sweep of a file, with a table at its end."""

from pathlib import Path
from typing import Annotated

import typer


def tune(
    file: Annotated[
        Path,
        typer.Argument(help="Python: `tuner`, or `make_tuner(storage_path)`."),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the sweep.")] = Path("runs/tune"),
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the sweep in --out.")
    ] = False,
) -> None:
    """Sweep over settings with Ray Tune."""
    from rllib_arpo.cli_runs import started_ray
    from rllib_arpo.sweeps import run_sweep

    with started_ray():
        rows = run_sweep(file, out, resume=resume)
    for number, row in enumerate(rows, start=1):
        cells = (f"{key}={value}" for key, value in row.items() if value != "")
        typer.echo(f"{number}. " + "  ".join(cells))
    typer.echo(f"Wrote {out / 'trials.csv'} and {out / 'best.json'}")
