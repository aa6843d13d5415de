"""Requests to a service at an even pace, for all threads and event loops of a process.

A turn is reserved, not waited for under a lock: who gives up its turn delays the others
by one interval at most.
"""

import asyncio
import threading
import time
from functools import cache


class Pace:
    """Spaces the requests to one service; for all threads and loops of a process.

    Args:
        max_per_s: requests a second; None: no limit.
    """

    def __init__(self, max_per_s: float | None) -> None:
        self._interval_s = 0.0 if max_per_s is None else 1 / max_per_s
        self._next_s = 0.0
        self._lock = threading.Lock()

    def reserve(self, now_s: float) -> float:
        """Take the next turn; in how many seconds it is."""
        with self._lock:
            turn_s = max(now_s, self._next_s)
            self._next_s = turn_s + self._interval_s
        return turn_s - now_s

    def pause(self, seconds: float) -> None:
        """Give no turn for so long."""
        with self._lock:
            self._next_s = max(self._next_s, time.monotonic() + seconds)

    async def turn(self) -> None:
        """Wait for the next turn."""
        await asyncio.sleep(self.reserve(time.monotonic()))


@cache
def pace_of(endpoint: str, max_per_s: float | None) -> Pace:
    """The one of a service in this process."""
    return Pace(max_per_s)
