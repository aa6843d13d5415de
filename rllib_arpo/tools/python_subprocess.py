"""The Python tool for code that needs numpy, sympy or scipy: CPython in a sandbox.

A pool of warm workers, each in bubblewrap with the packages imported; a call is a
fork of one (`python_worker`), so calls share nothing and a worker outlives whatever
the code does. The variables of a trajectory are a pickle that this process never
reads, so `fork` copies a reference and any worker can serve any path.

1. Results, errors and variables are as those of `PythonTool`: a call that raises
   keeps what ran before it, one that hits a limit leaves the variables as they were.
2. Variables that cannot be pickled (generators, open files) are dropped after the
   call, and the result names them. Files live for one call.
3. A call that is cancelled is killed in its worker. A worker that dies is replaced;
   when none starts, calls fail at once for a while instead of trying again.
4. The released code runs code as the trainer's user, with its network and its keys.
"""

import asyncio
import atexit
import copy
import os
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Self

from rllib_arpo.errors import ConfigError, ToolError, ToolTimeoutError
from rllib_arpo.tools.python_process import (
    Ending,
    WorkerProcess,
    WorkerStartError,
)
from rllib_arpo.tools.python_sandbox import HOW_TO_SANDBOX, sandbox_problem
from rllib_arpo.tools.python_worker.messages import CallSettings
from rllib_arpo.tools.tool import text_parameter

MAX_WORKERS = 8
MAX_PAUSE_S = 60.0  # between attempts to start a worker where none starts


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxLimits:
    """What one call may use. It is one process with one thread whatever these say.

    Attributes:
        time_s: seconds of wall clock; processor time is capped just above it.
        memory_mb: megabytes of address space beyond the imported packages'.
        output_bytes: printed text; far more than any result's token cap.
        file_mb: megabytes of one file. All files together have 64 MB in the sandbox.
        state_mb: megabytes of pickled variables kept for the next call.
    """

    time_s: float = 10.0
    memory_mb: int = 512
    output_bytes: int = 65536
    file_mb: int = 16
    state_mb: int = 16


class SubprocessPythonTool:
    """Runs Python with numpy, sympy and scipy, and keeps variables for the next call.

    Prints are returned, and the value of the last expression as a notebook shows it.

    Args:
        limits: of each call.
        seed: of `random` and `numpy.random`, so that the same calls give the same
            result. Generators that numpy seeds from the system do not follow it.
        max_workers: calls at the same time, in this process; None takes one a core,
            at most `MAX_WORKERS`. A worker holds about 150 MB.
        require_sandbox: refuse to run without bubblewrap. By default the workers
            then have rlimits only, which does not protect files: see
            `python_sandbox`.

    Raises:
        ConfigError: a limit is not above 0, or `require_sandbox` cannot be met.
    """

    name = "python"
    description = (
        "Runs Python code and returns what it prints and the value of its last line. "
        "Variables are kept, files are not. numpy, sympy and scipy are installed."
    )
    parameters = text_parameter("code", "Python source code.")

    def __init__(
        self,
        *,
        limits: SandboxLimits = SandboxLimits(),
        seed: int = 0,
        max_workers: int | None = None,
        require_sandbox: bool = False,
    ) -> None:
        for name, value in [*asdict(limits).items(), ("max_workers", max_workers)]:
            if value is not None and value <= 0:
                raise ConfigError(f"`{name}` ({value}) must be above 0")
        self.limits = limits
        self.seed = seed
        self.max_workers = max_workers
        self.require_sandbox = require_sandbox
        self._state = b""
        if require_sandbox:
            _require_sandbox()

    @property
    def sandboxed(self) -> bool:
        """Whether bubblewrap confines the code; tried once a process, in a second."""
        return sandbox_problem() is None

    async def call(self, arguments: str) -> str:
        """Run code in a worker; the event loop goes on meanwhile.

        Raises:
            ConfigError: there is no sandbox in this process, and one is required.
            ToolError: the code raised, did not parse or hit a limit; its last
                traceback line. Retryable when no worker could run it.
            ToolTimeoutError: it ran longer than `limits.time_s`.
        """
        pool = _pool(self.max_workers)
        if pool.pid != os.getpid():
            raise ToolError(
                "Python is not available in a process forked from one that used it; "
                "start processes by spawn"
            )
        call = _Call(arguments, self._state, self.limits, self.seed)
        loop = asyncio.get_running_loop()
        try:
            ending = await loop.run_in_executor(
                pool.threads, pool.run, call, self.require_sandbox
            )
        except asyncio.CancelledError:
            call.cancel()
            raise
        # Set here and not in the worker's thread: a call that was given up on must
        # not change the variables later.
        if ending.state is not None:
            self._state = ending.state
        return _result(ending, self.limits)

    def fork(self) -> Self:
        """A copy with its own variables, for the price of a reference."""
        return copy.copy(self)  # no attribute is ever changed in place


class _Call:
    """One call on its way through the pool, which may be cancelled at any point."""

    def __init__(
        self, code: str, state: bytes, limits: SandboxLimits, seed: int
    ) -> None:
        self.code = code.encode(errors="replace")
        self.state = state
        self.settings = CallSettings(seed=seed, **asdict(limits))
        self._lock = threading.Lock()
        self._cancelled = False
        self._worker: WorkerProcess | None = None

    def run_in(self, worker: WorkerProcess) -> Ending:
        worker.start(self.settings, self.state, self.code)
        with self._lock:
            self._worker = worker
            if self._cancelled:
                worker.cancel()
        try:
            return worker.wait(self.settings)
        finally:
            with self._lock:
                self._worker = None

    def cancel(self) -> None:
        with self._lock:
            self._cancelled = True
            if self._worker is not None:
                self._worker.cancel()


class _Pool:
    """The idle workers of this process, and as many threads to wait for them.

    Its threads start the workers and must outlive them: the kernel kills a worker
    when the thread that started it ends.
    """

    def __init__(self, size: int) -> None:
        self.pid = os.getpid()
        self.threads = ThreadPoolExecutor(size, thread_name_prefix="python-tool")
        self._lock = threading.Lock()
        self._idle: deque[WorkerProcess] = deque()
        self._breaker = _Breaker()

    def run(self, call: _Call, require_sandbox: bool) -> Ending:
        """Run a call in an idle worker, or in a new one; blocks."""
        if require_sandbox:
            _require_sandbox()
        worker = self._take()
        try:
            ending = call.run_in(worker)
        except TimeoutError as error:
            worker.close()
            raise _out_of_time(call.settings["time_s"]) from error
        except (OSError, EOFError, ValueError) as error:
            worker.close()
            raise ToolError("the interpreter crashed", retryable=True) from error
        with self._lock:
            self._idle.append(worker)
        return ending

    def close(self) -> None:
        self.threads.shutdown(cancel_futures=True)
        for worker in self._idle:
            worker.close()

    def _take(self) -> WorkerProcess:
        while True:
            with self._lock:
                worker = self._idle.popleft() if self._idle else None
            if worker is None:
                return self._breaker.start_worker()
            if worker.is_ready():
                return worker
            worker.close()


class _Breaker:
    """Starts workers; after two failures in a row pauses, each time twice as long."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._failures = 0
        self._not_before = 0.0
        self._reason = ""

    def start_worker(self) -> WorkerProcess:
        with self._lock:
            if time.monotonic() < self._not_before:
                raise _unavailable(self._reason)
        try:
            worker = WorkerProcess()
        except WorkerStartError as error:
            with self._lock:
                self._reason = str(error)
                self._failures += 1
                if self._failures > 1:
                    pause_s = min(2.0 ** min(self._failures - 2, 9), MAX_PAUSE_S)
                    self._not_before = time.monotonic() + pause_s
            raise _unavailable(str(error)) from error
        with self._lock:
            self._failures = 0
        return worker


_lock = threading.Lock()
_pools: dict[int, _Pool] = {}


def _pool(max_workers: int | None) -> _Pool:
    size = max_workers or min(os.cpu_count() or 1, MAX_WORKERS)
    with _lock:
        if size not in _pools:
            _pools[size] = _Pool(size)
            atexit.register(_close, _pools[size])
        return _pools[size]


def _close(pool: _Pool) -> None:
    if pool.pid == os.getpid():
        pool.close()


def _after_fork_in_child() -> None:
    global _lock
    _lock = threading.Lock()  # the parent's may have been held by another thread


os.register_at_fork(after_in_child=_after_fork_in_child)


def _require_sandbox() -> None:
    problem = sandbox_problem()
    if problem is not None:
        raise ConfigError(f"`require_sandbox` is set, but {problem}; {HOW_TO_SANDBOX}")


def _result(ending: Ending, limits: SandboxLimits) -> str:
    """What the model reads, or the error that it reads."""
    if ending.end == "timeout":
        raise _out_of_time(limits.time_s)
    if ending.end == "output":
        raise ToolError(f"the code printed more than {limits.output_bytes} bytes")
    if ending.end != "done":
        raise ToolError(f"the code ended the interpreter ({ending.exited})")
    if ending.error:
        raise ToolError(f"{ending.error} {ending.note}".rstrip())
    return f"{ending.printed.rstrip()}\n{ending.note}".strip("\n")


def _out_of_time(time_s: float) -> ToolTimeoutError:
    return ToolTimeoutError(f"the code ran longer than {time_s:g} s")


def _unavailable(reason: str) -> ToolError:
    return ToolError(f"Python is not available: {reason}", retryable=True)
