"""From the lines of a buffer to calls of MLflow: the thread's side.

A call that fails because of the server is raised, and tried again; a line that MLflow
refuses (an illegal name, a deleted run) goes to `refused.jsonl`, so that it does not
hold up the others.
"""

import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rllib_arpo.errors import CheckpointError, ConfigError
from rllib_arpo.storage import write_whole
from rllib_arpo.tracking.mlflow_buffer import RUN_ID_FILE, RunSpec, read_run_id
from rllib_arpo.tracking.mlflow_store import (
    experiment_id,
    open_client,
    without_passwords,
)
from rllib_arpo.tracking.mlflow_traces import send_trace
from rllib_arpo.tracking.registry import move_alias_to_better, register_model

logger = logging.getLogger(__name__)

KEY_TAG = "rllib_arpo.buffer"
PARENT_TAG = "mlflow.parentRunId"
# Of a model version: the line that it came from.
LINE_TAG = "rllib_arpo.line"
REFUSED_FILE = "refused.jsonl"
MAX_REFUSED_BYTES = 1 << 20
# Of MLflow's REST interface, for one call.
MAX_METRICS, MAX_PARAMS, MAX_TAGS = 1000, 100, 100
MAX_PARAM_CHARS, MAX_TAG_CHARS = 6000, 5000
# Not for one value of many.
REFUSALS_OF_ALL = (
    "RESOURCE_DOES_NOT_EXIST",
    "RESOURCE_ALREADY_EXISTS",
    "INVALID_STATE",
)
# In MLflow's error when a server does not say which version it has.
NO_ANSWER = "could not identify"
REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", *REFUSALS_OF_ALL)


class ParentMissingError(Exception):
    """The parent run is not there yet; it is tried again."""


class Sender:
    """Sends lines to one run, which it makes first if there is none.

    Args:
        folder: of the buffer.
        spec: of the run.
        gives_up: refuse the first line that fails, whatever the reason: for one that
            holds up the others of a store that answers.
    """

    def __init__(self, folder: Path, spec: RunSpec, *, gives_up: bool = False) -> None:
        self._gives_up = gives_up
        self._folder = folder
        self._spec = spec
        self._client = open_client(spec.uri)
        self._run_id = ""
        self._experiment = ""
        self._has_refused = False

    def send(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Send lines in order.

        Raises:
            MlflowException: the server is away; nothing is lost by sending all again.
        """
        if not lines:
            return
        if not self._run_id:
            self._open_run(lines[0]["time_ms"])
        numbers = [line for line in lines if line["kind"] == "metrics"]
        self._or_refuse(self._metrics, numbers)
        for line in lines:
            if line["kind"] != "metrics":
                self._or_refuse(self._one, [line])
        self._gives_up = False

    def _open_run(self, start_ms: int) -> None:
        from mlflow.exceptions import MlflowException

        run_id = self._find_run() or self._make_run(start_ms)
        try:
            run = self._client.get_run(run_id)
        except MlflowException as error:
            gone = error.error_code == "RESOURCE_DOES_NOT_EXIST"
            if not gone or self._spec.run_id is not None:
                raise
            # The store is another one by now: a database that was deleted.
            run = self._client.get_run(self._make_run(start_ms))
        self._run_id = run.info.run_id
        self._experiment = run.info.experiment_id

    def _find_run(self) -> str | None:
        known = self._spec.run_id or read_run_id(self._folder)
        if known is not None:
            return known
        found = self._client.search_runs(
            [experiment_id(self._client, self._spec.experiment)],
            f"tags.`{KEY_TAG}` = '{self._spec.key}'",
            max_results=1,
        )
        return self._noted(found[0].info.run_id) if found else None

    def _make_run(self, start_ms: int) -> str:
        tags = {**self._spec.tags, KEY_TAG: self._spec.key}
        if self._spec.parent is not None:
            parent = read_run_id(self._spec.parent)
            if parent is None:
                raise ParentMissingError(f"no run in {self._spec.parent} yet")
            tags[PARENT_TAG] = parent
        run = self._client.create_run(
            experiment_id(self._client, self._spec.experiment),
            start_time=start_ms,
            tags=tags,
            run_name=self._spec.name or None,
        )
        return self._noted(run.info.run_id)

    def _noted(self, run_id: str) -> str:
        with suppress(CheckpointError):  # a full disk: it is found again by its tag
            write_whole(self._folder / RUN_ID_FILE, run_id)
        return run_id

    def _metrics(self, lines: Sequence[Mapping[str, Any]]) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(name, float(value), line["time_ms"], line["step"])
            for line in lines
            for name, value in line["values"].items()
            if math.isfinite(value)
        ]
        for batch in _batches(metrics, MAX_METRICS):
            self._client.log_batch(self._run_id, metrics=batch)

    def _one(self, lines: Sequence[Mapping[str, Any]]) -> None:
        (line,) = lines
        kinds: dict[str, Callable[[Mapping[str, Any]], None]] = {
            "params": self._params,
            "tags": self._tags,
            "trace": self._trace,
            "model": self._model,
            "status": self._status,
        }
        kinds[line["kind"]](line)

    def _params(self, line: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        known = self._client.get_run(self._run_id).data.params
        params = [
            Param(name, str(value)[:MAX_PARAM_CHARS])
            for name, value in line["values"].items()
            if name not in known
        ]
        for batch in _batches(params, MAX_PARAMS):
            self._client.log_batch(self._run_id, params=batch)

    def _tags(self, line: Mapping[str, Any]) -> None:
        from mlflow.entities import RunTag

        tags = [
            RunTag(name, str(value)[:MAX_TAG_CHARS])
            for name, value in line["values"].items()
        ]
        for batch in _batches(tags, MAX_TAGS):
            self._client.log_batch(self._run_id, tags=batch)

    def _trace(self, line: Mapping[str, Any]) -> None:
        send_trace(self._client, line["trace"], self._experiment, self._run_id)

    def _model(self, line: Mapping[str, Any]) -> None:
        if not Path(line["folder"]).is_dir():
            return  # a better one came before this one was sent
        mark = _mark({name: line[name] for name in line if name != "time_ms"})
        version = self._version_of(line["name"], mark) or register_model(
            line["folder"],
            line["name"],
            alias=None,
            run_id=self._run_id,
            tags={**line["tags"], LINE_TAG: mark},
            uri=self._spec.uri,
        )
        if line["alias"] is not None:
            move_alias_to_better(
                self._client,
                line["name"],
                line["alias"],
                version,
                line.get("measures", ()),
            )

    def _version_of(self, name: str, mark: str) -> str | None:
        """Of a line that was sent before; None: it was not."""
        found = self._client.search_model_versions(f"run_id='{self._run_id}'")
        for version in found:
            if version.name == name and version.tags.get(LINE_TAG) == mark:
                return str(version.version)
        return None

    def _status(self, line: Mapping[str, Any]) -> None:
        if line["status"] == "RUNNING":
            self._client.update_run(self._run_id, status="RUNNING")
        else:
            self._client.set_terminated(
                self._run_id, status=line["status"], end_time=line["time_ms"]
            )

    def _or_refuse(
        self,
        send: Callable[[Sequence[Mapping[str, Any]]], None],
        lines: Sequence[Mapping[str, Any]],
    ) -> None:
        from mlflow.exceptions import MlflowException

        try:
            send(lines)
        except (MlflowException, ConfigError, NotImplementedError) as error:
            if not _is_refusal(error) and not self._gives_up:
                raise
            parts = [] if _code(error) in REFUSALS_OF_ALL else _parts(lines)
            for part in parts:
                self._or_refuse(send, [part])
            if not parts:
                self._refuse(lines, error)
                self._gives_up = False

    def _refuse(self, lines: Sequence[Mapping[str, Any]], error: Exception) -> None:
        log = logger.debug if self._has_refused else logger.warning
        self._has_refused = True
        file = self._folder / REFUSED_FILE
        reason = without_passwords(error)
        log("MLflow refuses what was logged, see %s: %s", file, reason)
        with suppress(OSError), file.open("a") as opened:
            if opened.tell() < MAX_REFUSED_BYTES:
                opened.writelines(json.dumps(line) + "\n" for line in lines)


def _is_refusal(error: Exception) -> bool:
    """Whether the same would be raised again, however often it is tried."""
    if isinstance(error, NotImplementedError):  # a store without traces
        return NO_ANSWER not in str(error)
    ours = isinstance(error, ConfigError) and error.__cause__ is None
    return ours or _code(error) in REFUSALS


def _code(error: Exception) -> str:
    """MLflow's, also of an error that is the cause of ours."""
    return getattr(error, "error_code", None) or getattr(
        error.__cause__, "error_code", ""
    )


def _parts(lines: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Smaller lines that say the same; none if there are no smaller ones."""
    if len(lines) > 1:
        return list(lines)
    (line,) = lines
    values: Mapping[str, Any] = line.get("values", {})
    if len(values) <= 1:
        return []
    return [{**line, "values": {name: value}} for name, value in values.items()]


def _mark(line: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(line, sort_keys=True).encode()).hexdigest()


def _batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
