"""`rllib-arpo plot`: learning curves of runs, and of settings side by side."""

from pathlib import Path
from typing import Annotated

import typer


def plot(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs.")],
    out: Annotated[
        Path | None,
        typer.Option(
            help="The .png to write, an .svg goes beside it; by default "
            "RUN/curves.png, or comparison.png for several runs."
        ),
    ] = None,
    names: Annotated[
        str,
        typer.Option(
            help="A name per run, with commas between; runs of the same name are seeds "
            "of one setting."
        ),
    ] = "",
) -> None:
    """Draw a run's learning curves, or compare runs."""
    from rllib_arpo.tracking.comparison import plot

    given = [name.strip() for name in names.split(",")] if names else []
    typer.echo(f"Wrote {plot(runs, names=given, out=out)}")
