"""What goes to MLflow waits in a file, so that training never waits for a server.

    training ──append──> outbox.jsonl ──a thread──> MLflow
                         sent           (bytes of the outbox that MLflow has)

1. A line is on disk before `add` returns; the thread sends them in order and notes how
   far it came. A server that is down, slow or restarted is tried again; what is left at
   the end of a process is sent by the next one that opens the folder, or by `flush`.
2. Nothing is sent twice with effect: every metric carries its time and every trace its
   id, so that MLflow takes a line that was sent twice for one. A run is found again by
   a tag with the folder's own id.
3. Memory is bounded: the thread reads `MAX_BATCH_BYTES` at a time.
"""

import json
import logging
import os
import threading
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rllib_arpo.storage import write_whole
from rllib_arpo.tracking.mlflow_store import EXPERIMENT, tracking_uri

logger = logging.getLogger(__name__)

MAX_BATCH_BYTES = 256 * 1024
RETRY_S = (1.0, 2.0, 5.0, 10.0, 30.0)
# Lines that the server refuses, not because it is down.
REFUSED_FILE = "refused.jsonl"
SPEC_FILE, RUN_ID_FILE, OUTBOX, SENT = "run.json", "run_id", "outbox.jsonl", "sent"


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
    """

    def __init__(self, folder: str | Path, spec: RunSpec | None = None) -> None:
        self.folder = Path(folder).absolute()
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / SPEC_FILE
        if not file.exists():
            write_whole(file, json.dumps(asdict(spec or RunSpec())))
        self.spec = RunSpec(**json.loads(file.read_text()))
        self._mend()
        self._file = (self.folder / OUTBOX).open("ab")
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._idle = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(
            target=self._run, name="rllib_arpo-mlflow", daemon=True
        )
        self._thread.start()
        self._wake.set()

    @property
    def run_id(self) -> str | None:
        """Of the MLflow run; None as long as the server does not know of it."""
        return read_run_id(self.folder)

    @property
    def pending_bytes(self) -> int:
        """What MLflow does not have yet."""
        return (self.folder / OUTBOX).stat().st_size - self._sent()

    def metrics(
        self, values: Mapping[str, float], *, step: int, time_ms: int | None = None
    ) -> None:
        """Values of one step.

        Raises:
            OSError: they cannot be written to disk.
        """
        time_ms = _now_ms() if time_ms is None else time_ms
        self.add("metrics", {"values": dict(values), "step": step, "time_ms": time_ms})

    def params(self, values: Mapping[str, str]) -> None:
        """Parameters; the first value of a name stays."""
        self.add("params", {"values": dict(values)})

    def tags(self, values: Mapping[str, str]) -> None:
        """Tags; the last value of a name stays."""
        self.add("tags", {"values": dict(values)})

    def add(self, kind: str, content: Mapping[str, Any]) -> None:
        """Append a line of a kind that `mlflow_sender.py` knows.

        Raises:
            OSError: it cannot be written to disk.
        """
        line = json.dumps({"kind": kind, **content}, default=str) + "\n"
        with self._lock:
            self._file.write(line.encode())
            self._file.flush()
        self._wake.set()

    def flush(self, timeout_s: float = 30.0) -> bool:
        """Wait until MLflow has everything, or for so long.

        Returns:
            Whether it has.
        """
        self._wake.set()
        with self._idle:
            return self._idle.wait_for(lambda: not self.pending_bytes, timeout_s)

    def close(self, timeout_s: float = 10.0) -> bool:
        """`flush`, then stop; what is left is sent by whoever opens the folder next."""
        done = self.flush(timeout_s)
        self._closing = True
        self._wake.set()
        with self._lock:
            self._file.close()
        if not done:
            logger.warning(
                "MLflow at %s is away: what it lacks waits in %s and is sent by the "
                "next run in this folder or by "
                "rllib_arpo.tracking.mlflow_buffer.send_later",
                self.spec.uri,
                self.folder,
            )
        return done

    def _run(self) -> None:
        failures = 0
        while not self._closing:
            pause = RETRY_S[min(failures, len(RETRY_S)) - 1] if failures else None
            self._wake.wait(pause)
            self._wake.clear()
            try:
                self._send_all()
                failures = 0
            except Exception as error:  # boundary: tracking never stops training
                failures += 1
                log = logger.warning if failures == 1 else logger.debug
                log("MLflow at %s does not answer: %s", self.spec.uri, error)

    def _send_all(self) -> None:
        from rllib_arpo.tracking.mlflow_sender import Sender

        sender = Sender(self.folder, self.spec)
        while not self._closing:
            start = self._sent()
            lines, end = self._read(start)
            if not lines:
                break
            sender.send([json.loads(line) for line in lines])
            write_whole(self.folder / SENT, str(end))
            with self._idle:
                self._idle.notify_all()

    def _sent(self) -> int:
        with suppress(FileNotFoundError):
            return int((self.folder / SENT).read_text())
        return 0

    def _read(self, start: int) -> tuple[list[bytes], int]:
        """Whole lines from a place on, at least one if there is one; where they end."""
        lines, end = [], start
        with (self.folder / OUTBOX).open("rb") as file:
            file.seek(start)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                if lines and end + len(line) - start > MAX_BATCH_BYTES:
                    break
                lines.append(line)
                end += len(line)
        return lines, end

    def _mend(self) -> None:
        """Cut off a last line without an end, which a kill left."""
        file = self.folder / OUTBOX
        if not file.exists():
            return
        content_end = file.stat().st_size
        with file.open("rb+") as opened:
            opened.seek(self._sent())
            whole = opened.read().rfind(b"\n") + 1 + self._sent()
            if whole < content_end:
                opened.truncate(whole)
                os.fsync(opened.fileno())


def read_run_id(folder: str | Path) -> str | None:
    """The MLflow run of a buffer's folder; None as long as there is none."""
    with suppress(FileNotFoundError):
        return (Path(folder) / RUN_ID_FILE).read_text().strip() or None
    return None


def send_later(folder: str | Path, *, timeout_s: float = 60.0) -> bool:
    """Send what a process that ended has left; whether MLflow has everything."""
    return Buffer(folder).close(timeout_s)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
