"""The almanac with a search that can be told to wait for ever."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from rllib_arpo.envs.almanac import AlmanacEnv
from rllib_arpo.tools.tool import Tool
from rllib_arpo.tree import Task

HOLD = "hold"


class HeldSearch:
    """Waits until it is cancelled, and leaves a file for each of both in `folder`."""

    name = "search"
    description = "for tests"

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    async def call(self, arguments: str) -> str:
        (self.folder / "started").touch()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            (self.folder / "cancelled").touch()
            raise
        return "never"

    def fork(self) -> Self:
        return self


class HeldEnv(AlmanacEnv):
    """With the metadata `hold`, a folder, search waits."""

    def make_tools(self, task: Task) -> Sequence[Tool]:
        tools = super().make_tools(task)
        folder = task.metadata.get(HOLD)
        return tools if folder is None else [HeldSearch(str(folder)), *tools[1:]]
