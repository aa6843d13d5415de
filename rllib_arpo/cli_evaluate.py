"""The command `rllib-arpo evaluate`: its flags; `cli_evaluation` does what they say."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from rllib_arpo.cli_options import (
    Browse,
    Cache,
    Corpus,
    DialogueName,
    EngineName,
    EnvRunners,
    PythonName,
    Search,
    SearchEndpoint,
    Seed,
    given_flags,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFlags:
    """What a Hugging Face folder does not say by itself, and a run does."""

    max_response_tokens: int | None
    max_tool_calls: int | None
    max_result_tokens: int | None
    corpus: Path | None
    search: str | None
    search_endpoint: str | None
    browse: bool
    python: str
    tool_cache: Path | None
    dialogue: str
    engine: str
    num_env_runners: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkFlags:
    """What only benchmarks take."""

    benchmark_dir: Path | None
    k: str
    seeds: int
    judge: str | None
    judge_url: str | None
    judge_key: str
    baseline: Path | None
    out: Path | None
    answers_at_once: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Flags:
    """The words of the command; None where the default depends on something."""

    checkpoint: Path
    data: str | None
    benchmark: str | None
    num_tasks: int | None
    num_samples: int | None
    seed: int
    temperature: float | None
    top_p: float | None
    json_file: Path | None
    of_model: ModelFlags
    of_benchmarks: BenchmarkFlags


def evaluate(
    context: typer.Context,
    checkpoint: Annotated[
        Path, typer.Argument(help="Run, checkpoint or Hugging Face folder.")
    ],
    data: Annotated[
        str | None, typer.Option(help="Tasks; default: the run's eval_tasks.")
    ] = None,
    benchmark: Annotated[
        str | None,
        typer.Option(
            help="Names by commas, as gsm8k,hotpotqa; NAME=FILE or "
            "NAME=OWNER/NAME[:CONFIG[:SPLIT]] says where it is."
        ),
    ] = None,
    benchmark_dir: Annotated[
        Path | None, typer.Option(help="Holds NAME.jsonl and so on; default: the Hub.")
    ] = None,
    num_tasks: Annotated[
        int | None, typer.Option(help="Only the first so many.", min=1)
    ] = None,
    k: Annotated[str, typer.Option(help="Of pass@k, by commas.")] = "1",
    num_samples: Annotated[
        int | None,
        typer.Option(help="Answers per task and seed; default: largest k.", min=1),
    ] = None,
    seed: Seed = 0,
    seeds: Annotated[
        int, typer.Option(help="Repetitions, each with its own seed.", min=1)
    ] = 1,
    temperature: Annotated[
        float | None, typer.Option(help="Default: 1; of benchmarks 0.6.", min=0.0)
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(help="Default: 1; of benchmarks 0.95.", min=0.01, max=1.0),
    ] = None,
    max_response_tokens: Annotated[
        int | None,
        typer.Option(help="Default: 1024; of benchmarks 4096 or 8192.", min=1),
    ] = None,
    max_tool_calls: Annotated[
        int | None, typer.Option(help="Default: 5; of benchmarks 3 or 6.", min=0)
    ] = None,
    max_result_tokens: Annotated[
        int | None,
        typer.Option(help="Default: 256; of benchmarks 1024 or 1536.", min=1),
    ] = None,
    corpus: Corpus = None,
    search: Search = None,
    search_endpoint: SearchEndpoint = None,
    browse: Browse = False,
    python: PythonName = "embedded",
    tool_cache: Cache = None,
    dialogue: DialogueName = "tags",
    engine: EngineName = "torch",
    num_env_runners: EnvRunners = 0,
    judge: Annotated[
        str | None, typer.Option(help="Model that judges what wants a judge.")
    ] = None,
    judge_url: Annotated[
        str | None, typer.Option(help="Its endpoint, ending in /v1; default: OpenAI's.")
    ] = None,
    judge_key: Annotated[
        str, typer.Option(help='Environment variable of its key; "" for none.')
    ] = "OPENAI_API_KEY",
    baseline: Annotated[
        Path | None,
        typer.Option(help="Checkpoint, or --out of its evaluation, to compare with."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of answers; default: in runs/evaluate.")
    ] = None,
    answers_at_once: Annotated[
        int, typer.Option(help="Under way; a killed run loses these.", min=1)
    ] = 256,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the figures there.")
    ] = None,
) -> None:
    """Answer tasks or benchmarks, and print what is right and what it cost."""
    from rllib_arpo.cli_evaluation import evaluate_command

    flags = Flags(
        checkpoint=checkpoint,
        data=data,
        benchmark=benchmark,
        num_tasks=num_tasks,
        num_samples=num_samples,
        seed=seed,
        temperature=temperature,
        top_p=top_p,
        json_file=json_file,
        of_model=ModelFlags(
            max_response_tokens=max_response_tokens,
            max_tool_calls=max_tool_calls,
            max_result_tokens=max_result_tokens,
            corpus=corpus,
            search=search,
            search_endpoint=search_endpoint,
            browse=browse,
            python=python,
            tool_cache=tool_cache,
            dialogue=dialogue,
            engine=engine,
            num_env_runners=num_env_runners,
        ),
        of_benchmarks=BenchmarkFlags(
            benchmark_dir=benchmark_dir,
            k=k,
            seeds=seeds,
            judge=judge,
            judge_url=judge_url,
            judge_key=judge_key,
            baseline=baseline,
            out=out,
            answers_at_once=answers_at_once,
        ),
    )
    evaluate_command(flags, given_flags(context))
