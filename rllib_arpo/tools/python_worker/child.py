"""What a child does with its call: gives up its rights, runs the code, replies.

The reply goes through a socket that the code can find and write to: it then forges
its own result, which it could have printed as well.
"""

import ast
import builtins
import contextlib
import ctypes
import hashlib
import json
import math
import os
import random
import resource
import signal
import socket
import sys
import traceback
import types
import warnings
from typing import Any

import numpy as np

from .messages import (
    MAX_ERROR_CHARS,
    OWN_PID,
    CallSettings,
    Settings,
    pack,
    receive,
    unpack,
)
from .variables import dump, load

MAX_OPEN_FILES = 64
WIRE_FD = 3

_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 22, 38
_SECCOMP_MODE_FILTER = 2
# After these the variables are as they were before the call.
_LIMITS = (MemoryError, RecursionError)

_libc = ctypes.CDLL(None, use_errno=True)


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def _prctl(option: int, *arguments: int) -> int:
    filled = (*arguments, 0, 0, 0, 0)[:4]
    return _libc.prctl(option, *map(ctypes.c_ulong, filled))


def die_with_parent() -> None:
    """Have the kernel kill this process when the thread that started it ends."""
    if sys.platform == "linux":
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def run(settings: Settings, mapped: int, output: int, wire: socket.socket) -> None:
    """Wait for a call, run it and exit.

    Args:
        settings: of the worker.
        mapped: bytes of address space that are in use before the call.
        output: file descriptor of a pipe for what is printed.
        wire: gives the call and takes the reply.

    Raises:
        OSError: the filter of system calls is refused, in a sandbox.
    """
    write, stop = os.write, os._exit  # the code may replace them in their module
    _leave_worker(output, wire)
    with socket.socket(fileno=os.dup(WIRE_FD)) as ours:
        _, call_json, state, code = unpack(receive(ours, 1 << 31), 4)
    call: CallSettings = json.loads(call_json)
    _confine(settings, call, mapped)
    body = _reply(call, state, code)
    left = memoryview(len(body).to_bytes(4, "big") + body)
    while left:
        left = left[write(WIRE_FD, left) :]
    stop(0)


def _leave_worker(output: int, wire: socket.socket) -> None:
    """Leave the worker's session and all its files but these two."""
    die_with_parent()
    os.setsid()
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.dup2(wire.detach(), WIRE_FD)
    os.closerange(WIRE_FD + 1, 1 << 10)


def _confine(settings: Settings, call: CallSettings, mapped: int) -> None:
    sizes = {
        resource.RLIMIT_AS: mapped + (call["memory_mb"] << 20),
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_CPU: math.ceil(call["time_s"]) + 1,
        resource.RLIMIT_FSIZE: call["file_mb"] << 20,
        resource.RLIMIT_NOFILE: MAX_OPEN_FILES,
        resource.RLIMIT_NPROC: 0,
    }
    for which, size in sizes.items():
        resource.setrlimit(which, (size, size))
    try:
        refuse_system_calls(bytes.fromhex(settings["seccomp"]))
    except OSError:
        if settings["sandboxed"]:
            raise


def refuse_system_calls(program: bytes) -> None:
    """Put a filter on this process for the rest of its life.

    Raises:
        OSError: the kernel, or a container's own filter, does not allow it.
    """
    if not program:
        return
    program = program.replace(
        OWN_PID.to_bytes(4, sys.byteorder), os.getpid().to_bytes(4, sys.byteorder)
    )
    filled = _Program(len(program) // 8, program)
    refused = _prctl(_PR_SET_NO_NEW_PRIVS, 1) or _prctl(
        _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.addressof(filled)
    )
    if refused:
        raise OSError(ctypes.get_errno(), "the filter of system calls is refused")


def _reply(call: CallSettings, state: bytes, code: bytes) -> bytes:
    """Run the code after its variables are back; the reply's body."""
    stdout = os.fdopen(1, "w", encoding="utf-8", errors="replace", buffering=1)
    sys.stdout = sys.stderr = stdout
    warnings.formatwarning = _brief_warning
    builtins.exit = builtins.quit = sys.exit  # type: ignore[assignment]
    _seed(call["seed"], state, code)
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    notes = [load(state)]
    error = _execute(code.decode(), main.__dict__)
    with contextlib.suppress(ValueError):  # closed by the code
        stdout.flush()
    text = "" if error is None else _last_line(error)
    kept = b""
    if sets := not isinstance(error, _LIMITS):
        kept, dropped = dump(main.__dict__, call["state_mb"] << 20)
        notes.append(dropped)
    note = " ".join(filter(None, notes))
    parts = text.encode(errors="replace"), note.encode(errors="replace")
    return pack(*parts, b"set" * sets, kept)


def _brief_warning(message: object, category: type[Warning], *_: object) -> str:
    return f"{category.__name__}: {message}\n"


def _seed(seed: int, state: bytes, code: bytes) -> None:
    """Make `random` and `numpy.random` a function of what runs."""
    digest = hashlib.sha256(b"%d %b %b" % (seed, state, code)).digest()
    random.seed(digest)
    np.random.seed(list(digest))


def _execute(code: str, namespace: dict[str, Any]) -> BaseException | None:
    """Run code as a notebook does; what it raised."""
    try:
        tree = ast.parse(code, "<python>")
        last = tree.body.pop() if _ends_in_expression(tree) else None
        exec(compile(tree, "<python>", "exec", dont_inherit=True), namespace)
        if isinstance(last, ast.Expr):
            shown = ast.Expression(last.value)
            value = eval(
                compile(shown, "<python>", "eval", dont_inherit=True), namespace
            )
            if value is not None:
                print(_shown(value))
    except SystemExit as error:
        return error if error.code else None
    except BaseException as error:  # boundary: the model's code
        return error
    return None


def _ends_in_expression(tree: ast.Module) -> bool:
    return bool(tree.body) and isinstance(tree.body[-1], ast.Expr)


def _shown(value: object) -> str:
    try:
        return repr(value)
    except ValueError:
        if isinstance(value, int):  # of more digits than Python writes out
            return "(a value too large to show)"
        raise


def _last_line(error: BaseException) -> str:
    """The last line of the traceback: type and message."""
    text = traceback.format_exception_only(error)[-1].strip()
    if isinstance(error, ImportError) and error.path:
        text = text.replace(f" ({error.path})", "")
    return text[:MAX_ERROR_CHARS]
