"""Agents whose model is a script: real tokenizers and dialogues, given turns."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any, Literal

import numpy as np

from rllib_arpo.engines.engine import GenerationRequest
from rllib_arpo.engines.scripted_engine import ScriptedEngine, ScriptedReply
from rllib_arpo.envs.tool_use_env import ToolUseEnv
from rllib_arpo.serving.agent import Agent, AnswerLimits
from rllib_arpo.serving.engine_client import (
    EngineChunk,
    EngineLostError,
    InProcessEngine,
)
from rllib_arpo.serving.openai_api import ChatCompletionRequest
from rllib_arpo.serving.service import ChatService
from rllib_arpo.tree import Trajectory
from tests.envs.fake_tools import FakeTool
from tests.tokenizers import qwen3_with_tools, qwen_like

TAGS = qwen_like()
CHAT = qwen3_with_tools()
Kind = Literal["tags", "chat_template"]
KINDS: tuple[Kind, ...] = ("tags", "chat_template")
USER = {"role": "user", "content": "How high is vifel?"}


def no_reward(trajectory: Trajectory) -> float:
    return 0.0


def make_env(
    *tools: Any, dialogue: Any = "tags", tokenizer: Any = None, **config: Any
) -> ToolUseEnv:
    kind = dialogue.get("type", "tags") if isinstance(dialogue, dict) else dialogue
    default = TAGS if kind == "tags" else CHAT
    return ToolUseEnv(
        {
            "tokenizer": tokenizer or default,
            "tools": tools or (FakeTool("vifel 44"),),
            "dialogue": dialogue,
            "reward_fn": no_reward,
            "tool_retry_delay_s": 0.0,
        }
        | config
    )


def call(kind: Kind, query: str, thought: str = "t") -> str:
    """A turn that calls the search tool."""
    if kind == "tags":
        return f"<think>{thought}</think><search> {query} </search>"
    return (
        f"<think>\n{thought}\n</think>\n\n<tool_call>\n"
        f'{{"name": "search", "arguments": {{"input": "{query}"}}}}\n</tool_call>'
    )


def final(kind: Kind, text: str, thought: str = "t") -> str:
    """A turn that answers."""
    if kind == "tags":
        return f"<think>{thought}</think><answer> \\boxed{{{text}}} </answer>"
    return f"<think>\n{thought}\n</think>\n\n\\boxed{{{text}}}"


def replies(env: ToolUseEnv, turns: Sequence[str]) -> list[ScriptedReply]:
    """Turns as the engine gives them: ids up to what ends them."""
    return [
        ScriptedReply(token_ids=env.dialogue.model_ids(text).tolist(), entropies=0.5)
        for text in turns
    ]


class ByPlace:
    """Turns by their place in the answer, so that several answers can be in flight.

    The place is how many turns the model has written behind the prompt.
    """

    def __init__(self, env: ToolUseEnv, turns: Sequence[str]) -> None:
        self._replies = replies(env, turns)

    def __call__(self, request: GenerationRequest) -> ScriptedReply:
        return self._replies[int(request.request_id.split("/")[2])]


def service(
    env: ToolUseEnv, turns: Sequence[str], **agent: Any
) -> tuple[ChatService, ScriptedEngine]:
    """A service with one model, `m`, that writes these turns."""
    engine = ScriptedEngine(ByPlace(env, turns))
    limits = agent.pop("limits", AnswerLimits())
    made = Agent(env=env, limits=limits, **agent)
    return ChatService({"m": (made, InProcessEngine(engine))}), engine


def request(*messages: Any, **fields: Any) -> ChatCompletionRequest:
    body = {"model": "m", "messages": list(messages) or [USER], "seed": 1, **fields}
    return ChatCompletionRequest.model_validate(body)


class Unreliable:
    """An engine that is lost again and again.

    Args:
        engine: the one behind it.
        failures: for each attempt, after how many chunks it is lost; attempts beyond
            go well.
        versions: of the weights, for each attempt; the last goes on.
    """

    def __init__(
        self,
        engine: ScriptedEngine,
        failures: Sequence[int] = (),
        versions: Sequence[str] = ("v1",),
    ) -> None:
        self._engine = engine
        self._failures = list(failures)
        self._versions = list(versions)
        self.requests: list[GenerationRequest] = []
        self.asked_versions: list[str | None] = []

    async def generate(
        self, request: GenerationRequest, *, version: str | None = None
    ) -> AsyncIterator[EngineChunk]:
        self.requests.append(request)
        self.asked_versions.append(version)
        attempt = len(self.requests) - 1
        written_by = self._versions[min(attempt, len(self._versions) - 1)]
        left = self._failures[attempt] if attempt < len(self._failures) else np.inf
        async for tokens in self._engine.generate(request):
            if left == 0:
                raise EngineLostError("the replica is gone")
            left -= 1
            yield EngineChunk(version=written_by, tokens=tokens)


class SlowTool:
    """A tool that runs until it is stopped."""

    name = "search"
    description = "Never comes back."

    def __init__(self) -> None:
        self.started = asyncio.Event()
        self.cancelled = asyncio.Event()

    async def call(self, arguments: str) -> str:
        self.started.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        raise AssertionError

    def fork(self) -> "SlowTool":
        return self
