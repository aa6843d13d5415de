"""Peak memory of a program with all its worker processes."""

import threading
from types import TracebackType
from typing import Self

import psutil


class PeakMemory:
    """Samples the memory of this process and its descendants while it is open.

    Pages that processes share are counted once (PSS), so the sum is what the machine
    has to give.

    Attributes:
        peak_mb: highest sample so far, in MB (10⁶ bytes).
    """

    def __init__(self, interval_s: float = 1.0) -> None:
        self.peak_mb = 0.0
        self._interval_s = interval_s
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        me = psutil.Process()
        while True:
            self.peak_mb = max(self.peak_mb, _tree_mb(me))
            if self._done.wait(self._interval_s):
                return


def _tree_mb(root: psutil.Process) -> float:
    total = 0
    for process in (root, *root.children(recursive=True)):
        try:
            memory = process.memory_full_info()
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue  # it ended between the listing and the look
        total += getattr(memory, "pss", memory.uss)
    return total / 1e6
