"""Where a tool cache keeps its outcomes: one SQLite file, shared by a node's processes.

    entries   what a call gave, by key        claims   who is making a call right now

1. A claim ends with its call. One whose owner died is free at once on the same host,
   elsewhere when its lease ran out; the owner of a long call renews the lease.
2. A claim whose call failed stays for a moment with the failure, for those who waited.
3. When an entry was last used is written in batches: a hit writes nothing.

Nothing here is asynchronous; a `CacheStore` is used by one thread.
"""

import hashlib
import json
import os
import socket
import sqlite3
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil

from rllib_arpo.errors import ToolError, ToolTimeoutError
from rllib_arpo.tools.cache_file import CacheFile, pragma, transaction

Kind = Literal["found", "empty", "error", "timeout"]

LEASE_S = 30.0
FAILURE_S = 5.0  # longer than a waiter's pause between two looks
MAX_TOUCHED = 4096  # uses that are not written yet
ENTRY_BYTES = 200  # of an entry besides its texts
FREED_SHARE = 0.02  # of the limit, freed beyond it: evictions come in batches
_HOST = socket.gethostname()


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """What is asked for.

    Attributes:
        digest: SHA-256 of the other three.
        backend: who answers.
        version: of its index or settings.
        arguments: JSON with sorted keys, for people to read.
    """

    digest: bytes
    backend: str
    version: str
    arguments: str

    @classmethod
    def of(cls, backend: str, version: str, arguments: Mapping[str, Any]) -> "Key":
        """The same for equal arguments, whatever the order of their keys."""
        whole = json.dumps([backend, version, arguments], sort_keys=True)
        readable = json.dumps(arguments, sort_keys=True, ensure_ascii=False)
        return cls(
            digest=hashlib.sha256(whole.encode("ascii")).digest(),
            backend=backend,
            version=version,
            # A lone surrogate is no text to SQLite.
            arguments=readable.encode("utf-8", "backslashreplace").decode(),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a call ended.

    Attributes:
        kind: "error" and "timeout" are a `ToolError` and a `ToolTimeoutError`.
        text: what was found, or the error's message.
        retryable: of the error.
    """

    kind: Kind
    text: str
    retryable: bool = False

    @classmethod
    def of_error(cls, error: ToolError) -> "Outcome":
        kind = "timeout" if isinstance(error, ToolTimeoutError) else "error"
        return cls(kind=kind, text=str(error), retryable=error.retryable)

    @property
    def failed(self) -> bool:
        return self.kind in ("error", "timeout")

    def result(self) -> str:
        """The text found, or the error raised again."""
        if self.kind == "timeout":
            raise ToolTimeoutError(self.text, retryable=self.retryable)
        if self.kind == "error":
            raise ToolError(self.text, retryable=self.retryable)
        return self.text


@dataclass(frozen=True, slots=True)
class Claimed:
    """Somebody else is making the call."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Keeping:
    """What is kept, and for how long.

    Attributes:
        max_bytes: of the file; the least recently used go first. None: no limit.
        life_s: seconds that an entry is good for; None: for ever.
        empty_life_s: the same for an empty one.
        failures: whether they are kept; the first outcome of a key is then final.
    """

    max_bytes: int | None = None
    life_s: float | None = None
    empty_life_s: float | None = None
    failures: bool = False


class CacheStore:
    """Outcomes and claims in a file, which is opened at the first use.

    Every method may raise what `CacheFile.run` raises.

    Args:
        path: of the file.
        keeping: what is kept.
        read_only: nothing is ever written.
        clock: seconds since the epoch.
    """

    def __init__(
        self,
        path: Path,
        keeping: Keeping,
        *,
        read_only: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.file = CacheFile(path, read_only=read_only)
        self.keeping = keeping
        self._clock = clock
        self._touched: dict[bytes, float] = {}

    def find(self, key: Key) -> Outcome | None:
        """What is kept for a key and still good."""
        return self.file.run(lambda db: self._found(db, key, self._clock()))

    def ask(self, key: Key, owner: str, since_s: float) -> Outcome | Claimed | None:
        """The outcome, that another is about to have it, or None: make the call.

        Args:
            key: what is asked for.
            owner: who asks, unique to this call.
            since_s: when it began to ask. An outcome that is younger counts whatever
                it is: a failure, or one with no time to live.
        """

        def work(db: sqlite3.Connection) -> Outcome | Claimed | None:
            if len(self._touched) >= MAX_TOUCHED:
                with transaction(db):
                    self._write_touched(db)
            state = self._state(db, key, since_s)
            if state is not None:
                return state
            with transaction(db):
                state = self._state(db, key, since_s)
                if state is None:
                    db.execute(
                        "INSERT OR REPLACE INTO claims VALUES (?, ?, ?, ?, ?, NULL)",
                        (key.digest, owner, _HOST, os.getpid(), self._lease()),
                    )
            return state

        return self.file.run(work)

    def renew(self, key: Key, owner: str) -> None:
        """Say that the owner is still at it."""
        self.file.run(
            lambda db: db.execute(
                "UPDATE claims SET lease_s = ? WHERE key = ? AND owner = ?",
                (self._lease(), key.digest, owner),
            )
        )

    def release(self, key: Key, owner: str) -> None:
        """End a claim without an outcome, so that others may try; none is fine."""
        self.file.run(lambda db: _end_claim(db, key, owner))

    def finish(self, key: Key, owner: str, outcome: Outcome) -> Outcome:
        """End a claim with its outcome; which outcome counts."""

        def work(db: sqlite3.Connection) -> Outcome:
            with transaction(db):
                counts = self._keep(db, key, outcome)
                now = self._clock()
                if outcome.failed and not self.keeping.failures:
                    note = [outcome.kind, outcome.text, outcome.retryable]
                    db.execute(
                        "UPDATE claims SET failure = ?, lease_s = ? "
                        "WHERE key = ? AND owner = ?",
                        (json.dumps(note), now + FAILURE_S, key.digest, owner),
                    )
                else:
                    _end_claim(db, key, owner)
                db.execute("DELETE FROM claims WHERE lease_s < ?", (now,))
                self._write_touched(db)
                self._evict(db)
            return counts

        return self.file.run(work)

    def forget_failures(self) -> int:
        """Remove the failures that were kept; how many."""
        delete = "DELETE FROM entries WHERE kind IN ('error', 'timeout')"
        return self.file.run(lambda db: db.execute(delete).rowcount)

    def close(self) -> None:
        """Write what is left to write and close the file; the next use opens it."""
        if not self.file.is_open:
            return
        with suppress(sqlite3.Error):
            self.file.run(self._write_touched)
        self.file.close()

    def _found(
        self, db: sqlite3.Connection, key: Key, since_s: float
    ) -> Outcome | None:
        row = db.execute(
            "SELECT kind, value, retryable, created_s FROM entries WHERE key = ?",
            (key.digest,),
        ).fetchone()
        if row is None:
            return None
        kind, value, retryable, created_s = row
        outcome = Outcome(
            kind=kind,
            text=value.decode("utf-8", "surrogatepass"),
            retryable=bool(retryable),
        )
        keeping = self.keeping
        if outcome.failed and not keeping.failures:
            return None
        life_s = keeping.empty_life_s if kind == "empty" else keeping.life_s
        now = self._clock()
        if life_s is not None and now >= created_s + life_s and created_s <= since_s:
            return None
        if keeping.max_bytes is not None:
            self._touched[key.digest] = now
        return outcome

    def _state(
        self, db: sqlite3.Connection, key: Key, since_s: float
    ) -> Outcome | Claimed | None:
        outcome = self._found(db, key, since_s)
        if outcome is not None:
            return outcome
        row = db.execute(
            "SELECT host, pid, lease_s, failure FROM claims WHERE key = ?",
            (key.digest,),
        ).fetchone()
        if row is None:
            return None
        host, pid, lease_s, failure = row
        if failure is not None:
            if lease_s - FAILURE_S <= since_s:
                return None
            kind, text, retryable = json.loads(failure)
            return Outcome(kind=kind, text=text, retryable=retryable)
        alive = self._clock() < lease_s and (host != _HOST or _runs(pid))
        return Claimed() if alive else None

    def _keep(self, db: sqlite3.Connection, key: Key, outcome: Outcome) -> Outcome:
        if self.keeping.failures:
            first = self._found(db, key, self._clock())
            if first is not None:
                return first
        elif outcome.failed:
            return outcome
        value = outcome.text.encode("utf-8", "surrogatepass")
        size = len(value) + len(key.arguments) + ENTRY_BYTES
        if self.keeping.max_bytes is None or size < self.keeping.max_bytes:
            now = self._clock()
            row = (key.digest, key.backend, key.version, key.arguments, outcome.kind)
            db.execute(
                "INSERT OR REPLACE INTO entries VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (*row, value, outcome.retryable, size, now, now),
            )
        return outcome

    def _write_touched(self, db: sqlite3.Connection) -> None:
        db.executemany(
            "UPDATE entries SET used_s = ? WHERE key = ?",
            [(used_s, digest) for digest, used_s in self._touched.items()],
        )
        self._touched.clear()

    def _evict(self, db: sqlite3.Connection) -> None:
        """Remove the least recently used entries of a file above its limit."""
        limit = self.keeping.max_bytes
        if limit is None:
            return
        pages = pragma(db, "page_count") - pragma(db, "freelist_count")
        excess = pages * pragma(db, "page_size") - limit
        if excess <= 0:
            return
        excess += int(limit * FREED_SHARE)
        oldest: list[tuple[bytes]] = []
        for digest, size in db.execute("SELECT key, size FROM entries ORDER BY used_s"):
            oldest.append((digest,))
            excess -= size
            if excess <= 0:
                break
        db.executemany("DELETE FROM entries WHERE key = ?", oldest)

    def _lease(self) -> float:
        return self._clock() + LEASE_S


def _end_claim(db: sqlite3.Connection, key: Key, owner: str) -> None:
    db.execute("DELETE FROM claims WHERE key = ? AND owner = ?", (key.digest, owner))


def _runs(pid: int) -> bool:
    """Whether a process of this host lives; one that nobody buried does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True
