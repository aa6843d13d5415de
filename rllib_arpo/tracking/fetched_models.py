"""Files of a remote registry's models: fetched once to a machine, whoever asks.

    ~/.cache/rllib_arpo/models/NAME/KEY/

1. The key names the store and the place of a version there, whose files never change.
2. They are written aside under a lock, and in place when all are there.
3. Of each name the `KEPT` versions that were asked for last stay, and those of the last
   hour, which somebody may be about to read.
"""

import hashlib
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from rllib_arpo.storage import ASIDE, to_disk
from rllib_arpo.user_cache import locked, user_cache

KEPT = 2
IN_USE_S = 3600.0


def fetched_model(name: str, place: str, fetch: Callable[[Path], object]) -> Path:
    """The folder with a version's files.

    Args:
        name: of the registered model.
        place: of the version, in this and no other store.
        fetch: fills the folder that it is given.

    Raises:
        OSError: the cache cannot be written; or as `fetch` raises. Nothing is left.
    """
    home = user_cache("models") / name
    target = home / hashlib.sha256(place.encode()).hexdigest()[:16]
    home.mkdir(parents=True, exist_ok=True)
    with locked(home / "lock", f"fetches {name}"):
        if not target.exists():
            aside = target.with_name(target.name + ASIDE)
            try:
                # Another process may have been killed while it wrote there.
                shutil.rmtree(aside, ignore_errors=True)
                aside.mkdir()
                fetch(aside)
                to_disk(aside)
                aside.rename(target)
            finally:
                shutil.rmtree(aside, ignore_errors=True)
        os.utime(target)
        _remove_unused(home)
    return target


def _remove_unused(home: Path) -> None:
    found = [folder for folder in home.iterdir() if folder.is_dir()]
    found.sort(key=lambda folder: folder.stat().st_mtime, reverse=True)
    for folder in found[KEPT:]:
        if time.time() - folder.stat().st_mtime > IN_USE_S:
            shutil.rmtree(folder, ignore_errors=True)
