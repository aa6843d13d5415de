"""An agent that always searches once and then answers, and a search that a test holds.

listener = socket.create_server(("127.0.0.1", 0))
... a client asks with `held_by(listener)` ...
call = Call.next(listener)      the search of one answer is at work, and waits
call.end()                      it gives what it found
"""

import asyncio
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch

from rllib_arpo.agents import AgentSettings, save_agent
from rllib_arpo.envs.tool_use_env import ToolUseEnv
from rllib_arpo.tools.tool import Tool
from rllib_arpo.tree import Task
from tests.models import tiny_model
from tests.serving.scripted_agents import no_reward
from tests.serving.served import PATIENCE_S
from tests.tokenizers import qwen_like

SEARCH = "<search> vifel </search>"
ANSWER = "<answer> \\boxed{44} </answer>"
FOUND = "vifel 44"
PORT = "port"
# Far above all others.
LOGIT = 40.0


class HeldSearch:
    """Connects to the test's listener, tells its process, and waits for its end."""

    name = "search"
    description = "for tests"

    def __init__(self, port: str | None) -> None:
        self.port = port

    async def call(self, arguments: str) -> str:
        if self.port is not None:
            reader, writer = await asyncio.open_connection("127.0.0.1", int(self.port))
            try:
                writer.write(f"{os.getpid()}\n".encode())
                await reader.read()
            finally:
                writer.close()
        return FOUND

    def fork(self) -> Self:
        return self


class CallingEnv(ToolUseEnv):
    """With the metadata `port`, the search waits for whoever listens there."""

    def make_tools(self, task: Task) -> Sequence[Tool]:
        return [HeldSearch(task.metadata.get(PORT))]


@dataclass(frozen=True)
class Call:
    """A search that waits.

    Attributes:
        connection: to it.
        pid: of the agent replica that it is in.
    """

    connection: socket.socket
    pid: int

    @classmethod
    def next(cls, listener: socket.socket) -> Self:
        """Wait for one."""
        listener.settimeout(PATIENCE_S)
        connection, _ = listener.accept()
        connection.settimeout(PATIENCE_S)
        with connection.makefile("r") as lines:
            return cls(connection, int(lines.readline()))

    def end(self) -> None:
        self.connection.close()

    def is_given_up(self) -> bool:
        """Wait until the search itself ends; raises if it does not."""
        with self.connection:
            return self.connection.recv(1) == b""


def held_by(listener: socket.socket) -> dict[str, str]:
    """Metadata of a request."""
    return {PORT: str(listener.getsockname()[1])}


def make_calling_agent(folder: Path) -> Path:
    """A folder with the model and its agent.

    The model sees only the last token: after the end of a tool's result it answers,
    after any other it searches.
    """
    tokenizer = qwen_like()
    tokenizer.add_tokens([SEARCH, ANSWER])
    search, answer = tokenizer.convert_tokens_to_ids([SEARCH, ANSWER])
    settings = AgentSettings(
        env=CallingEnv,
        env_config={
            "tool_names": ["search"],
            "dialogue": {
                "type": "tags",
                "require_think": False,
                "result_template": "<result>{}</result>",
            },
            "reward_fn": no_reward,
            "tool_timeout_s": 600.0,
        },
    )
    env = CallingEnv({"tokenizer": tokenizer, **settings.env_config})
    result_end = env.dialogue.result_ids(FOUND, env.max_result_tokens).ids[-1]
    model: Any = tiny_model(
        vocab_size=len(tokenizer),
        hidden_size=64,
        tied=False,
        max_positions=4096,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.model.norm.weight.fill_(1.0)
        embedding, head = model.get_input_embeddings().weight, model.lm_head.weight
        # The last norm makes a unit vector of d dimensions √d long.
        size = embedding.shape[1] ** 0.5
        embedding[:, 0] = 1.0
        embedding[result_end, 0], embedding[result_end, 1] = 0.0, 1.0
        head[search, 0] = head[answer, 1] = LOGIT / size
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save_agent(settings, folder)
    return folder
