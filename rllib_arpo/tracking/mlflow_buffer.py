"""What goes to MLflow waits on disk, so that training never waits for a server.

    training ──add──> outbox/ ──a thread──> MLflow          see `mlflow_outbox.py`

1. What is logged in the seconds after something was sent is gathered: a few calls to
   the server instead of some for every iteration. `flush` and `close` send at once.
2. A server that is down, slow or restarted is tried again; what is left at the end of a
   process is sent by the next one that opens the folder, or by `send_later`.
3. Nothing is sent twice with effect: every metric carries its time, every trace its id
   and a model version its line, so that MLflow takes a line that was sent twice for
   one. A run is found again by a tag with the folder's own id.
4. A disk that is full, or a gigabyte that waits, costs lines and never training: there
   is one warning, and the number of lines at the end.
5. One buffer has a folder until its thread has ended, perhaps long after `close`, in a
   call that a server does not answer. Until then other processes are kept out, and the
   next buffer of this process takes lines but sends none.
"""

import json
import logging
import os
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rllib_arpo.errors import ARPOError, ConfigError
from rllib_arpo.run_lock import only_here
from rllib_arpo.storage import ASIDE, write_whole
from rllib_arpo.tracking.mlflow_outbox import Outbox
from rllib_arpo.tracking.mlflow_store import (
    EXPERIMENT,
    answers,
    tracking_uri,
    without_passwords,
)

if TYPE_CHECKING:
    from rllib_arpo.tracking.mlflow_sender import Sender

logger = logging.getLogger(__name__)

GATHER_S = 10.0
RETRY_S = (1.0, 2.0, 5.0, 10.0, 30.0)
# At one place, of a store that answers.
MAX_FAILURES = 6
SPEC_FILE, RUN_ID_FILE = "run.json", "run_id"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSpec:
    """Which MLflow run a folder's lines belong to.

    Attributes:
        key: finds the run again by a tag.
        uri: of the store.
        experiment: name.
        name: of the run.
        tags: set when it is made.
        parent: folder of the buffer of the parent run; None: it has no parent.
        run_id: of a run that is there already; None makes one.
    """

    uri: str = field(default_factory=tracking_uri)
    experiment: str = EXPERIMENT
    name: str = ""
    tags: Mapping[str, str] = field(default_factory=dict)
    parent: str | None = None
    run_id: str | None = None
    key: str = field(default_factory=lambda: uuid.uuid4().hex)


class Buffer:
    """The outbox of one MLflow run, with the thread that sends it.

    Args:
        folder: made when it is not there; one that holds a run goes on with it.
        spec: of a new run; without effect in a folder that holds one.
        gather_s: between the end of one sending and the next.

    Raises:
        ConfigError: another buffer has the folder and is not closed.
        OSError: the folder cannot be read or written.
        CheckpointError: likewise.
    """

    def __init__(
        self,
        folder: str | Path,
        spec: RunSpec | None = None,
        *,
        gather_s: float = GATHER_S,
    ) -> None:
        self.folder = Path(folder).absolute()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._place = self.folder.resolve()
        self._gather_s = gather_s
        self._sender: Sender | None = None
        self._num_dropped = 0
        self._wake = threading.Event()
        self._hurry = threading.Event()
        self._idle = threading.Condition()
        self._closing = False
        before = _hold(self)
        try:
            file = self.folder / SPEC_FILE
            if not file.exists():
                _write_spec(file, spec or RunSpec())
            self.spec = RunSpec(**json.loads(file.read_text()))
            self._outbox = Outbox(self.folder)
            self._thread = threading.Thread(
                target=self._run, args=(before,), name="rllib_arpo-mlflow", daemon=True
            )
            self._thread.start()
        except BaseException:
            _let_go(self)
            raise
        self._wake.set()

    @property
    def run_id(self) -> str | None:
        """Of the MLflow run; None as long as the server does not know of it."""
        return read_run_id(self.folder)

    @property
    def pending_bytes(self) -> int:
        """What MLflow does not have yet."""
        return self._outbox.pending_bytes

    def metrics(
        self, values: Mapping[str, float], *, step: int, time_ms: int | None = None
    ) -> None:
        """Values of one step."""
        content: dict[str, Any] = {"values": dict(values), "step": step}
        if time_ms is not None:
            content["time_ms"] = time_ms
        self.add("metrics", content)

    def params(self, values: Mapping[str, str]) -> None:
        """Parameters; the first value of a name stays."""
        self.add("params", {"values": dict(values)})

    def tags(self, values: Mapping[str, str]) -> None:
        """Tags; the last value of a name stays."""
        self.add("tags", {"values": dict(values)})

    def add(self, kind: str, content: Mapping[str, Any], *, sync: bool = False) -> None:
        """Append a line of a kind that `mlflow_sender.py` knows.

        One that the disk does not take is dropped, so that training goes on.

        Args:
            kind: of the line.
            content: what that kind holds.
            sync: return when the line would outlast a power cut.
        """
        line = {"kind": kind, "time_ms": time.time_ns() // 1_000_000, **content}
        try:
            written = json.dumps(line, default=str) + "\n"
            self._outbox.append(written.encode(), sync=sync)
        except OSError as error:
            self._num_dropped += 1
            if self._num_dropped == 1:
                logger.warning(
                    "what is logged for MLflow at %s cannot be kept in %s and is "
                    "dropped until it can: %s. Free some space there.",
                    without_passwords(self.spec.uri),
                    self.folder,
                    error,
                )
        self._wake.set()

    def flush(self, timeout_s: float = 30.0) -> bool:
        """Wait until MLflow has everything, or for so long.

        Returns:
            Whether it has.
        """
        self._send_now()
        with self._idle:
            return self._idle.wait_for(lambda: not self.pending_bytes, timeout_s)

    def close(self, timeout_s: float = 10.0) -> bool:
        """`flush`, then stop; what is left is sent by whoever opens the folder next.

        The thread is waited for as long; it ends by itself once its server has answered
        or has not.
        """
        deadline = time.monotonic() + timeout_s
        done = self.flush(timeout_s)
        self._outbox.close()
        self._closing = True  # from here on the next buffer may append
        self._send_now()
        self._thread.join(max(deadline - time.monotonic(), 0.0))
        if self._num_dropped:
            logger.warning(
                "MLflow at %s lacks %d lines that %s could not keep",
                without_passwords(self.spec.uri),
                self._num_dropped,
                self.folder,
            )
        if not done:
            logger.warning(
                "MLflow at %s is away: what it lacks waits in %s and is sent by the "
                "next run in this folder or by "
                "rllib_arpo.tracking.mlflow_buffer.send_later",
                without_passwords(self.spec.uri),
                self.folder,
            )
        return done

    def _send_now(self) -> None:
        self._hurry.set()
        self._wake.set()

    def _run(self, before: "Buffer | None") -> None:
        try:
            if before is not None:
                before._thread.join()
                self._outbox.catch_up()
            self._send_until_closed()
        finally:
            _let_go(self)

    def _send_until_closed(self) -> None:
        failures, stuck_at = 0, -1
        while True:
            self._wake.wait()
            self._wake.clear()
            self._hurry.clear()
            if self._closing:  # looked at last: `close` wakes once
                return
            try:
                pause = self._gather_s if self._send_all() else 0.0
                failures = 0
            except Exception as error:  # boundary: tracking never stops training
                failures = failures if self._outbox.sent == stuck_at else 0
                stuck_at = self._outbox.sent
                self._sender = self._after(failures)
                pause = RETRY_S[min(failures, len(RETRY_S) - 1)]
                failures += 1
                self._wake.set()
                log = logger.warning if failures == 1 else logger.debug
                log(
                    "MLflow at %s does not answer: %s",
                    without_passwords(self.spec.uri),
                    without_passwords(error),
                )
            self._hurry.wait(pause)

    def _after(self, failures: int) -> "Sender | None":
        """What tries again after so many failures at the same place.

        A store that answers, but not to one line, is not waited for: that line is
        refused, or it would hold up all that follow.
        """
        from rllib_arpo.tracking.mlflow_sender import Sender

        if failures < MAX_FAILURES or not answers(self.spec.uri):
            return None
        return Sender(self.folder, self.spec, gives_up=True)

    def _send_all(self) -> bool:
        """Send what is there at the start; whether there was something."""
        from rllib_arpo.tracking.mlflow_sender import Sender

        if not self.pending_bytes:
            return False
        self._sender = self._sender or Sender(self.folder, self.spec)
        place, end = 0, self._outbox.end
        while place < end and not self._closing:
            lines, place = self._outbox.read()
            if not lines:  # somebody cut the file
                break
            self._sender.send(_parsed(lines))
            try:
                self._outbox.mark_sent(place)
            except (OSError, ARPOError) as error:
                logger.debug("what MLflow has is not noted: %s", error)
            with self._idle:
                self._idle.notify_all()
        return True


@dataclass(slots=True)
class _Hold:
    """Of a folder that other processes are kept out of.

    Attributes:
        lock: held until it is closed.
        buffers: whose threads have not ended. Only the last one may be open.
    """

    lock: ExitStack
    buffers: list[Buffer] = field(default_factory=list)


_holding = threading.Lock()
_holds: dict[Path, _Hold] = {}


def _hold(buffer: Buffer) -> Buffer | None:
    """Take the folder; the closed buffer that still sends from it, if there is one."""
    place = buffer._place
    with _holding:
        if place not in _holds:
            lock = ExitStack()
            lock.enter_context(
                only_here(place, does="tracks a run", cure="wait for its end")
            )
            _holds[place] = _Hold(lock)
        buffers = _holds[place].buffers
        before = buffers[-1] if buffers else None
        if before is not None and not before._closing:
            raise ConfigError(
                f"this process tracks a run in {buffer.folder} already: close that "
                "buffer first"
            )
        buffers.append(buffer)
        return before


def _let_go(buffer: Buffer) -> None:
    with _holding:
        _holds[buffer._place].buffers.remove(buffer)
        if not _holds[buffer._place].buffers:
            _holds.pop(buffer._place).lock.close()


def _forget_holds() -> None:
    """In a forked child: locks and threads are the parent's."""
    global _holding
    _holding = threading.Lock()
    _holds.clear()


os.register_at_fork(after_in_child=_forget_holds)


def read_run_id(folder: str | Path) -> str | None:
    """The MLflow run of a buffer's folder; None as long as there is none."""
    with suppress(FileNotFoundError):
        return (Path(folder) / RUN_ID_FILE).read_text().strip() or None
    return None


def send_later(folder: str | Path, *, timeout_s: float = 60.0) -> bool:
    """Send what a process that ended has left; whether MLflow has everything.

    Raises:
        ConfigError: the folder is in use.
        OSError: it cannot be read or written.
        CheckpointError: likewise.
    """
    return Buffer(folder).close(timeout_s)


def _write_spec(file: Path, spec: RunSpec) -> None:
    """For its owner alone: the store's URI may hold a password."""
    aside = file.with_name(file.name + ASIDE)
    aside.unlink(missing_ok=True)
    aside.touch(mode=0o600)  # whose permissions `write_whole` keeps
    write_whole(file, json.dumps(asdict(spec)))


def _parsed(lines: Sequence[bytes]) -> list[dict[str, Any]]:
    """Lines as they were added; one that a power cut has spoilt is left out."""
    parsed: list[dict[str, Any]] = []
    for line in lines:
        try:
            parsed.append(json.loads(line))
        except ValueError:
            logger.warning("a line for MLflow is spoilt and left out")
    return parsed
