"""`rllib-arpo view`: the trees of a run as pages."""

from pathlib import Path
from typing import Annotated

import typer


def view(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    iteration: Annotated[
        int | None, typer.Option(help="Only this one; all by default.")
    ] = None,
    compare: Annotated[
        Path | None, typer.Option(help="Another run, shown beside it by task.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the pages; RUN/views by default.")
    ] = None,
) -> None:
    """Write the rollout trees of a run as self-contained HTML pages."""
    from rllib_arpo.tracking.viewer import write_view

    for file in write_view(run, iteration, compare=compare, out=out):
        typer.echo(str(file))
