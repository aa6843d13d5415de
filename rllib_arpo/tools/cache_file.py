"""The SQLite file of a tool cache, shared by the processes of a node.

1. It is opened at the first use; a process opens its own after a fork.
2. A file that turns out to be broken is set aside and begun anew, by the one process
   that comes first; a file of another kind is refused.
3. It must lie on a local disk: SQLite's write-ahead log needs shared memory.
"""

import fcntl
import logging
import os
import sqlite3
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from rllib_arpo.errors import ConfigError

T = TypeVar("T")

APPLICATION_ID = 0x4152504F  # "ARPO"
SCHEMA_VERSION = 1
SCHEMA = (
    "CREATE TABLE entries (key BLOB PRIMARY KEY, backend TEXT NOT NULL, "
    "version TEXT NOT NULL, arguments TEXT NOT NULL, kind TEXT NOT NULL, "
    "value BLOB NOT NULL, retryable INTEGER NOT NULL, size INTEGER NOT NULL, "
    "created_s REAL NOT NULL, used_s REAL NOT NULL)",
    "CREATE INDEX entries_by_use ON entries (used_s)",
    "CREATE TABLE claims (key BLOB PRIMARY KEY, owner TEXT NOT NULL, "
    "host TEXT NOT NULL, pid INTEGER NOT NULL, lease_s REAL NOT NULL, "
    "failure TEXT) WITHOUT ROWID",
    f"PRAGMA application_id = {APPLICATION_ID}",
    f"PRAGMA user_version = {SCHEMA_VERSION}",
)
BUSY_S = 5.0
_BROKEN = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)

logger = logging.getLogger(__name__)


class CacheFile:
    """A connection to the file, used by one thread.

    Args:
        path: made when it is not there, its folder too.
        read_only: nothing is ever written, and a broken file stays where it is.
    """

    def __init__(self, path: Path, *, read_only: bool) -> None:
        self.path = path
        self.read_only = read_only
        self._db: sqlite3.Connection | None = None
        self._inode = 0
        self._disconnect: Callable[[], object] = lambda: None

    def run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """What `work` returns; it runs again when the file had to be begun anew.

        Raises:
            ConfigError: the file is no tool cache, or missing when it is only read.
            sqlite3.Error: the disk, another process or (read only) the file.
            OSError: the folder cannot be written.
        """
        try:
            return work(self._open())
        except sqlite3.DatabaseError as error:
            if self.read_only or not _is_broken(error):
                raise
            self._set_aside()
            return work(self._open())

    @property
    def is_open(self) -> bool:
        return self._db is not None

    def close(self) -> None:
        """Close the connection; the next use opens one."""
        self._db = None
        self._disconnect()

    def _open(self) -> sqlite3.Connection:
        if self._db is None:
            if self.read_only:
                self._db = _connect_read_only(self.path)
            else:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with _locked(self.path):
                    self.path.touch()
                    self._inode = self.path.stat().st_ino
                    self._db = _connect(self.path)
            self._disconnect = weakref.finalize(self, _close, self._db, os.getpid())
        return self._db

    def _set_aside(self) -> None:
        """Rename the broken file, unless another process did so already."""
        self.close()
        with _locked(self.path):
            if not self.path.exists() or self.path.stat().st_ino != self._inode:
                return
            aside = f"{self.path.name}.broken-{time.time_ns()}"
            for suffix in ("", "-wal", "-shm"):
                part = self.path.with_name(self.path.name + suffix)
                if part.exists():
                    part.rename(self.path.with_name(aside + suffix))
        logger.warning(
            "the tool cache %s is broken: it was renamed to %s and is begun anew",
            self.path,
            aside,
        )


def check_file(path: Path, *, to_replay: bool) -> None:
    """Refuse a file that cannot be a cache, before any work starts.

    Raises:
        ConfigError: it is something else; or, to replay it, missing, empty or broken.
    """
    if not to_replay and not path.exists():
        return
    try:
        try:
            db = _connect_read_only(path)
        except ConfigError:
            if to_replay or path.is_dir():
                raise
            return  # another process has set it aside since
        try:
            is_whole = _is_ours(db, path)
        finally:
            db.close()
    except sqlite3.Error as error:
        if to_replay:
            raise ConfigError(
                f"the tool cache {path} cannot be replayed: {error}"
            ) from error
        return  # set aside at the first use
    if to_replay and not is_whole:
        raise ConfigError(f"the tool cache {path} is empty: record one first")


def _connect(file: Path) -> sqlite3.Connection:
    db = sqlite3.connect(
        file, timeout=BUSY_S, isolation_level=None, check_same_thread=False
    )
    try:
        ours = _is_ours(db, file)
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = NORMAL")
        if not ours:
            with transaction(db):
                for statement in SCHEMA:
                    db.execute(statement)
    except BaseException:
        db.close()
        raise
    return db


def _connect_read_only(path: Path) -> sqlite3.Connection:
    if not path.is_file():
        raise ConfigError(f"there is no tool cache {path}: record one first")
    # On a read-only medium SQLite cannot make its files of locks, and nobody writes.
    fixed = "" if os.access(path.parent, os.W_OK) else "&immutable=1"
    return sqlite3.connect(
        f"{path.absolute().as_uri()}?mode=ro{fixed}",
        uri=True,
        timeout=BUSY_S,
        isolation_level=None,
        check_same_thread=False,
    )


def _is_broken(error: sqlite3.Error) -> bool:
    """Whether the file, rather than the disk or the moment, is at fault."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in _BROKEN


def _is_ours(db: sqlite3.Connection, file: Path) -> bool:
    """Whether a file is a tool cache; False when it is empty.

    Raises:
        ConfigError: it is something else.
    """
    db.execute("BEGIN")  # or another process could make the tables in between
    try:
        application, version = pragma(db, "application_id"), pragma(db, "user_version")
        tables = db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    finally:
        if db.in_transaction:
            db.execute("ROLLBACK")
    if (application, version) == (APPLICATION_ID, SCHEMA_VERSION):
        return True
    if (application, version, tables) == (0, 0, 0):
        return False
    raise ConfigError(
        f"{file} is no tool cache of this version of rllib_arpo (application "
        f"{application}, version {version}; expected {APPLICATION_ID}, "
        f"{SCHEMA_VERSION}): name another file"
    )


def pragma(db: sqlite3.Connection, name: str) -> int:
    """The value of a numeric setting."""
    return db.execute(f"PRAGMA {name}").fetchone()[0]


def _close(db: sqlite3.Connection, pid: int) -> None:
    """Close a connection, but not a parent's after a fork."""
    if os.getpid() == pid:
        db.close()


@contextmanager
def transaction(db: sqlite3.Connection) -> Iterator[None]:
    """All or nothing, and alone among the writers."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Alone among the processes that open or set aside a file."""
    with open(file.with_name(file.name + ".lock"), "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
