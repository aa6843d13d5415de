"""From a flag to a tracked training or sweep: what `--mlflow` does.

track(config, "runs/x", "default")      -> an MLflow run in that folder's name
sweep_callback(space, folder=..., ...)  -> a parent run, and one per trial
"""

import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from pyarrow.fs import LocalFileSystem

from rllib_arpo.arpo import ARPO
from rllib_arpo.config import ARPOConfig
from rllib_arpo.data.data_file import DataFile
from rllib_arpo.data.files import find_rows
from rllib_arpo.data.mixture import Mixture
from rllib_arpo.errors import ConfigError
from rllib_arpo.tracking.mlflow import MLflowCallback
from rllib_arpo.tracking.mlflow_store import USUAL_STORE, seconds_to_wait

REGISTERED_MODEL = "arpo-agent"
A = TypeVar("A", bound=ARPO)


def track(
    config: ARPOConfig,
    folder: str | Path,
    store: str,
    *,
    name: str | None = None,
    data_files: tuple[str, ...] = (),
    registered_model: str | None = REGISTERED_MODEL,
) -> None:
    """Let a training be tracked in MLflow, beside its other callbacks.

    Args:
        config: gets the callback.
        folder: of the run.
        store: its URI; "default": as in `mlflow_store.tracking_uri`.
        name: of the MLflow run; None: that of the folder.
        data_files: hashed besides those that the config names.
        registered_model: as in `MLflowCallback`.

    Raises:
        ConfigError: MLflow is not installed.
        DataError: a file that the config names is not there.
    """
    given = config.callbacks_class
    callback = partial(
        MLflowCallback,
        folder=folder,
        uri=store_uri(store),
        name=name,
        data_files=(*data_files, *files_of(vars(config))),
        registered_model=registered_model,
    )
    config.callbacks([*(given if isinstance(given, list) else [given]), callback])  # type: ignore[list-item]


@contextmanager
def stopping(algorithm: A) -> Iterator[A]:
    """Stop an algorithm at the end, and let MLflow know how it ended."""
    status = "FAILED"
    try:
        yield algorithm
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        algorithm.stop()
        end_tracking(algorithm, status=status)


def end_tracking(algorithm: ARPO, *, status: str = "FINISHED") -> None:
    """End the MLflow runs of an algorithm, once all is sent if the store answers.

    Args:
        algorithm: stopped or not.
        status: "FINISHED", "FAILED" or "KILLED".
    """
    callbacks = algorithm.callbacks
    for one in callbacks if isinstance(callbacks, list) else [callbacks]:
        if isinstance(one, MLflowCallback) and one.buffer is not None:
            one.close(seconds_to_wait(one.buffer.spec.uri), status=status)


def store_uri(store: str) -> str | None:
    """What a flag means for the callbacks; None is the usual store.

    Raises:
        ConfigError: MLflow is not installed.
    """
    if importlib.util.find_spec("mlflow") is None:
        raise ConfigError(
            'MLflow is not installed: pip install "rllib_arpo[mlflow]", or leave out '
            "--mlflow"
        )
    return None if store == USUAL_STORE else store


def files_of(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """Files on this machine that the tasks of a config come from.

    Args:
        settings: attributes of an `ARPOConfig`, or a search space.

    Raises:
        DataError: one is not there.
    """
    found: dict[str, None] = {}
    for setting in ("train_tasks", "eval_tasks"):
        source = settings.get(setting)
        for one in source.sources if isinstance(source, Mixture) else [source]:
            if isinstance(one, str | Path | DataFile | Mapping):
                for rows in find_rows(DataFile.of(one)):
                    if isinstance(rows.filesystem, LocalFileSystem):
                        found |= dict.fromkeys(rows.paths)
    return tuple(found)
