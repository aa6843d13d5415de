"""Symbolic comparison of two answers by math-verify, in processes that can be killed.

SymPy may run for ever in one step (10^{10^{10}}), where neither a thread nor a Python
signal handler stops it, and math-verify's own timeout works in the main thread only.
So a worker reads pairs of answers, a line of JSON each, with an alarm set that the
system itself ends it by; the next pair starts another. The limit counts the worker's
own CPU time, so that a busy machine changes no reward; ten times as much on the clock
ends it too. Only these limits make a pair unequal: a worker that something else ended,
such as the OOM killer while it was idle, is replaced. This file is also the worker's
program: run by its path, it imports nothing else of the package.
"""

import json
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from functools import lru_cache

MAX_WORKERS = 4
MEMORY_BYTES = 2 << 30
READY = "ready\n"
# What ends a worker at its limits: the timers, and libraries in C or a stack that get
# no memory; Python itself lives on.
LIMITS = (-signal.SIGPROF, -signal.SIGALRM, -signal.SIGABRT, -signal.SIGSEGV)


@lru_cache(maxsize=8192)
def symbolic_equal(answer: str, gold: str, timeout_s: float) -> bool:
    """Whether two expressions in plain LaTeX are equal.

    A comparison that takes longer than `timeout_s` seconds of CPU time or more memory
    than `MEMORY_BYTES` counts as unequal.

    Raises:
        ConfigError: the workers do not start.
        RewardError: one after the other was ended by something else.
    """
    return _reply([gold, answer], timeout_s)


@lru_cache(maxsize=8192)
def can_parse(expression: str, timeout_s: float) -> bool:
    """Whether math-verify reads the expression as mathematics within the limits.

    Raises:
        ConfigError: the workers do not start.
        RewardError: one after the other was ended by something else.
    """
    return _reply([expression], timeout_s)


def _reply(expressions: list[str], timeout_s: float) -> bool:
    line = json.dumps([expressions, timeout_s])
    with _slots:
        try:
            worker = _idle.pop()
        except IndexError:
            worker = _start_worker()
        reply = _ask(worker, line)
        if reply is None:
            worker = _start_worker()
            reply = _ask(worker, line)
    if reply is None:
        from rllib_arpo.errors import RewardError  # not to be had in the worker

        raise RewardError(
            f"{' and '.join(expressions)!r} cannot be compared: two workers of "
            f"math-verify were ended from outside (exit status {worker.returncode}), "
            "maybe for want of memory"
        )
    return reply


_slots = threading.BoundedSemaphore(MAX_WORKERS)
_idle: list["subprocess.Popen[str]"] = []


def _start_worker() -> "subprocess.Popen[str]":
    worker = subprocess.Popen(
        [sys.executable, "-P", __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        encoding="utf-8",
    )
    assert worker.stdout is not None
    if worker.stdout.readline() != READY:
        from rllib_arpo.errors import ConfigError  # not to be had in the worker

        status = worker.wait()
        _stop(worker)
        raise ConfigError(
            f"the worker of math-verify does not start (exit status {status}): see "
            "what `python -c 'import math_verify'` says"
        )
    return worker


def _ask(worker: "subprocess.Popen[str]", line: str) -> bool | None:
    """The reply, no if a limit ended the worker; None: something else did."""
    assert worker.stdin is not None
    assert worker.stdout is not None
    reply = ""
    with suppress(BrokenPipeError):
        worker.stdin.write(line + "\n")
        worker.stdin.flush()
        reply = worker.stdout.readline()
    if reply:
        _idle.append(worker)
        return json.loads(reply)
    status = worker.wait()
    _stop(worker)
    return False if status in LIMITS else None


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


def _equal(expressions: list[str]) -> bool:
    """Whether the first expression, the gold one, can be read and equals the others."""
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse, verify

    # All of the text must be an expression: no number is looked for in what cannot be
    # parsed, and units are gone already ("5m" is a product).
    reading = LatexExtractionConfig(
        normalization_config=NormalizationConfig(
            basic_latex=True,
            units=False,
            malformed_operators=True,
            nits=True,
            boxed="none",
            equations=False,
        )
    )
    # 0 turns math-verify's timeouts off: the alarm is the timeout.
    gold, *others = (
        parse(
            f"${expression}$",
            [reading],
            fallback_mode="no_fallback",
            parsing_timeout=0,
        )
        for expression in expressions
    )
    return bool(gold) and all(
        verify(gold, other, timeout_seconds=0, allow_set_relation_comp=True)
        for other in others
    )


def _serve() -> None:
    import os
    import resource

    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # nothing that a library prints is taken for a reply
    import math_verify  # noqa: F401  loaded before the first alarm is set

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    print(READY, end="", file=replies, flush=True)
    for line in sys.stdin:
        expressions, timeout_s = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, timeout_s)
        signal.setitimer(signal.ITIMER_REAL, 10 * timeout_s)
        try:
            equal = _equal(expressions)
        except Exception:  # boundary: whatever SymPy cannot do is not equal
            equal = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(equal), file=replies, flush=True)


if __name__ == "__main__":
    _serve()
else:
    import atexit
    import os

    atexit.register(_stop_workers)
    os.register_at_fork(after_in_child=_forget_workers)
