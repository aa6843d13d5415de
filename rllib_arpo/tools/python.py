"""The Python tool: model-written code in pydantic-monty, a sandboxed interpreter.

Code runs in worker processes without files, network, environment or host objects.
The variables of a trajectory are a snapshot of about a kilobyte that the tool object
keeps between calls, so `fork` copies a reference and any worker can serve any path.

1. A call that ends in an exception keeps what ran before it, as in a notebook; one
   that hits a limit leaves the variables as they were before the call.
2. The workers are shared by the process, started by the first call, and replaced
   when they crash. An unpickled tool uses the workers of its own process; one in a
   process forked after the first call refuses to run, for it could only hang.
"""

import asyncio
import atexit
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Self

from pydantic_monty import (
    CollectString,
    Monty,
    MontyCrashedError,
    MontyError,
    MontyRuntimeError,
    MontySession,
    OSPolicy,
    ResourceLimits,
)

from rllib_arpo.errors import ToolError, ToolTimeoutError
from rllib_arpo.tools.tool import text_parameter

MAX_WORKERS = 8
# After these the interpreter's memory is in no known state and is thrown away.
_LIMITS = (TimeoutError, MemoryError, RecursionError)


@dataclass(frozen=True, slots=True, kw_only=True)
class PythonLimits:
    """What one call may use.

    Attributes:
        time_s: seconds of execution.
        memory_mb: megabytes of the interpreter's heap.
        recursion_depth: nested function calls.
        output_bytes: printed text; far more than any result's token cap.
    """

    time_s: float = 5.0
    memory_mb: int = 64
    recursion_depth: int = 500
    output_bytes: int = 65536


class PythonTool:
    """Runs Python and keeps the variables for the next call.

    Prints are returned, and the value of the last expression as a notebook shows it.

    Args:
        limits: of each call.
        seed: of the sandbox's `random`, so that the same calls give the same result.
    """

    name = "python"
    description = (
        "Runs Python code and returns what it prints and the value of its last line. "
        "Variables are kept. Standard library only."
    )
    parameters = text_parameter("code", "Python source code.")

    def __init__(self, *, limits: PythonLimits = PythonLimits(), seed: int = 0) -> None:
        self.limits = limits
        self.seed = seed
        self._snapshot: bytes | None = None

    async def call(self, arguments: str) -> str:
        """Run code in a worker; the event loop goes on meanwhile.

        Raises:
            ToolError: the code raised or did not parse; its last traceback line.
            ToolTimeoutError: it ran longer than `limits.time_s`.
        """
        pool = _pool()
        if pool.pid != os.getpid():
            raise ToolError(
                "Python is not available in a process forked from one that used it; "
                "start processes by spawn"
            )
        loop = asyncio.get_running_loop()
        snapshot, output, error = await loop.run_in_executor(
            pool.threads,
            _run,
            pool,
            arguments,
            self._snapshot,
            self.limits,
            self.seed,
        )
        # Set here and not in the worker's thread: a call that was given up on must
        # not change the variables later.
        self._snapshot = snapshot
        if error is not None:
            raise error
        return output

    def fork(self) -> Self:
        """A copy with its own variables, for the price of a reference."""
        other = type(self)(limits=self.limits, seed=self.seed)
        other._snapshot = self._snapshot
        return other


class _Pool:
    """The workers of this process, and as many threads to wait for them."""

    def __init__(self) -> None:
        size = min(os.cpu_count() or 1, MAX_WORKERS)
        self.pid = os.getpid()
        self.threads = ThreadPoolExecutor(size, thread_name_prefix="python-tool")
        self.workers = Monty(min_processes=1, max_processes=size).__enter__()

    def close(self) -> None:
        self.threads.shutdown(cancel_futures=True)
        self.workers.__exit__(None, None, None)


_lock = threading.Lock()
_the_pool: _Pool | None = None


def _pool() -> _Pool:
    global _the_pool
    with _lock:
        if _the_pool is None:
            _the_pool = _Pool()
            atexit.register(_close, _the_pool)
        return _the_pool


def _close(pool: _Pool) -> None:
    if pool.pid == os.getpid():
        pool.close()


def _after_fork_in_child() -> None:
    global _lock
    _lock = threading.Lock()  # the parent's may have been held by another thread


os.register_at_fork(after_in_child=_after_fork_in_child)


def _run(
    pool: _Pool, code: str, snapshot: bytes | None, limits: PythonLimits, seed: int
) -> tuple[bytes | None, str, ToolError | None]:
    """Run code after `snapshot`; its new snapshot, its output, or what went wrong."""
    printed = CollectString(limits.output_bytes)
    try:
        with pool.workers.checkout(
            script_name="python",
            limits=_resource_limits(limits),
            os_policy=OSPolicy(sleep="zero", random_start={"seed": seed}),
        ) as session:
            if snapshot is not None:
                session.load_session(snapshot)
            try:
                value = session.feed_run(code, print_callback=printed)
            except MontyRuntimeError as error:
                return _failed(error, session, snapshot, limits)
            snapshot = session.dump()
    except MontyCrashedError as error:
        if error.timed_out:
            return snapshot, "", _out_of_time(limits)
        return snapshot, "", ToolError("the interpreter crashed", retryable=True)
    except MontyError as error:
        return snapshot, "", ToolError(_last_line(error))
    return snapshot, (printed.output + _shown(value)).rstrip("\n"), None


def _failed(
    error: MontyRuntimeError,
    session: MontySession,
    snapshot: bytes | None,
    limits: PythonLimits,
) -> tuple[bytes | None, str, ToolError]:
    cause = error.exception()
    if isinstance(cause, TimeoutError):
        return snapshot, "", _out_of_time(limits)
    if isinstance(cause, _LIMITS):
        return snapshot, "", ToolError(_last_line(error))
    return session.dump(), "", ToolError(_last_line(error))


def _resource_limits(limits: PythonLimits) -> ResourceLimits:
    return ResourceLimits(
        max_feed_duration_secs=limits.time_s,
        max_memory=limits.memory_mb << 20,
        max_recursion_depth=limits.recursion_depth,
    )


def _out_of_time(limits: PythonLimits) -> ToolTimeoutError:
    return ToolTimeoutError(f"the code ran longer than {limits.time_s:g} s")


def _last_line(error: MontyError) -> str:
    """The last line of the traceback: type and message."""
    cause = error.exception()
    return f"{type(cause).__name__}: {cause}"


def _shown(value: object) -> str:
    if value is None:
        return ""
    try:
        return repr(value)
    except ValueError:  # an integer of more digits than Python writes out
        return "(a value too large to show)"
