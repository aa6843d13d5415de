"""Models in MLflow's registry: put an agent there, and get it back.

    register_model("runs/x/model", "almanac")      -> version "1", alias champion
    fetch_model("models:/almanac@champion")        -> its folder and its version

A registered model holds a Hugging Face folder with `agent.pkl` beside the weights, and
answers through `mlflow models serve` too, see `mlflow_model.py`.
"""

import logging
import math
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit

from rllib_arpo.errors import ConfigError
from rllib_arpo.tracking.fetched_models import fetched_model
from rllib_arpo.tracking.mlflow_store import (
    EXPERIMENT,
    experiment_id,
    open_client,
    uploading,
    without_passwords,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)

SCHEME = "models:/"
CHAMPION = "champion"
# Where a registered model holds the agent's folder.
AGENT_FOLDER = "data/agent"
LOCAL = ("", "file")
# Of a version, with the alias: when it took it.
TOOK_TAG = "rllib_arpo.took."
# Between tag and alias, and between the clocks of two machines.
RIVAL_MS = 60_000


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchedModel:
    """A registered model on this machine.

    Attributes:
        folder: Hugging Face files, and `agent.pkl` if it was registered with it. It
            is the store's or the cache's, and not to be changed.
        version: in the registry, such as "3".
    """

    folder: Path
    version: str


def register_model(
    folder: str | Path,
    name: str,
    *,
    alias: str | None = CHAMPION,
    run_id: str | None = None,
    tags: Mapping[str, str] | None = None,
    uri: str | None = None,
) -> str:
    """Copy an agent's folder into the store and register it.

    Args:
        folder: Hugging Face files, with `agent.pkl` if it is to answer with tools.
        name: of the registered model, made when there is none.
        alias: moved to the new version; None moves none.
        run_id: the MLflow run that it came from.
        tags: of the version.
        uri: of the store; None: as in `mlflow_store.tracking_uri`.

    Returns:
        The version.

    Raises:
        ConfigError: the folder holds no model, or the store refuses or is away.
    """
    from rllib_arpo.tracking.mlflow_model import save_model

    if not (Path(folder) / "config.json").is_file():
        raise ConfigError(f"{folder} holds no Hugging Face model: no config.json")
    with _store_errors(f"{folder} cannot be registered as {name!r}"):
        client = open_client(uri)
        with tempfile.TemporaryDirectory() as scratch:
            saved = save_model(folder, Path(scratch) / "model")
            model_id, location = _log_model(client, saved, name, run_id)
        _make_registered(client, name)
        # A server wants to know whose files the source names. A local store looks up
        # the model of a version without a run in the store of the process.
        known = run_id is not None or client.tracking_uri.startswith("http")
        version = client.create_model_version(
            name,
            source=location,
            run_id=run_id,
            tags={**(tags or {}), "model_id": model_id},
            model_id=model_id if known else None,
        ).version
        if alias is not None:
            client.set_registered_model_alias(name, alias, str(version))
    return str(version)


def move_alias_to_better(
    client: "MlflowClient",
    name: str,
    alias: str,
    version: str,
    measures: Sequence[tuple[str, str]],
) -> None:
    """Move an alias to a version, unless that which has it is as good.

    Of versions that take it at the same time, the best one has it in the end.

    Args:
        client: of the registry.
        name: of the registered model.
        alias: such as "champion".
        version: that may take it.
        measures: tags of versions, each with "max" or "min". The first that the alias'
            present version has as a number decides. Where it has none, as when it was
            registered by hand, the alias moves.

    Raises:
        MlflowException: the server is away, or refuses it.
    """
    began_ms = time.time_ns() // 1_000_000
    present = client.get_registered_model(name).aliases.get(alias)
    after = client.get_model_version(name, version).tags
    if present is not None:
        before = client.get_model_version(name, str(present)).tags
        decided = _decided(before, after, measures)
        if decided is not None and not decided.is_better:
            logger.info(
                "version %s of %r is registered; %s stays at version %s, whose %s "
                "is %s and not %s",
                *(version, name, alias, present),
                *(decided.tag, before[decided.tag], after.get(decided.tag)),
            )
            return
    took = TOOK_TAG + alias
    client.set_model_version_tag(name, version, took, str(time.time_ns() // 1_000_000))
    moved_to = None
    while moved_to != version:
        client.set_registered_model_alias(name, alias, version)
        moved_to = version
        # Others may have taken it since it was read above. They tag themselves first,
        # so that whoever sets it last knows of all.
        for rival in client.search_model_versions(f"name='{name}'"):
            since_ms = _number(rival.tags.get(took))
            if since_ms is None or since_ms < began_ms - RIVAL_MS:
                continue
            decided = _decided(after, rival.tags, measures)
            if decided is not None and decided.is_better:
                version, after = str(rival.version), rival.tags


class _Decided(NamedTuple):
    """By which measure of two versions, and whether the second one is better."""

    tag: str
    is_better: bool


def _decided(
    before: Mapping[str, str],
    after: Mapping[str, str],
    measures: Sequence[tuple[str, str]],
) -> _Decided | None:
    for tag, mode in measures:
        to_beat, reached = _number(before.get(tag)), _number(after.get(tag))
        if to_beat is not None:
            return _Decided(
                tag, reached is not None and _is_better(reached, to_beat, mode)
            )
    return None


def _is_better(reached: float, to_beat: float, mode: str) -> bool:
    return reached > to_beat if mode == "max" else reached < to_beat


def _number(text: str | None) -> float | None:
    """Of a tag, which anybody may have written; None: it is no finite number."""
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def fetch_model(uri: str) -> FetchedModel:
    """The agent's folder of a registered model; fetched if the store is not local.

    Args:
        uri: "models:/name@alias" or "models:/name/3", in the store that the
            environment names.

    Raises:
        ConfigError: it is no such URI, there is no such model, it was not registered by
            `register_model`, the store is away, or the cache cannot be written.
    """
    name, _ = _parse(uri)
    version = model_version(uri)
    with _store_errors(f"{uri} cannot be fetched"):
        client = open_client()
        local = _local(client, name, version)
    folder = local / AGENT_FOLDER
    if not folder.is_dir():
        raise ConfigError(
            f"{uri} holds no agent: register it with rllib_arpo.tracking.registry"
        )
    return FetchedModel(folder=folder, version=version)


def model_version(uri: str) -> str:
    """The version that a URI of a registered model means now, such as "3".

    Raises:
        ConfigError: it is no such URI, there is no such model, or the store is away.
    """
    name, which = _parse(uri)
    with _store_errors(f"{uri} cannot be found"):
        client = open_client()
        if which.isdecimal():
            return str(client.get_model_version(name, which).version)
        return str(client.get_model_version_by_alias(name, which).version)


def _parse(uri: str) -> tuple[str, str]:
    """Name, and version or alias."""
    body = uri.removeprefix(SCHEME)
    name, alias_mark, alias = body.partition("@")
    if not alias_mark:
        name, _, alias = body.partition("/")
    wanted = bool(alias) if alias_mark else alias.isdecimal()
    if not uri.startswith(SCHEME) or not name or not wanted or "/" in name + alias:
        raise ConfigError(
            f"{uri!r} names no registered model: give {SCHEME}NAME@ALIAS or "
            f"{SCHEME}NAME/VERSION"
        )
    return name, alias


def _local(client: "MlflowClient", name: str, version: str) -> Path:
    """The files of a version: those of the store, or fetched ones."""
    from mlflow.artifacts import download_artifacts

    place = client.get_model_version_download_uri(name, version)
    fetch = partial(download_artifacts, place, tracking_uri=client.tracking_uri)
    if urlsplit(place).scheme in LOCAL:
        return Path(fetch())
    folder = fetched_model(
        name,
        f"{client.tracking_uri} {place}",
        lambda folder: fetch(dst_path=str(folder)),
    )
    # It may be in a folder that is called as the last part of the place.
    return next((file.parent for file in folder.rglob("MLmodel")), folder)


def _log_model(
    client: "MlflowClient", saved: Path, name: str, run_id: str | None
) -> tuple[str, str]:
    """Put a saved model into the store, or leave none; its id and its place there."""
    from mlflow.exceptions import MlflowException

    if run_id is None:
        experiment = experiment_id(client, EXPERIMENT)
    else:
        experiment = client.get_run(run_id).info.experiment_id
    logged = client.create_logged_model(experiment, name=name, source_run_id=run_id)
    try:
        with uploading():
            client.log_model_artifacts(logged.model_id, str(saved))
        client.finalize_logged_model(logged.model_id, "READY")
    except BaseException:
        with suppress(MlflowException, OSError):
            client.delete_logged_model(logged.model_id)
        raise
    return logged.model_id, logged.artifact_location


def _make_registered(client: "MlflowClient", name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


@contextmanager
def _store_errors(what: str) -> Iterator[None]:
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (MlflowException, OSError) as error:
        raise ConfigError(f"{what} (MLflow): {without_passwords(error)}") from error
