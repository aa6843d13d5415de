"""Symbolic comparison of two answers by math-verify, in processes that can be killed.

SymPy may run for ever in one step (10^{10^{10}}), where neither a thread nor a Python
signal handler stops it, and math-verify's own timeout works in the main thread only.
So a worker reads pairs of answers, a line of JSON each, with an alarm set that the
system itself ends it by; the next pair starts another. This file is also the
worker's program: run by its path, it imports nothing else of the package.
"""

import json
import subprocess
import sys
import threading
from functools import lru_cache

MAX_WORKERS = 4
MAX_CHARS = 500  # no final answer is longer; parsing time grows faster than length
MEMORY_BYTES = 2 << 30


@lru_cache(maxsize=8192)
def symbolic_equal(answer: str, gold: str, timeout_s: float) -> bool:
    """Whether two LaTeX or plain expressions are equal.

    A comparison that takes longer than `timeout_s` seconds or more memory than
    `MEMORY_BYTES`, and an answer longer than `MAX_CHARS`, counts as unequal.
    """
    if max(len(answer), len(gold)) > MAX_CHARS:
        return False
    with _slots:
        try:
            worker = _idle.pop()
        except IndexError:
            worker = _start_worker()
        reply = _ask(worker, json.dumps([answer, gold, timeout_s]))
        if reply:
            _idle.append(worker)
        else:
            _stop(worker)
    return reply.strip() == "true"


_slots = threading.BoundedSemaphore(MAX_WORKERS)
_idle: list["subprocess.Popen[str]"] = []


def _start_worker() -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        encoding="utf-8",
    )


def _ask(worker: "subprocess.Popen[str]", line: str) -> str:
    """The reply, empty when the worker ended; it always does one of the two."""
    assert worker.stdin is not None
    assert worker.stdout is not None
    try:
        worker.stdin.write(line + "\n")
        worker.stdin.flush()
    except BrokenPipeError:
        return ""
    return worker.stdout.readline()


def _forget_workers() -> None:
    """In a forked child: the pipes lead to the parent's workers."""
    global _slots
    _slots = threading.BoundedSemaphore(MAX_WORKERS)
    _inherited.extend(_idle)
    _idle.clear()


def _stop(worker: "subprocess.Popen[str]") -> None:
    worker.kill()
    worker.communicate()  # waits, and closes the pipes


def _stop_workers() -> None:
    while _idle:
        _stop(_idle.pop())


_inherited: list["subprocess.Popen[str]"] = []


def _equal(answer: str, gold: str) -> bool:
    from math_verify import parse, verify

    # 0 turns math-verify's timeouts off: the alarm is the timeout.
    expected = parse(f"${gold}$", parsing_timeout=0)
    given = parse(f"${answer}$", parsing_timeout=0)
    return bool(verify(expected, given, timeout_seconds=0))


def _serve() -> None:
    import resource
    import signal

    import math_verify  # noqa: F401  loaded before the first alarm is set

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    for line in sys.stdin:
        answer, gold, timeout_s = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, timeout_s)
        try:
            equal = _equal(answer, gold)
        except Exception:  # boundary: whatever SymPy cannot do is not equal
            equal = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(equal), flush=True)


if __name__ == "__main__":
    sys.path.pop(0)  # the folder of this file, whose modules are no top-level names
    _serve()
else:
    import atexit
    import os

    atexit.register(_stop_workers)
    os.register_at_fork(after_in_child=_forget_workers)
