"""Indexes on disk: built once by whoever comes first, then only read.

    CORPUS/.rllib_arpo_index/bm25-KEY/      where the corpus' folder can be written
    ~/.cache/rllib_arpo/index/CORPUS-HASH/bm25-KEY/                       elsewhere

1. The key names all that the content depends on: a stale index is not found, and goes
   when nobody has opened it for a week.
2. An index is written aside under a lock and renamed when it is whole. Its files never
   change after that, so readers map them and take no lock.
3. A list of the files with their sizes is written last. An index that differs from
   it, such as a copy that broke off, is built again.
"""

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from rllib_arpo.errors import DataError
from rllib_arpo.user_cache import locked, user_cache

BESIDE = ".rllib_arpo_index"
CONTENTS_FILE = "contents.json"
UNUSED_S = 7 * 24 * 3600.0

logger = logging.getLogger(__name__)


def index_homes(corpus: Path, cache_folder: Path | None) -> list[Path]:
    """Folders that may hold the indexes of a corpus, the preferred one first.

    Args:
        corpus: folder of documents.
        cache_folder: holds the indexes of all corpora; None means beside the corpus,
            or the user's cache folder where that cannot be written.
    """
    place = str(corpus.resolve())
    own = f"{corpus.resolve().name}-{hashlib.sha256(place.encode()).hexdigest()[:12]}"
    if cache_folder is not None:
        return [cache_folder / own]
    return [corpus / BESIDE, user_cache("index") / own]


def stored_index(
    homes: Sequence[Path], kind: str, key: str, build: Callable[[Path], None]
) -> Path:
    """The folder of an index, built when no home holds a whole one.

    Args:
        homes: where to look; the first that can be written is where it is built.
        kind: of index; those of other keys that nobody uses are removed.
        key: of everything that the content depends on, fit for a file name.
        build: fills the empty folder that it is given.

    Raises:
        DataError: it cannot be written; or as `build` raises.
    """
    name = f"{kind}-{key}"
    for home in homes:
        _mark_used(home / name)  # first, or it could be removed after the look at it
        if _is_whole(home / name):
            return home / name
    home = next(filter(_can_write, homes), homes[-1])
    target = home / name
    try:
        home.mkdir(parents=True, exist_ok=True)
        with locked(home / f"{kind}.lock", f"builds {target}"):
            if not _is_whole(target):
                _build_aside(target, build)
                _remove_unused(home, kind)
    except OSError as error:
        raise DataError(
            f"cannot write the search index {target}: {error.strerror or error}. Free "
            "some space there, or choose another folder with `cache_folder`."
        ) from error
    return target


@contextmanager
def building(title: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """A bar on stderr when that is a terminal; call it with the steps just done."""
    console = Console(stderr=True)
    with Progress(
        console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(title, total=total)
        yield lambda steps: bar.advance(task, steps)


def _build_aside(target: Path, build: Callable[[Path], None]) -> None:
    start = time.monotonic()
    logger.info("building the search index %s", target)
    aside = target.with_name(f"{target.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        build(aside)
        sizes = {file.name: file.stat().st_size for file in aside.iterdir()}
        (aside / CONTENTS_FILE).write_text(json.dumps(sizes))
        if target.exists():
            shutil.rmtree(target)
        aside.rename(target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    logger.info("built %s in %.0f s", target, time.monotonic() - start)


def _is_whole(folder: Path) -> bool:
    try:
        sizes = json.loads((folder / CONTENTS_FILE).read_text())
        return all((folder / name).stat().st_size == sizes[name] for name in sizes)
    except (OSError, ValueError):
        return False


def _can_write(home: Path) -> bool:
    folder = next(path for path in (home, *home.parents) if path.is_dir())
    return os.access(folder, os.W_OK | os.X_OK)


def _mark_used(folder: Path) -> None:
    with suppress(OSError):  # of a corpus that is shipped with its index, read-only
        os.utime(folder)


def _remove_unused(home: Path, kind: str) -> None:
    for folder in home.glob(f"{kind}-*"):
        if time.time() - folder.stat().st_mtime > UNUSED_S:
            shutil.rmtree(folder, ignore_errors=True)
