"""Small tools for tests: each behaves in one way."""

import asyncio
from collections.abc import Callable
from typing import Self

from rllib_arpo.errors import ToolError


class FakeTool:
    """Answers each call with the next of `behaviours`, the last one for ever."""

    description = "for tests"

    def __init__(self, *behaviours: str | Exception, name: str = "search") -> None:
        self.name = name
        self.behaviours = behaviours
        self.calls: list[str] = []

    async def call(self, arguments: str) -> str:
        self.calls.append(arguments)
        number = min(len(self.calls), len(self.behaviours)) - 1
        behaviour = self.behaviours[number]
        if isinstance(behaviour, Exception):
            raise behaviour
        return behaviour

    def fork(self) -> Self:
        return self


class HangingTool(FakeTool):
    """Waits for ever; `stubborn` ones swallow the cancellation, too."""

    def __init__(self, *, stubborn: bool = False) -> None:
        super().__init__("never")
        self.stubborn = stubborn
        self.release: Callable[[], None] = lambda: None

    async def call(self, arguments: str) -> str:
        self.calls.append(arguments)
        opened = asyncio.Event()
        self.release = opened.set
        while not opened.is_set():
            try:
                await opened.wait()
            except asyncio.CancelledError:
                if not self.stubborn:
                    raise
        raise ToolError("too late")
