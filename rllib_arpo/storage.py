"""Folders and files that are whole or not there, whatever happens while written.

A folder is written aside, as `NAME.part`, brought to the disk and renamed; a list of
its files with their sizes, written last, lets a reader refuse a copy that broke off.

1. Where a checkpoint stands already, it steps aside as `NAME.before` and goes when the
   new one is in place. A `NAME.before` without `NAME` is read in its place, and put
   back by the next save. Readers change nothing: a writer may be at work.
2. Object stores have no renaming. There the list of files alone says what is whole.
3. The file that a command is to write may be a pipe, as /dev/stdout: it is written to
   as it is.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pyarrow import ArrowException
from pyarrow.fs import FileSelector, FileSystem, FileType
from safetensors import SafetensorError

from rllib_arpo.errors import CheckpointError, ConfigError

CONTENTS_FILE = "contents.json"
ASIDE = ".part"
BEFORE = ".before"
FILE_INTACT = "A file that was there before is intact."
GO_ON = (
    "Free some space there or choose another folder, then go on from the last "
    "checkpoint."
)
ELSEWHERE = "Free some space there or choose another folder."


@contextmanager
def storing(place: Path, *, intact: str, cure: str = GO_ON) -> Iterator[None]:
    """Turn an error of the file system into one that says what to do.

    Args:
        place: what is being written.
        intact: one sentence on what is still there.
        cure: another on what to do.

    Raises:
        CheckpointError: a file could not be written.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or _last_line(error)
        raise CheckpointError(
            f"cannot write {place}: {reason} ({_free(place)}). {intact} {cure}"
        ) from error


def _last_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[-1]


def _free(place: Path) -> str:
    # Not `is_dir`, which raises where a name is too long or a folder is not ours.
    folder = next(path for path in (place, *place.parents) if os.path.isdir(path))
    return f"{shutil.disk_usage(folder).free / 1e6:.1f} MB are free in {folder}"


@contextmanager
def written_aside(target: Path, *, intact: str) -> Iterator[Path]:
    """A folder to write to, which becomes `target` when all is written.

    Args:
        target: not there, empty, or a folder that is to be replaced as a whole.
        intact: one sentence for the error, on what is still there.

    Yields:
        The folder beside it; it does not exist yet.

    Raises:
        CheckpointError: a file could not be written; nothing is left aside.
    """
    aside = _beside(target, ASIDE)
    with storing(target, intact=intact):
        finish_interrupted(target)
        if aside.exists():
            shutil.rmtree(aside)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield aside
            to_disk(aside)
            _put_in_place(aside, target)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            finish_interrupted(target)
            raise


@contextmanager
def merged_aside(target: Path) -> Iterator[Path]:
    """As `written_aside`, but `target` keeps its files of other names.

    Args:
        target: not there, or a folder.

    Yields:
        The folder beside it; it does not exist yet.

    Raises:
        CheckpointError: a file could not be written; `target` is as it was.
    """
    with written_aside(target, intact="What was there before is intact.") as aside:
        yield aside
        for entry in target.iterdir() if target.exists() else ():
            if not os.path.lexists(aside / entry.name):
                _copy(entry, aside / entry.name)


def _copy(entry: Path, copy: Path) -> None:
    """Let a file or a folder have a second place; its data are not copied."""
    if entry.is_dir() and not entry.is_symlink():
        shutil.copytree(entry, copy, symlinks=True, copy_function=_link)
    else:
        _link(entry, copy)


def _link(file: str | Path, copy: str | Path) -> None:
    try:
        os.link(file, copy, follow_symlinks=False)
    except OSError:  # not on every file system
        shutil.copy2(file, copy, follow_symlinks=False)


def write_whole(file: Path, text: str) -> None:
    """Write a file, or leave it as it was.

    Raises:
        CheckpointError: it cannot be written.
    """
    with storing(file, intact=FILE_INTACT), file_aside(file) as aside:
        aside.write_text(text, encoding="utf-8")


@contextmanager
def file_aside(file: Path) -> Iterator[Path]:
    """A file to write to, which becomes `file` once it is on the disk.

    Yields:
        The file beside it.

    Raises:
        OSError: it cannot be written; nothing is left aside.
    """
    aside = _beside(file, ASIDE)
    try:
        yield aside
        _sync(aside)
        os.replace(aside, file)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


@contextmanager
def output_aside(file: Path) -> Iterator[Path]:
    """A file to write to, which becomes the one that a command is to write.

    Args:
        file: its folder is made.

    Yields:
        The file beside it, or `file` itself if it is a pipe or a device.

    Raises:
        CheckpointError: it cannot be written; nothing is left aside.
    """
    with storing(file, intact=FILE_INTACT, cure=ELSEWHERE):
        file.parent.mkdir(parents=True, exist_ok=True)
        if _is_special(file):
            yield file
            return
        with file_aside(file.resolve()) as aside:
            yield aside


def write_output(file: Path, text: str) -> None:
    """Write the file that a command is to write, and its folder.

    Raises:
        CheckpointError: it cannot be written; a file before it is intact.
    """
    with output_aside(file) as aside:
        aside.write_text(text, encoding="utf-8")


def check_output(file: Path, *, flag: str) -> None:
    """Refuse a file that could not be written when the work is done; make its folder.

    Args:
        file: what is to be written.
        flag: where it was given, for the error.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if not _is_special(file):
            tempfile.TemporaryFile(dir=file.resolve().parent).close()
        is_folder = file.is_dir()
    except OSError as error:
        raise ConfigError(
            f"{flag} {file} cannot be written ({error.strerror}): give another file"
        ) from error
    if is_folder:
        raise ConfigError(f"{flag} {file} is a folder: give a file")


def _is_special(file: Path) -> bool:
    return file.exists() and not file.is_file()


def finish_interrupted(target: Path) -> None:
    """Tidy up after a save that was killed while it replaced `target`."""
    before = _beside(target, BEFORE)
    if not before.exists():
        return
    if target.exists():
        shutil.rmtree(before)
    else:
        os.rename(before, target)


def readable(target: Path) -> Path:
    """Where `target` is: a killed save may have left it set aside, still whole."""
    before = _beside(target, BEFORE)
    return before if before.exists() and not target.exists() else target


def _beside(target: Path, ending: str) -> Path:
    return target.with_name(target.name + ending)


def _put_in_place(aside: Path, target: Path) -> None:
    before = _beside(target, BEFORE)
    if target.exists() and any(target.iterdir()):
        os.rename(target, before)
    os.rename(aside, target)
    _sync(target.parent)
    if before.exists():
        shutil.rmtree(before)


def to_disk(folder: Path) -> None:
    """Return when every file and name below `folder` would outlast a power cut."""
    for place, _, names in os.walk(folder):
        for name in names:
            _sync(Path(place, name))
        _sync(Path(place))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_contents(folder: str, filesystem: FileSystem) -> None:
    """Write the list of the files in `folder` and their sizes, as its last file."""
    found = filesystem.get_file_info(FileSelector(folder, recursive=True))
    sizes = {
        os.path.relpath(info.path, folder): info.size
        for info in found
        if info.type == FileType.File
    }
    with filesystem.open_output_stream(f"{folder}/{CONTENTS_FILE}") as file:
        file.write(json.dumps(sizes, indent=2, sort_keys=True).encode())


def remove_contents(folder: str, filesystem: FileSystem) -> None:
    """Mark `folder` as not whole, before it is written anew."""
    contents = f"{folder}/{CONTENTS_FILE}"
    if filesystem.get_file_info(contents).type == FileType.File:
        filesystem.delete_file(contents)


def fault_of(folder: str, filesystem: FileSystem) -> str | None:
    """Why `folder` is no whole checkpoint; None if it is one."""
    try:
        with filesystem.open_input_stream(f"{folder}/{CONTENTS_FILE}") as file:
            sizes = json.loads(file.readall())
    except FileNotFoundError:
        return f"there is no {CONTENTS_FILE} in it"
    except (OSError, ValueError, ArrowException) as error:
        return f"its {CONTENTS_FILE} cannot be read: {error}"
    for name, size in sizes.items():
        found = filesystem.get_file_info(f"{folder}/{name}")
        if found.type != FileType.File:
            return f"it lacks {name}"
        if found.size != size:
            return f"{name} has {found.size} bytes of {size}"
    return None
