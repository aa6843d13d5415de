"""One call for all who ask for the same at the same time in one event loop.

The call runs in a task of its own, so that a caller who is cancelled leaves it to the
others; it is cancelled with the last of them.
"""

import asyncio
from collections.abc import Callable, Coroutine, Hashable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class SharedCalls(Generic[T]):
    """The calls under way, of any number of event loops."""

    def __init__(self) -> None:
        self._calls: dict[tuple[asyncio.AbstractEventLoop, Hashable], _Call[T]] = {}

    async def join(
        self, key: Hashable, start: Callable[[], Coroutine[Any, Any, T]]
    ) -> tuple[T, bool]:
        """The result of the call under way, or of a new one.

        Args:
            key: equal for equal calls.
            start: makes the call when none is under way.

        Returns:
            The result, and whether another caller's call gave it.
        """
        place = (asyncio.get_running_loop(), key)
        call = self._calls.get(place)
        joined = call is not None
        if call is None:
            call = self._calls[place] = _Call(asyncio.create_task(start()))
            call.task.add_done_callback(lambda _: self._ended(place, call))
        call.waiting += 1
        try:
            return await asyncio.shield(call.task), joined
        finally:
            call.waiting -= 1
            if not call.waiting:
                self._forget(place, call)
                call.task.cancel()

    def _ended(
        self, place: tuple[asyncio.AbstractEventLoop, Hashable], call: "_Call[T]"
    ) -> None:
        self._forget(place, call)
        if not call.task.cancelled():
            call.task.exception()  # or asyncio reports it as lost if nobody waits

    def _forget(
        self, place: tuple[asyncio.AbstractEventLoop, Hashable], call: "_Call[T]"
    ) -> None:
        """Take a call from the list, unless its place was taken already."""
        if self._calls.get(place) is call:
            del self._calls[place]


@dataclass(slots=True)
class _Call(Generic[T]):
    task: "asyncio.Task[T]"
    waiting: int = 0
