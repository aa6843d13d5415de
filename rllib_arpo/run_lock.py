"""One process at a time works in a folder, such as that of a run.

A lock of `lockf`, not of `flock`: a forked child does not share it, so that none holds
it on when its parent was killed, and network file systems know it.
"""

import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rllib_arpo.errors import ConfigError
from rllib_arpo.storage import storing

LOCK_FILE = "lock"

logger = logging.getLogger(__name__)


@contextmanager
def only_here(
    folder: Path,
    *,
    does: str = "trains",
    cure: str = "wait for its end, or stop it, or choose another --out",
) -> Iterator[None]:
    """Keep other processes out of a folder; whatever ends this one lets them in.

    Nothing keeps this process out: what it opens twice, it loses at the first end.

    Args:
        folder: of a run, for example; made if it is not there. The lock is a file in
            it, which is left.
        does: for the error, what another process does there.
        cure: likewise, what to do about it.

    Raises:
        ConfigError: another process is there.
        CheckpointError: folder or file cannot be made.
    """
    file = folder / LOCK_FILE
    with storing(file, intact="What was there before is intact."):
        folder.mkdir(parents=True, exist_ok=True)
        handle = file.open("a+b", buffering=0)
    with handle:
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.seek(0)
            holder = handle.read().decode() or "it has not said which"
            raise ConfigError(
                f"another process {does} in {folder} ({holder}): {cure}"
            ) from None
        except OSError as error:
            logger.warning(
                "%s cannot be locked (%s): see to it yourself that no other process "
                "%s there",
                *(folder, error.strerror, does),
            )
        # A full disk does not matter here: what comes next may make room.
        with suppress(OSError):
            handle.truncate(0)
            handle.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield
