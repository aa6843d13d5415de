"""The way of lines through a buffer: gathered, kept, refused, never twice."""

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INTERNAL_ERROR

from rllib_arpo.errors import ConfigError
from rllib_arpo.tracking import mlflow_buffer, mlflow_sender
from rllib_arpo.tracking.mlflow_buffer import Buffer, RunSpec, send_later
from tests.locked_runs import is_locked, locked_by_another
from tests.mlflow_server import MLflowServer

LIMIT_S = 120


@pytest.fixture
def server(tmp_path: Path) -> Iterator[MLflowServer]:
    server = MLflowServer(tmp_path)
    server.start()
    yield server
    server.kill()


def calls(server: MLflowServer, endpoint: str) -> int:
    return (server.folder / "server.log").read_text().count(endpoint)


def local_uri(folder: Path) -> str:
    return f"sqlite:///{folder / 'mlruns.db'}"


def history(client: MlflowClient, run_id: str | None, name: str) -> list[Any]:
    assert run_id is not None
    return [(m.step, m.value) for m in client.get_metric_history(run_id, name)]


def waiting(folder: Path) -> list[dict[str, Any]]:
    files = sorted((folder / "outbox").iterdir())
    return [
        json.loads(line) for file in files for line in file.read_text().splitlines()
    ]


def test_what_many_iterations_log_goes_in_one_call(server, tmp_path) -> None:
    """The first line at once, and the last ones when the run is closed."""
    client = MlflowClient(server.uri)
    buffer = Buffer(tmp_path / "buffer", RunSpec(uri=server.uri), gather_s=1e6)
    buffer.metrics({"reward": 0.0}, step=0)
    while buffer.pending_bytes:
        client.search_experiments()
    for step in range(1, 20):
        buffer.metrics({"reward": step / 2}, step=step)
        client.search_experiments()  # time enough for a line to be sent
    assert buffer.close(LIMIT_S)
    assert calls(server, "runs/log-batch") == 2
    assert history(client, buffer.run_id, "reward") == [
        (step, step / 2) for step in range(20)
    ]


def test_one_bad_value_among_good_ones_is_the_only_one_refused(tmp_path) -> None:
    uri = local_uri(tmp_path)
    buffer = Buffer(tmp_path / "buffer", RunSpec(uri=uri))
    buffer.metrics({"reward": 0.0, "reward?": 0.5, "loss": 3.0}, step=0)
    buffer.metrics({"reward": 1.0}, step=1)
    assert buffer.close(LIMIT_S)
    client = MlflowClient(uri)
    assert history(client, buffer.run_id, "reward") == [(0, 0.0), (1, 1.0)]
    assert history(client, buffer.run_id, "loss") == [(0, 3.0)]
    (refused,) = (tmp_path / "buffer" / "refused.jsonl").read_text().splitlines()
    assert (json.loads(refused)["values"], json.loads(refused)["step"]) == (
        {"reward?": 0.5},
        0,
    )


@pytest.mark.parametrize(
    "error",
    [
        NotImplementedError("log_spans is not supported: server version 3.0"),
        MlflowException("413", error_code=INTERNAL_ERROR),
    ],
)
def test_a_line_that_fails_for_good_holds_nothing_up(
    error: Exception, tmp_path, monkeypatch
) -> None:
    def refuse(*args: Any) -> None:
        raise error

    monkeypatch.setattr(mlflow_buffer, "RETRY_S", (0.0,))
    monkeypatch.setattr(mlflow_sender, "send_trace", refuse)
    uri = local_uri(tmp_path)
    buffer = Buffer(tmp_path / "buffer", RunSpec(uri=uri))
    buffer.add("trace", {"trace": {"trace_id": "a"}})
    buffer.tags({"after": "yes"})
    buffer.metrics({"reward": 0.5}, step=0)
    assert buffer.close(LIMIT_S)
    client = MlflowClient(uri)
    assert history(client, buffer.run_id, "reward") == [(0, 0.5)]
    assert client.get_run(str(buffer.run_id)).data.tags["after"] == "yes"
    (refused,) = (tmp_path / "buffer" / "refused.jsonl").read_text().splitlines()
    assert json.loads(refused)["trace"] == {"trace_id": "a"}


def test_a_store_that_is_away_is_waited_for_however_often_it_fails(
    tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(mlflow_buffer, "RETRY_S", (0.0,))
    monkeypatch.setattr(mlflow_buffer, "answers", lambda uri: False)
    failures = iter(range(20))
    send = mlflow_sender.Sender._metrics

    def fail(*args: Any) -> None:
        if next(failures, None) is not None:
            raise MlflowException("away", error_code=INTERNAL_ERROR)
        send(*args)

    monkeypatch.setattr(mlflow_sender.Sender, "_metrics", fail)
    uri = local_uri(tmp_path)
    buffer = Buffer(tmp_path / "buffer", RunSpec(uri=uri))
    buffer.metrics({"reward": 0.5}, step=0)
    assert buffer.close(LIMIT_S)
    assert history(MlflowClient(uri), buffer.run_id, "reward") == [(0, 0.5)]
    assert not (tmp_path / "buffer" / "refused.jsonl").exists()


def test_a_store_that_lost_the_run_gets_a_new_one(tmp_path) -> None:
    for number in range(2):
        uri = local_uri(tmp_path / str(number))
        (tmp_path / str(number)).mkdir()
        spec = tmp_path / "buffer" / "run.json"
        if spec.exists():
            spec.write_text(json.dumps(json.loads(spec.read_text()) | {"uri": uri}))
        buffer = Buffer(tmp_path / "buffer", RunSpec(uri=uri))
        buffer.metrics({"reward": 0.5}, step=number)
        assert buffer.close(LIMIT_S)
        assert history(MlflowClient(uri), buffer.run_id, "reward") == [(number, 0.5)]


def test_a_folder_in_use_is_opened_by_nobody_else(tmp_path) -> None:
    folder, uri = tmp_path / "buffer", local_uri(tmp_path)
    buffer = Buffer(folder, RunSpec(uri=uri))
    assert is_locked(folder)
    with pytest.raises(ConfigError, match=r"tracks a run in .* already: close that"):
        send_later(folder)
    buffer.metrics({"reward": 0.5}, step=0)
    assert buffer.close(LIMIT_S)
    assert not is_locked(folder)
    assert history(MlflowClient(uri), buffer.run_id, "reward") == [(0, 0.5)]
    with (
        locked_by_another(folder),
        pytest.raises(ConfigError, match=r"another process tracks .*: wait for"),
    ):
        send_later(folder)
    assert send_later(folder)


def test_a_folder_that_cannot_be_opened_is_not_in_use(tmp_path) -> None:
    sent = tmp_path / "sent"
    sent.mkdir()
    with pytest.raises(IsADirectoryError):
        Buffer(tmp_path)
    sent.rmdir()
    assert not is_locked(tmp_path)
    assert Buffer(tmp_path).close()


def test_a_buffer_sends_nothing_before_the_last_one_of_its_folder_has_ended(
    tmp_path, monkeypatch
) -> None:
    """Or both would make a run; the second one is told all the same."""
    asked, answered = threading.Event(), threading.Event()
    create_run = MlflowClient.create_run

    def create_slowly(*args: Any, **kwargs: Any) -> Any:
        asked.set()
        assert answered.wait(LIMIT_S)
        return create_run(*args, **kwargs)

    monkeypatch.setattr(MlflowClient, "create_run", create_slowly)
    folder, uri = tmp_path / "buffer", local_uri(tmp_path)
    first = Buffer(folder, RunSpec(uri=uri))
    first.metrics({"reward": 0.0}, step=0)
    assert asked.wait(LIMIT_S)
    assert not first.close(0.0)
    second = Buffer(folder)
    second.metrics({"reward": 0.5}, step=1)
    assert not second.flush(1.0)
    assert is_locked(folder)
    answered.set()
    assert second.close(LIMIT_S)
    assert not is_locked(folder)
    client = MlflowClient(uri)
    (run,) = client.search_runs(["1"])
    assert history(client, run.info.run_id, "reward") == [(0, 0.0), (1, 0.5)]


def test_a_model_that_is_sent_twice_is_registered_once(almanac_model, tmp_path) -> None:
    uri = local_uri(tmp_path)
    buffer = Buffer(tmp_path / "buffer", RunSpec(uri=uri))
    line = {"folder": almanac_model, "name": "tiny", "alias": "champion", "tags": {}}
    buffer.add("model", line)
    assert buffer.close(LIMIT_S)
    client = MlflowClient(uri, registry_uri=uri)
    client.delete_registered_model_alias("tiny", "champion")
    # As if a kill came before it was noted, and before the alias was set.
    (tmp_path / "buffer" / "sent").write_text("0")
    assert send_later(tmp_path / "buffer", timeout_s=LIMIT_S)
    (version,) = client.search_model_versions("name='tiny'")
    champion = client.get_model_version_by_alias("tiny", "champion")
    assert (champion.version, champion.run_id) == (version.version, buffer.run_id)


# Nothing listens on port 1. The limit is that of a file, as a full disk is.
FULL_DISK = """
import resource, sys
from rllib_arpo.tracking.mlflow_buffer import Buffer, RunSpec

buffer = Buffer(sys.argv[1], RunSpec(uri="http://127.0.0.1:1"))
buffer.metrics({"reward": 0.0}, step=0)
limits = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (buffer.pending_bytes + 20, limits[1]))
for step in range(1, 4):
    buffer.metrics({"reward": 0.0}, step=step)
resource.setrlimit(resource.RLIMIT_FSIZE, limits)
buffer.metrics({"reward": 0.0}, step=4)
assert not buffer.close(0.0)
"""


def test_a_full_disk_is_warned_of_once_and_costs_only_its_lines(tmp_path) -> None:
    words = [sys.executable, "-c", FULL_DISK, str(tmp_path)]
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    assert [line["step"] for line in waiting(tmp_path)] == [0, 4]
    assert done.stderr.count("Free some space there") == 1
    assert f"lacks 3 lines that {tmp_path} could not keep" in done.stderr


# Two lives of one run, each of which is killed when its third sample is logged.
KILLED_TWICE = """
import os, signal, sys, threading
from rllib_arpo.tracking.mlflow_buffer import Buffer, RunSpec
from rllib_arpo.tracking.mlflow_system import SystemMetrics

class Killed(Buffer):
    num_samples = 0

    def metrics(self, values, *, step):
        super().metrics(values, step=step)
        self.num_samples += 1
        if self.num_samples == 3:
            os.kill(os.getpid(), signal.SIGKILL)

for life in range(2):
    child = os.fork()
    if child == 0:
        buffer = Killed(sys.argv[1], RunSpec(uri="http://127.0.0.1:1"))
        SystemMetrics(buffer, interval_s=0.01)
        threading.Event().wait()
    print(os.WTERMSIG(os.waitpid(child, 0)[1]))
"""


def test_the_steps_of_the_machines_load_go_on_after_a_kill(tmp_path) -> None:
    words = [sys.executable, "-W", "ignore", "-c", KILLED_TWICE, str(tmp_path)]
    said = subprocess.run(
        words, check=True, stdout=subprocess.PIPE, text=True, timeout=LIMIT_S
    ).stdout
    assert said.split() == [str(int(signal.SIGKILL))] * 2
    assert [line["step"] for line in waiting(tmp_path)] == list(range(6))
