"""The process in the sandbox: it forks a child for every call and watches it.

It imports numpy, sympy and scipy once, so a child has them for the price of a fork;
the child of the next call is forked ahead, and waits. Nothing that a child does
outlives it: it gets its variables as a pickle and hands a new one back; when the
call ends its process is killed and the temp folder is emptied. This process reads
what a child wrote, and parses none of it but the length of a reply.
"""

import contextlib
import gc
import importlib
import json
import mmap
import os
import resource
import select
import shutil
import signal
import socket
import sys
import time
from dataclasses import dataclass

from . import child
from .messages import (
    MAX_REPLY_TEXT_BYTES,
    CallSettings,
    Settings,
    pack,
    receive,
    send,
    send_body,
    unpack,
)

MAX_CALL_BYTES = 1 << 31  # the host is trusted
# Packages load many of their parts lazily, which every child would do anew.
_IMPORTED = (
    *("numpy.fft", "numpy.linalg", "numpy.polynomial", "numpy.random"),
    *("scipy.integrate", "scipy.linalg", "scipy.optimize"),
    *("scipy.special", "fractions", "decimal", "itertools", "statistics"),
    *("collections", "datetime", "functools", "re", "string", "heapq", "bisect"),
)


def main(settings: Settings) -> None:
    """Serve calls on file descriptor 0, a socket, until the host hangs up."""
    sys.path.remove(settings["home"])  # else its neighbours could be imported
    if settings["probe"]:
        child.refuse_system_calls(bytes.fromhex(settings["seccomp"]))
        return
    # Else the kill of all processes in `_kill` would be one of the user's.
    assert os.getpid() == 1 or not settings["sandboxed"]
    child.die_with_parent()
    channel = socket.socket(fileno=os.dup(0))
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.close(null)
    os.chdir(settings["temp"])
    _import_packages()
    mapped = _mapped_bytes()
    gc.freeze()
    next_child = _fork(settings, channel, mapped)
    # When the host hangs up, also in the middle of a call, children die with this.
    with contextlib.suppress(EOFError, ConnectionError):
        while _empty(settings["temp"]):
            send(channel, b"ready")
            body = receive(channel, MAX_CALL_BYTES)
            while body == pack(b"cancel"):  # of a call that has ended
                body = receive(channel, MAX_CALL_BYTES)
            _call(settings, channel, next_child, body)
            del body  # or the next child could find it
            # Before the last one is reaped, for each takes as long as a small call.
            last, next_child = next_child, _fork(settings, channel, mapped)
            _reap(last.pid)


def _import_packages() -> None:
    for name in _IMPORTED:
        importlib.import_module(name)
    import sympy

    x = sympy.Symbol("x")
    sympy.simplify(sympy.integrate(x))  # what sympy imports at first use
    sympy.solve(x**2 - 1)


@dataclass(frozen=True, slots=True)
class _Child:
    """A forked process, its output, and the socket for its call and reply."""

    pid: int
    output: int
    wire: socket.socket


def _fork(settings: Settings, channel: socket.socket, mapped: int) -> _Child:
    wire, wire_end = socket.socketpair()
    output, output_end = os.pipe()
    stop = os._exit  # the code may replace it in its module
    pid = os.fork()
    if pid == 0:
        try:
            channel.close()
            child.run(settings, mapped, output_end, wire_end)
        finally:
            stop(1)
    wire_end.close()
    os.close(output_end)
    return _Child(pid, output, wire)


def _call(
    settings: Settings, channel: socket.socket, running: _Child, body: bytes
) -> None:
    """Give a call to a child, watch it, end it, and tell the host how it went."""
    call: CallSettings = json.loads(unpack(body, 4)[1])
    try:
        with contextlib.suppress(BrokenPipeError):  # it was killed while it waited
            send_body(running.wire, body)
        end, printed, reply = _watch(channel, running, call)
    finally:
        _kill(running.pid, settings["sandboxed"])
        running.wire.close()
    if end == "done":
        printed += _rest(running.output, call["output_bytes"] - len(printed))
        if len(printed) > call["output_bytes"]:
            end = "output"
    os.close(running.output)
    exited = ""
    if end == "died":
        _, status, usage = os.wait4(running.pid, 0)
        exited = _exit_name(status)
        if usage.ru_utime + usage.ru_stime >= call["time_s"]:
            end = "timeout"
    send(channel, end.encode(), exited.encode(), printed, reply)


def _exit_name(status: int) -> str:
    if os.WIFSIGNALED(status):
        return signal.Signals(os.WTERMSIG(status)).name
    return f"exit code {os.waitstatus_to_exitcode(status)}"


def _watch(
    channel: socket.socket, running: _Child, call: CallSettings
) -> tuple[str, bytearray, bytes]:
    """Read what a child writes until it has replied, died or must be stopped."""
    deadline = time.monotonic() + call["time_s"]
    max_reply = (call["state_mb"] << 20) + MAX_REPLY_TEXT_BYTES
    printed, reply = bytearray(), bytearray()
    poll = select.poll()
    for readable in (channel, running.output, running.wire):
        poll.register(readable, select.POLLIN)
    while (left := deadline - time.monotonic()) > 0:
        for ready, _ in poll.poll(left * 1000):
            if ready == channel.fileno():
                receive(channel, MAX_CALL_BYTES)  # the only thing it can be
                return "cancelled", printed, b""
            data = _read(ready)
            if ready == running.wire.fileno():
                reply += data
                if not data or len(reply) > max_reply:
                    return "died", printed, b""
                if len(reply) - 4 == int.from_bytes(reply[:4], "big"):
                    return "done", printed, bytes(reply[4:])
            elif data:
                printed += data
                if len(printed) > call["output_bytes"]:
                    return "output", printed, b""
            else:
                poll.unregister(running.output)
    return "timeout", printed, b""


def _read(ready: int) -> bytes:
    with contextlib.suppress(ConnectionResetError):  # it died before it read all
        return os.read(ready, 1 << 20)
    return b""


def _kill(pid: int, sandboxed: bool) -> None:
    """End a child and, where this is process 1, whatever else is left."""
    os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        if sandboxed:
            os.kill(-1, signal.SIGKILL)
        else:
            os.killpg(pid, signal.SIGKILL)


def _reap(pid: int) -> None:
    """Wait for the end of a child, and collect what it left behind."""
    with contextlib.suppress(ChildProcessError):  # it is collected already
        os.waitpid(pid, 0)
    while os.waitpid(-1, os.WNOHANG) != (0, 0):
        pass


def _rest(output: int, max_bytes: int) -> bytes:
    """What a dead child had still in its pipe."""
    os.set_blocking(output, False)
    rest = b""
    with contextlib.suppress(BlockingIOError):
        while len(rest) <= max_bytes and (data := os.read(output, 1 << 16)):
            rest += data
    return rest


def _empty(folder: str) -> bool:
    """Whether everything in a folder could be removed."""
    try:
        os.chmod(folder, 0o700)
        for entry in os.scandir(folder):
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path)
            else:
                os.unlink(entry.path)
    except (OSError, RecursionError):  # no permission, or nested without end
        return False
    return True


def _mapped_bytes() -> int:
    """Size of the address space: the least limit under which it still can grow.

    `/proc`, which would tell it, is not in the sandbox.
    """
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    low, high = 0, 1 << 46
    if hard != resource.RLIM_INFINITY:
        high = min(high, hard)
    while high - low > 1 << 20:
        middle = (low + high) // 2
        try:
            resource.setrlimit(resource.RLIMIT_AS, (middle, hard))
            mmap.mmap(-1, mmap.PAGESIZE).close()
            high = middle
        except (OSError, MemoryError):
            low = middle
    resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
    return high
