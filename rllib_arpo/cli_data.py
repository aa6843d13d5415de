"""`rllib-arpo data`: what is in a file of rows, before anything is trained on it."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rllib_arpo.errors import ConfigError
from rllib_arpo.storage import check_output, write_output

if TYPE_CHECKING:
    from rich.table import Table

    from rllib_arpo.data.check import Kind, Report

MAX_NAMED = 20
MAX_SOURCES = 12
HEADINGS: "dict[Kind, str]" = {
    "bad_row": "rows that training refuses",
    "blank_answer": "blank answers",
    "unparsable_answer": "answers that the reward cannot parse",
    "duplicate": "duplicates of an earlier question",
    "overlap": "overlaps with a benchmark",
}

data_app = typer.Typer(
    no_args_is_help=True, help="Look at training data before it is trained on."
)


@data_app.callback()
def data() -> None:
    """Look at training data before it is trained on."""


@data_app.command()
def check(
    file: Annotated[str, typer.Argument(help="Path or URI of a file or folder.")],
    model: Annotated[
        str | None,
        typer.Option(help="Count prompts in tokens of this folder or hub name."),
    ] = None,
    benchmark: Annotated[
        list[str] | None,
        typer.Option(help="File whose questions must not be in it; may be repeated."),
    ] = None,
    column: Annotated[
        list[str] | None,
        typer.Option(help="question=problem, answer=..., and so on; repeated."),
    ] = None,
    ability: Annotated[str | None, typer.Option(help="Of all rows.")] = None,
    answers: Annotated[
        str, typer.Option(help='How they are written: "plain", "gsm8k" or "list".')
    ] = "plain",
    split: Annotated[str | None, typer.Option(help="Of a folder with several.")] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write everything found there.")
    ] = None,
) -> None:
    """Check every row; exit code 1 when some are bad."""
    from rich.console import Console

    from rllib_arpo.data.check import check_data
    from rllib_arpo.data.data_file import DataFile

    described: dict[str, Any] = {
        "path": file,
        "columns": _columns(column or []),
        "ability": ability,
        "answers": answers,
        "split": split,
    }
    if json_file is not None:
        check_output(json_file, flag="--json")
    console = Console(highlight=False)
    with console.status(f"Check {file}") as status:
        num_rows = 0

        def count(more: int) -> None:
            nonlocal num_rows
            num_rows += more
            status.update(f"Check {file}: {num_rows:,} rows")

        report = check_data(
            DataFile.of(described),
            model=model,
            benchmarks=[DataFile(one) for one in benchmark or []],
            on_rows=count,
        )
    if json_file is not None:
        write_output(json_file, json.dumps(report.as_json(), indent=2) + "\n")
    console.print(_table(report))
    for kind in HEADINGS:
        for line in _named(report, kind):
            console.print(line, markup=False, soft_wrap=True)
    if report.num_bad:
        raise typer.Exit(1)


def _columns(pairs: list[str]) -> dict[str, str]:
    columns: dict[str, str] = {}
    for pair in pairs:
        key, equals, name = pair.partition("=")
        if not equals or not name:
            raise ConfigError(f'--column {pair!r}: write it as "question=problem"')
        columns[key] = name
    return columns


def _table(report: "Report") -> "Table":
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(report.file))
    table.add_column("")
    table.add_column("rows", justify="right")
    table.add_row("all", f"{report.num_rows:,}")
    table.add_row("that become tasks", f"{report.num_tasks:,}", end_section=True)
    for title, counts in (
        ("source", report.by_source),
        ("ability", report.by_ability),
    ):
        for name, count in _largest(counts):
            table.add_row(escape(f"{title} {name}"), f"{count:,}")
        table.add_section()
    for kind, heading in HEADINGS.items():
        table.add_row(heading, f"{len(report.of_kind(kind)):,}")
    table.add_section()
    for name, length in report.prompt_lengths.items():
        table.add_row(f"{report.length_unit} of a prompt, {name}", f"{length:,.0f}")
    return table


def _largest(counts: dict[str, int]) -> list[tuple[str, int]]:
    """The largest, and the sum of the others."""
    largest = list(counts.items())
    rest = sum(count for _, count in largest[MAX_SOURCES:])
    others = [(f"(of {len(counts) - MAX_SOURCES} others)", rest)] if rest else []
    return largest[:MAX_SOURCES] + others


def _named(report: "Report", kind: "Kind") -> list[str]:
    """A line for each of the first findings, and one for the others."""
    found = report.of_kind(kind)
    if not found:
        return []
    lines = [f"\n{len(found):,} {HEADINGS[kind]}"]
    lines += [
        f"  {one.file}, row {one.row}: {one.problem}" for one in found[:MAX_NAMED]
    ]
    if len(found) > MAX_NAMED:
        lines.append(f"  ... and {len(found) - MAX_NAMED:,} more: --json FILE has all")
    return lines
