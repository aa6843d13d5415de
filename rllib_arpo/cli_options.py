"""The options that commands share, and what is refused of them."""

from collections.abc import Collection
from pathlib import Path
from typing import Annotated

import typer

from rllib_arpo.errors import ConfigError

EnvRunners = Annotated[
    int, typer.Option(help="Sampling actors; 0: in this process.", min=0)
]
Learners = Annotated[
    int, typer.Option(help="Learner actors; 0: in this process.", min=0)
]
EngineName = Annotated[str, typer.Option(help='What samples: "torch" or "vllm".')]
Seed = Annotated[int, typer.Option(help="Seed of tasks, sampling and learner.")]
Out = Annotated[Path, typer.Option(help="Folder of the run.")]
Corpus = Annotated[
    Path | None, typer.Option(help="Folder of documents for the search tool.")
]
Search = Annotated[
    str | None,
    typer.Option(
        help='"bm25" or "dense" over --corpus; or a service: "serper", "brave", '
        '"bing", "searxng", "retrieval".'
    ),
]
SearchEndpoint = Annotated[
    str | None,
    typer.Option(help="Address of the service; of bing, searxng, retrieval."),
]
Browse = Annotated[bool, typer.Option("--browse", help="Let it open web pages.")]
PythonName = Annotated[
    str, typer.Option(help='"embedded", or "subprocess" with numpy, sympy, scipy.')
]
Cache = Annotated[
    Path | None, typer.Option(help="File that keeps what services and pages answered.")
]
OnBadRow = Annotated[
    str, typer.Option(help='"error" refuses the file, "skip" leaves rows out.')
]
DialogueName = Annotated[
    str, typer.Option(help='"tags" of the paper, or the model\'s "chat_template".')
]
ResultTokens = Annotated[int, typer.Option(help="Most tokens of a tool result.", min=1)]
BatchSize = Annotated[int, typer.Option(help="Trees per iteration.", min=1)]
MaxTokens = Annotated[
    int, typer.Option(help="Tokens of model and tools after the prompt.", min=1)
]
MLflow = Annotated[
    str | None,
    typer.Option(help='Track in MLflow at this URI; "default": MLFLOW_* or a file.'),
]


def given_flags(context: typer.Context) -> list[str]:
    """Names of the parameters that stand on the command line."""
    sources = {
        str(parameter.name): context.get_parameter_source(str(parameter.name))
        for parameter in context.command.params
    }
    return [n for n, s in sources.items() if s is not None and s.name == "COMMANDLINE"]


def refuse(given: Collection[str], names: Collection[str], source: str) -> None:
    """Refuse flags that would have no effect beside `source`.

    Args:
        given: those on the command line.
        names: those without effect.
        source: what makes them so.

    Raises:
        ConfigError: one of `names` is given.
    """
    for name in given:
        if name in names:
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{flag} has no effect with {source}: leave it out")


def refuse_all_but(context: typer.Context, source: str, *allowed: str) -> None:
    """Refuse all flags but `allowed`, which alone have an effect beside `source`.

    Raises:
        ConfigError: another is given.
    """
    given = given_flags(context)
    refuse(given, [name for name in given if name not in allowed], source)
