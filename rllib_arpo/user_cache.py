"""What the processes of a user share on one machine, and can make again.

~/.cache/rllib_arpo/KIND/...
"""

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger(__name__)


def user_cache(kind: str) -> Path:
    """The folder for one kind of things; it may not exist yet."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "rllib_arpo" / kind


@contextmanager
def locked(file: Path, what: str) -> Iterator[None]:
    """Hold a lock that ends with the process, whatever happens to it.

    Args:
        file: the lock; made if it is not there, and left.
        what: for the log, if another process holds it: "builds X".

    Raises:
        OSError: the file cannot be opened.
    """
    with file.open("a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("waiting for another process that %s", what)
            fcntl.flock(handle, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(handle, fcntl.LOCK_UN)
