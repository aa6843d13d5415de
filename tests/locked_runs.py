"""Locks of a run's folder, as another process holds and sees them."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rllib_arpo.run_lock import LOCK_FILE

# Not our own code, which takes ten seconds to import.
LOCK = """
import fcntl, sys
lock = open(sys.argv[1], "a")
try:
    fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    print("taken", flush=True)
except BlockingIOError:
    print("refused", flush=True)
sys.stdin.read()
"""


def start_locking(folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", LOCK, str(folder / LOCK_FILE)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def is_locked(folder: Path) -> bool:
    """Whether another process could not train there."""
    said, _ = start_locking(folder).communicate("")
    return said == "refused\n"


@contextmanager
def locked_by_another(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with start_locking(folder) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "taken\n"
        yield
        process.communicate("")
