"""An agent as an MLflow model: it answers with its tools, by the torch engine.

    model = mlflow.pyfunc.load_model("models:/almanac@champion")
    model.predict({"messages": [{"role": "user", "content": "..."}]})
    -> [{"content": "...", "reasoning_content": "...", "finish_reason": "stop"}]

`mlflow models serve` speaks the same at /invocations. The agent's folder lies in the
model as it is; the code is that of the installed package.
"""

import asyncio
import os
import shutil
import tempfile
import threading
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from rllib_arpo.errors import DataError

if TYPE_CHECKING:
    from mlflow.models import ModelSignature

    from rllib_arpo.serving.openai_api import ChatCompletionRequest

INPUT_EXAMPLE = {"messages": [{"role": "user", "content": "Who are you?"}]}
OPTIONS = {"temperature": "double", "max_tokens": "long", "seed": "long"}
OUTPUTS = ("content", "reasoning_content", "finish_reason")
PACKAGES = ("rllib_arpo", "mlflow", "ray", "torch", "transformers")
_NAME = "agent"


def save_model(folder: str | Path, path: str | Path) -> Path:
    """Write an MLflow model that holds an agent's folder.

    Its files are hard links where the file system has them, and copies elsewhere: they
    are not to be changed.

    Args:
        folder: Hugging Face files, with `agent.pkl` if it is to answer with tools.
        path: made; must not be there.

    Returns:
        `path`.
    """
    from mlflow import pyfunc
    from mlflow.models import Model
    from mlflow.models.model import MLMODEL_FILE_NAME

    path = Path(path)
    model = Model()
    with tempfile.TemporaryDirectory() as scratch:
        # MLflow would copy the weights. The data's name is that of the folder.
        empty = Path(scratch) / _NAME
        empty.mkdir()
        pyfunc.save_model(
            str(path),
            loader_module=__name__,
            data_path=str(empty),
            mlflow_model=model,
            signature=signature(),
            input_example=INPUT_EXAMPLE,
            pip_requirements=[f"{name}=={version(name)}" for name in PACKAGES],
        )
    shutil.copytree(
        folder,
        path / "data" / _NAME,
        ignore=shutil.ignore_patterns("__pycache__"),
        copy_function=_link_or_copy,
        dirs_exist_ok=True,
    )
    files = (file for file in path.rglob("*") if file.is_file())
    model.model_size_bytes = sum(file.stat().st_size for file in files)
    model.save(str(path / MLMODEL_FILE_NAME))
    return path


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(os.path.realpath(source), target)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)


def signature() -> "ModelSignature":
    """Chat messages and options in, the parts of the answer out."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, Schema
    from mlflow.types.schema import Array, Object, Property

    message = Object([Property("role", "string"), Property("content", "string")])
    return ModelSignature(
        inputs=Schema(
            [
                ColSpec(Array(message), name="messages"),
                *(ColSpec(type_, name, False) for name, type_ in OPTIONS.items()),
            ]
        ),
        outputs=Schema([ColSpec("string", name, False) for name in OUTPUTS]),
    )


class AgentModel:
    """What MLflow asks: an agent with its engine, on an event loop of its own.

    Args:
        folder: of the agent.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = str(folder)
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._service = self._wait(self._start())

    def predict(self, model_input: Any, params: Any = None) -> list[dict[str, str]]:
        """Answer every row, side by side.

        Args:
            model_input: a table, a mapping, or a list of mappings, with the columns of
                `signature`.
            params: none is known.

        Raises:
            InvalidRequestError: a row cannot be answered; names the field.
        """
        return self._wait(self._answers([_request(row) for row in _rows(model_input)]))

    async def _start(self) -> Any:
        from rllib_arpo.agents import find_agent, serving_env
        from rllib_arpo.serving.agent import Agent
        from rllib_arpo.serving.engine_client import InProcessEngine
        from rllib_arpo.serving.engine_deployment import EngineSettings, open_engine
        from rllib_arpo.serving.service import ChatService

        found = find_agent(self._folder)
        env = serving_env(found.settings, found.tokenizer)
        engine = await open_engine(
            EngineSettings(dtype=found.settings.dtype), Path(self._folder)
        )
        agent = Agent(env=env, sampling=found.settings.sampling)
        return ChatService({_NAME: (agent, InProcessEngine(engine))})

    async def _answers(
        self, requests: list["ChatCompletionRequest"]
    ) -> list[dict[str, str]]:
        replies = await asyncio.gather(*map(self._service.complete, requests))
        return [_output(reply.model_dump()["choices"][0]) for reply in replies]

    def _wait(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


def _load_pyfunc(path: str) -> AgentModel:
    """What MLflow calls to load a model of this module."""
    return AgentModel(path)


def _rows(model_input: Any) -> list[dict[str, Any]]:
    """The rows of whatever MLflow gives, without the options that a row leaves open."""
    if isinstance(model_input, pd.DataFrame):
        model_input = model_input.to_dict("records")
    if isinstance(model_input, Mapping):
        model_input = [model_input]
    rows = [
        {name: value for name, value in row.items() if not _is_missing(value)}
        for row in model_input
    ]
    unknown = {name for row in rows for name in row} - {"messages", *OPTIONS}
    if unknown:
        raise DataError(
            f"unknown columns {sorted(unknown)}: give messages, {', '.join(OPTIONS)}"
        )
    return rows


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and value != value)


def _request(row: Mapping[str, Any]) -> "ChatCompletionRequest":
    from rllib_arpo.serving.openai_api import ChatCompletionRequest

    options = {name: row[name] for name in OPTIONS if name in row}
    for name in ("max_tokens", "seed"):
        if name in options:  # a column with gaps has become one of floats
            options[name] = int(options[name])
    messages = [dict(message) for message in row.get("messages", ())]
    return ChatCompletionRequest.model_validate(
        {"model": _NAME, "messages": messages, **options}
    )


def _output(choice: Mapping[str, Any]) -> dict[str, str]:
    message = choice["message"]
    return {
        "content": message["content"] or "",
        "reasoning_content": message.get("reasoning_content") or "",
        "finish_reason": choice["finish_reason"],
    }
