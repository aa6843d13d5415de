"""The command `rllib-arpo serve`: its flags; `cli_serving` does what they say."""

from pathlib import Path
from typing import Annotated

import typer

from rllib_arpo.cli_options import Cache, Corpus, Search, SearchEndpoint
from rllib_arpo.imports import from_extra
from rllib_arpo.serving.http_settings import MAX_IN_ALL


def serve(
    checkpoints: Annotated[
        list[str],
        typer.Argument(
            help="Run, checkpoint, Hugging Face folder or models:/NAME@ALIAS; several "
            "as NAME=CHECKPOINT.",
            metavar="CHECKPOINT",
        ),
    ],
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port.", min=1, max=65535)] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            help="Key that clients must show; repeatable. Other users of the machine "
            "see it: better set RLLIB_ARPO_API_KEYS, keys by commas.",
        ),
    ] = None,
    admin_key: Annotated[
        str | None,
        typer.Option(
            help="Key for POST /admin/reload; better set RLLIB_ARPO_ADMIN_KEY.",
        ),
    ] = None,
    engine: Annotated[
        str | None, typer.Option(help='"torch" or "vllm"; default: the checkpoint\'s.')
    ] = None,
    engine_kwargs: Annotated[
        str | None, typer.Option(help="Of the engine, as JSON.")
    ] = None,
    num_gpus: Annotated[float, typer.Option(help="Of each engine.", min=0.0)] = 0.0,
    engines: Annotated[int, typer.Option(help="Engines of a model.", min=1)] = 1,
    max_engines: Annotated[
        int | None, typer.Option(help="So many under load; default: --engines.", min=1)
    ] = None,
    agents: Annotated[int, typer.Option(help="HTTP servers.", min=1)] = 1,
    max_agents: Annotated[
        int | None, typer.Option(help="So many under load; default: --agents.", min=1)
    ] = None,
    upscale_delay_s: Annotated[
        float, typer.Option(help="Seconds of too much load until more.", min=0.0)
    ] = 30.0,
    downscale_delay_s: Annotated[
        float, typer.Option(help="Seconds of too little load until fewer.", min=0.0)
    ] = 600.0,
    max_request_s: Annotated[
        float, typer.Option(help="Seconds that an answer may take.", min=0.1)
    ] = 600.0,
    max_tokens: Annotated[
        int | None, typer.Option(help="Most tokens of an answer.", min=1)
    ] = None,
    max_body_bytes: Annotated[
        int, typer.Option(help="Longest body of a request.", min=1)
    ] = 1024 * 1024,
    max_messages: Annotated[
        int, typer.Option(help="Most messages of a conversation.", min=1)
    ] = 256,
    max_concurrent: Annotated[
        int, typer.Option(help="Answers to one key at once.", min=1)
    ] = 256,
    max_in_all: Annotated[
        int,
        typer.Option(help="Answers at once of an agent.", min=1, max=MAX_IN_ALL),
    ] = MAX_IN_ALL,
    corpus: Corpus = None,
    search: Search = None,
    search_endpoint: SearchEndpoint = None,
    browse: Annotated[
        bool | None, typer.Option("--browse", help="Let it open web pages.")
    ] = None,
    python: Annotated[
        str | None, typer.Option(help='"embedded", or "subprocess" in a sandbox.')
    ] = None,
    tool_cache: Cache = None,
    mlflow: Annotated[
        str | None,
        typer.Option(
            help='Trace answers in MLflow at this URI, questions and all; "default": '
            "MLFLOW_* or a file. Without it: MLFLOW_TRACKING_URI, if it is set."
        ),
    ] = None,
    trace_share: Annotated[
        float, typer.Option(help="Of the answers, to be traced.", min=0.0, max=1.0)
    ] = 1.0,
    dialogue: Annotated[
        str | None, typer.Option(help='"tags" or "chat_template".')
    ] = None,
    max_response_tokens: Annotated[int | None, typer.Option(min=1)] = None,
    max_tool_calls: Annotated[int | None, typer.Option(min=0)] = None,
    max_result_tokens: Annotated[int | None, typer.Option(min=1)] = None,
) -> None:
    """Serve agents: OpenAI's chat API, and a page to try them."""
    with from_extra("serve", what="`rllib-arpo serve`"):
        from rllib_arpo.cli_serving import serve_command, traced_store

    def text(path: Path | None) -> str | None:
        return None if path is None else str(path.absolute())

    serve_command(
        checkpoints,
        host=host,
        port=port,
        api_keys=tuple(api_key or ()),
        admin_key=admin_key,
        settings={
            "engine": engine,
            "engine_kwargs": engine_kwargs,
            "num_gpus": num_gpus,
            "min_engines": engines,
            "max_engines": max_engines or engines,
            "min_agents": agents,
            "max_agents": max_agents or agents,
            "max_request_s": max_request_s,
            "max_tokens": max_tokens,
            "max_body_bytes": max_body_bytes,
            "max_messages": max_messages,
            "max_concurrent": max_concurrent,
            "max_in_all": max_in_all,
            "upscale_delay_s": upscale_delay_s,
            "downscale_delay_s": downscale_delay_s,
            "corpus": text(corpus),
            "search": search,
            "search_endpoint": search_endpoint,
            "browse": browse,
            "python": python,
            "tool_cache": text(tool_cache),
            "dialogue": dialogue,
            "max_response_tokens": max_response_tokens,
            "max_tool_calls": max_tool_calls,
            "max_result_tokens": max_result_tokens,
            "mlflow": traced_store(mlflow, trace_share),
            "trace_share": trace_share,
        },
    )
