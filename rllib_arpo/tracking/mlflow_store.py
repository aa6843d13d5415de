"""Which MLflow store: the usual variables, or a sqlite file in this folder.

Without `MLFLOW_TRACKING_URI` runs and models are in `mlruns.db` of the working folder,
their files in `mlruns/` beside it.
"""

import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow import MlflowClient

# What a flag calls it.
USUAL_STORE = "default"
DATABASE = "mlruns.db"
EXPERIMENT = "rllib-arpo"
# At the end of a run: for a store that is away, and for one that gets a large model.
WAIT_FOR_NONE_S, WAIT_FOR_MODEL_S = 5.0, 600.0
# A server that hangs is tried again later, by us: its client would wait for minutes,
# and make a run twice that a slow server has made already.
PATIENCE = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
}
# For one file: a server in between answers when its own store has all of it.
UPLOAD_TIMEOUT_S = 600
_PASSWORD = re.compile(r"(?<=://)([^\s:/@]*):\S*@")
_PASSWORD_OPTION = re.compile(r"([?&]\w*password=)[^\s&]*", re.IGNORECASE)


def tracking_uri(uri: str | None = None) -> str:
    """The store: `uri`, else that of the environment, else the local file."""
    local = f"sqlite:///{Path.cwd() / DATABASE}"
    return uri or os.environ.get("MLFLOW_TRACKING_URI") or local


def open_client(uri: str | None = None) -> "MlflowClient":
    """A client of the store, and of its registry unless MLFLOW_REGISTRY_URI is set."""
    from mlflow import MlflowClient

    for name, value in PATIENCE.items():
        os.environ.setdefault(name, value)
    uri = tracking_uri(uri)
    return MlflowClient(
        tracking_uri=uri, registry_uri=os.environ.get("MLFLOW_REGISTRY_URI") or uri
    )


def without_passwords(said: object) -> str:
    """A URI, or a text with some, for people: `scheme://user:***@host`."""
    return _PASSWORD_OPTION.sub(r"\1***", _PASSWORD.sub(r"\1:***@", str(said)))


class _Uploads:
    """Those of this process that are under way."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num = 0
        self._before: str | None = None

    def begin(self) -> None:
        from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_TIMEOUT as TIMEOUT

        with self._lock:
            self._num += 1
            if self._num == 1:
                self._before = TIMEOUT.get_raw()
                TIMEOUT.set(max(TIMEOUT.get(), UPLOAD_TIMEOUT_S))

    def end(self) -> None:
        from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_TIMEOUT as TIMEOUT

        with self._lock:
            self._num -= 1
            if self._num == 0:
                TIMEOUT.unset() if self._before is None else TIMEOUT.set(self._before)


_UPLOADS = _Uploads()


@contextmanager
def uploading() -> Iterator[None]:
    """Wait for a store as long as a large file needs.

    MLflow reads its timeout from the environment at every request, so that it is longer
    for all threads until the last upload of the process ends. Training waits for none.
    """
    _UPLOADS.begin()
    try:
        yield
    finally:
        _UPLOADS.end()


def seconds_to_wait(uri: str) -> float:
    """For what is left to be sent at an end: little when the store does not answer."""
    return WAIT_FOR_MODEL_S if answers(uri) else WAIT_FOR_NONE_S


def answers(uri: str) -> bool:
    """Whether a store does, to a question that costs little."""
    from mlflow.exceptions import MlflowException

    try:
        open_client(uri).search_experiments(max_results=1)
    except (MlflowException, OSError):
        return False
    return True


def experiment_id(client: "MlflowClient", name: str) -> str:
    """The experiment of that name, made when there is none."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return client.create_experiment(name, _artifacts_beside(client))
        except MlflowException:  # another process was faster, or the store is lost
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    return found.experiment_id


def _artifacts_beside(client: "MlflowClient") -> str | None:
    """The folder for artifacts of a sqlite file; a server has its own."""
    scheme = "sqlite:///"
    uri = client.tracking_uri
    if not uri.startswith(scheme):
        return None
    return (Path(uri.removeprefix(scheme)).absolute().parent / "mlruns").as_uri()


def import_mlflow() -> None:
    """Import what a registry needs, before threads do.

    Two that import MLflow for the first time at once leave it half imported, for good.
    """
    import mlflow.artifacts
    import mlflow.entities
    import mlflow.pyfunc  # noqa: F401
