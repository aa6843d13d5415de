"""One worker as its host sees it: start it, give it a call, read how that ended.

All methods block and are called from the pool's threads. What a worker says about
itself is believed; what comes from a child (its reply and its output) may be
anything, so it is bounded and only ever shown or handed back to a child.
"""

import contextlib
import functools
import json
import logging
import shutil
import socket
import subprocess
import tempfile
from dataclasses import dataclass
from typing import BinaryIO

from rllib_arpo.tools.python_sandbox import (
    HOW_TO_SANDBOX,
    environment,
    new_temp_folder,
    sandbox_problem,
    worker_command,
)
from rllib_arpo.tools.python_worker.messages import (
    MAX_ERROR_CHARS,
    MAX_NOTE_CHARS,
    CallSettings,
    pack,
    receive,
    send,
    unpack,
)

START_S = 120.0  # imports from a cold network disk
GRACE_S = 10.0  # for a worker to clean up after a call
# Beyond what a child may write: the rest of a pipe, and the worker's own words.
_SLACK_BYTES = 4 << 20

logger = logging.getLogger(__name__)


class WorkerStartError(Exception):
    """A worker did not start; the message is why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """How a call ended.

    Attributes:
        end: "done", "died", "timeout", "output" (too much of it) or "cancelled".
        exited: how a process died, as "exit code 1" or "SIGSEGV".
        printed: standard output and error.
        error: last line of the traceback, or empty.
        note: what the model should know about its variables, or empty.
        state: the new variables, None to leave them as they were.
    """

    end: str
    exited: str
    printed: str
    error: str
    note: str
    state: bytes | None


class WorkerProcess:
    """A worker, for one call at a time: `is_ready`, `start`, `wait`.

    Raises:
        WorkerStartError: it ended or fell silent before it was ready.
    """

    def __init__(self) -> None:
        sandboxed = sandbox_problem() is None
        if not sandboxed:
            _warn_of_no_sandbox()
        self._temp = new_temp_folder(sandboxed=sandboxed)
        self._sandboxed = sandboxed
        self._channel, theirs = socket.socketpair()
        with theirs, tempfile.TemporaryFile() as stderr:
            self._process = subprocess.Popen(
                worker_command(sandboxed=sandboxed, temp=self._temp),
                env=environment(self._temp),
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                start_new_session=True,
            )
            theirs.close()  # so that its end is the end of the channel
            try:
                self._hear_ready(START_S)
            except (OSError, EOFError, ValueError) as error:
                self.close()
                raise WorkerStartError(_last_line(stderr) or repr(error)) from error
        self._has_run = False

    def is_ready(self) -> bool:
        """Whether it takes a call; waits until it has cleaned up after the last one."""
        if self._has_run:
            try:
                self._hear_ready(GRACE_S)
            except (OSError, EOFError, ValueError):
                return False
        return self._process.poll() is None  # it may have died while it was idle

    def _hear_ready(self, within_s: float) -> None:
        self._channel.settimeout(within_s)
        receive(self._channel, len(pack(b"ready")))

    def start(self, settings: CallSettings, state: bytes, code: bytes) -> None:
        """Begin a call.

        Raises:
            OSError: the worker is gone.
        """
        self._has_run = True
        send(self._channel, b"call", json.dumps(settings).encode(), state, code)

    def cancel(self) -> None:
        """Make the running call end; `wait` still returns its ending."""
        with contextlib.suppress(OSError):  # the worker is gone, and the call with it
            send(self._channel, b"cancel")

    def wait(self, settings: CallSettings) -> Ending:
        """How the running call ended.

        Raises:
            TimeoutError: the worker itself hangs.
            OSError, EOFError: the worker died.
            ValueError: what it said makes no sense.
        """
        max_state_bytes = settings["state_mb"] << 20
        self._channel.settimeout(settings["time_s"] + GRACE_S)
        body = receive(
            self._channel, settings["output_bytes"] + max_state_bytes + _SLACK_BYTES
        )
        end, exited, printed, reply = unpack(body, 4)
        error, note, state = "", "", None
        if end == b"done":
            try:
                error, note, state = _parse_reply(reply, max_state_bytes)
            except ValueError:
                end, exited = b"died", b"no reply"
        return Ending(
            end=end.decode(),
            exited=exited.decode(),
            printed=printed.decode(errors="replace"),
            error=error,
            note=note,
            state=state,
        )

    def close(self) -> None:
        """Kill the worker and whatever it runs."""
        self._channel.close()
        self._process.kill()
        self._process.wait()
        if not self._sandboxed:
            shutil.rmtree(self._temp, ignore_errors=True)


def _parse_reply(reply: bytes, max_state_bytes: int) -> tuple[str, str, bytes | None]:
    """Error, note and variables of a reply, which may be forged."""
    error, note, sets, state = unpack(reply, 4)
    if len(state) > max_state_bytes:
        raise ValueError(f"{len(state)} bytes of variables, over {max_state_bytes}")
    return (
        error.decode(errors="replace")[:MAX_ERROR_CHARS],
        note.decode(errors="replace")[:MAX_NOTE_CHARS],
        state if sets else None,
    )


def _last_line(file: BinaryIO) -> str:
    file.seek(0)
    lines = file.read().decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else ""


@functools.cache
def _warn_of_no_sandbox() -> None:
    logger.warning(
        "model-written Python runs without a sandbox, with rlimits only, and can read "
        "and write this user's files: %s; %s",
        sandbox_problem(),
        HOW_TO_SANDBOX,
    )
