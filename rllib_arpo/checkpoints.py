"""What `ARPO` saves and how: a checkpoint is whole, or it is not there.

Beside RLlib's own (weights, optimizers, metrics, iteration) the state holds the task
cursor and the number of trees begun. No random generator is saved, because none has a
state: every draw comes from the seed and a number that is saved (a tree's, a weights'
version, an epoch).

RLlib writes into the final folder, its first file first, so that what a killed save
leaves looks like a checkpoint. Here it is written aside (see `storage`). A checkpoint
that Tune was copying to its storage when it was killed is refused by its contents.
"""

import os
import shutil
import tempfile
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch.distributed as dist
from pyarrow.fs import FileSystem, LocalFileSystem
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.utils.annotations import override

from rllib_arpo.data.cursor import Cursor
from rllib_arpo.errors import CheckpointError
from rllib_arpo.storage import (
    fault_of,
    merged_aside,
    readable,
    remove_contents,
    write_contents,
    written_aside,
)

if TYPE_CHECKING:
    from ray.tune import Checkpoint

# In a run's folder; in it iteration_000012 and so on, so that names sort by age.
CHECKPOINTS = "checkpoints"
NOT_REPLACED = "The checkpoint before it is intact."


class Checkpoints(Algorithm):
    """The part of `ARPO` that saves and restores."""

    _cursor: Cursor | None
    _num_trees_started: int

    @override(Algorithm)
    def save_to_path(
        self,
        path: str | Path | None = None,
        *,
        state: dict[str, Any] | None = None,
        filesystem: FileSystem | None = None,
        use_msgpack: bool = False,
    ) -> str:
        """Save a checkpoint, whole or not at all.

        Args:
            path: a new or empty folder, or a checkpoint, which is replaced as a whole;
                or a URI. None takes a new folder among the temporary ones.
            state: saved in place of this algorithm's.
            filesystem: of `path`, if it is no local one and no URI.
            use_msgpack: see RLlib's.

        Returns:
            `path`.

        Raises:
            CheckpointError: a file could not be written, or the folder holds something
                else. What was there before is intact.
        """
        if path is None:
            path = Path(tempfile.gettempdir(), str(uuid.uuid4()))
        found, inner = _locate(path, filesystem)
        if not isinstance(found, LocalFileSystem):
            remove_contents(inner, found)
            super().save_to_path(
                path, state=state, filesystem=filesystem, use_msgpack=use_msgpack
            )
            write_contents(inner, found)
            return str(path)
        target = Path(os.path.realpath(inner))
        self._check_replaceable(target)
        with written_aside(target, intact=NOT_REPLACED) as aside:
            super().save_to_path(str(aside), state=state, use_msgpack=use_msgpack)
            write_contents(str(aside), found)
        return str(path)

    def _check_replaceable(self, target: Path) -> None:
        is_new = not target.exists() or (target.is_dir() and not any(target.iterdir()))
        if not is_new and not (target / self.METADATA_FILE_NAME).is_file():
            raise CheckpointError(
                f"{target} holds other files than a checkpoint, and would be replaced: "
                "save to a new folder"
            )

    @classmethod
    @override(Algorithm)
    def from_checkpoint(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls,
        path: "str | Path | Checkpoint",
        filesystem: FileSystem | None = None,
        **kwargs: Any,
    ) -> Self:
        """Build the algorithm of a checkpoint, at the iteration where it was saved.

        Raises:
            CheckpointError: the checkpoint is not whole.
        """
        if not isinstance(path, str | Path):
            path = path.to_directory()
        path = check_whole(path, filesystem)
        return super().from_checkpoint(path, filesystem, **kwargs)  # type: ignore[return-value]

    @override(Algorithm)
    def restore_from_path(self, path: Any, *args: Any, **kwargs: Any) -> None:
        if kwargs.get("component") is None:
            path = check_whole(path, kwargs.get("filesystem"))
        super().restore_from_path(path, *args, **kwargs)
        # RLlib's own sync is dropped without a word while another is in flight.
        self.sync_weights()

    @override(Algorithm)
    def get_state(
        self, components: Any = None, *, not_components: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        state = super().get_state(components, not_components=not_components, **kwargs)
        state["num_trees_started"] = self._num_trees_started
        if self._cursor is not None:
            state["task_cursor"] = self._cursor.get_state()
        return state

    @override(Algorithm)
    def set_state(self, state: dict[str, Any]) -> None:
        super().set_state(state)
        self._num_trees_started = state.get("num_trees_started", 0)
        if self._cursor is not None and "task_cursor" in state:
            self._cursor.set_state(state["task_cursor"])

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write the trained model as a Hugging Face folder, tokenizer included.

        The first learner writes it, so `folder` must be a path of its machine. A
        folder that is there already keeps its other files.

        Raises:
            CheckpointError: a file could not be written; the folder is as it was.
        """
        folder = Path(folder).absolute()

        def write(learner: Any, *_: Any) -> CheckpointError | None:
            # Put together by all learners, since it may be spread over them.
            state = learner.language_model.export_state()
            if dist.is_initialized() and dist.get_rank() > 0:
                return None
            try:
                with merged_aside(folder) as aside:
                    learner.language_model.save_pretrained(aside, state)
            except CheckpointError as error:
                return error  # raised here, Ray would wrap it into a traceback
            return None

        for error in self._call_learners(write):
            if error is not None:
                raise error
        return folder

    def _call_learners(self, function: Any, **kwargs: Any) -> list[Any]:
        raise NotImplementedError

    def sync_weights(self) -> None:
        """Give the learners' weights to the training EnvRunners."""
        raise NotImplementedError


def check_whole(path: str | Path, filesystem: FileSystem | None = None) -> str:
    """Find a whole checkpoint, or refuse.

    Args:
        path: a folder, or a URI.
        filesystem: of `path`, if it is no local one and no URI.

    Returns:
        The path as RLlib takes it: absolute, or a URI.

    Raises:
        CheckpointError: names what is missing.
    """
    found, inner = _locate(path, filesystem)
    if isinstance(found, LocalFileSystem):
        path = inner = str(readable(Path(inner)))
    fault = fault_of(inner, found)
    if fault is not None:
        raise CheckpointError(
            f"{path} is no whole checkpoint: {fault}. A save or a copy of it may have "
            "been interrupted: take the one before it"
        )
    return str(path)


def newest_checkpoint(run: Path) -> Path | None:
    """The newest whole checkpoint of a run's folder; None if there is none."""
    return max(_whole_checkpoints(run), default=None)


def tidy_checkpoints(run: Path, *, kept: int) -> None:
    """Remove what is no whole checkpoint, and all but the newest `kept` of them."""
    keep = sorted(_whole_checkpoints(run))[-kept:]
    for folder in _folders(run):
        if folder not in keep:
            shutil.rmtree(folder, ignore_errors=True)


def _whole_checkpoints(run: Path) -> list[Path]:
    folders = {readable(folder.with_suffix("")) for folder in _folders(run)}
    return [f for f in folders if fault_of(str(f), LocalFileSystem()) is None]


def _folders(run: Path) -> list[Path]:
    return list((run / CHECKPOINTS).absolute().glob("iteration_*"))


def _locate(path: str | Path, filesystem: FileSystem | None) -> tuple[FileSystem, str]:
    """The file system of a path, and the path in it."""
    if filesystem is None and "://" in str(path):
        filesystem, path = FileSystem.from_uri(str(path))
    if filesystem is None or isinstance(filesystem, LocalFileSystem):
        return LocalFileSystem(), os.path.abspath(path)
    return filesystem, str(path)
