"""A server that `serve run` starts from a configuration file, as on a cluster."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import yaml

from rllib_arpo.cli_serving import APP
from rllib_arpo.serving.access import ADMIN_KEY_VARIABLE, API_KEYS_VARIABLE
from rllib_arpo.serving.front import find_haproxy, free_ports, haproxy_settings
from tests.scripts import ROOT
from tests.serving.served import (
    ADMIN_KEY,
    KEY,
    PATIENCE_S,
    Served,
    is_up,
    until,
)


@contextmanager
def serving_file(
    folder: Path,
    *,
    args: Mapping[str, Any],
    deployments: list[dict[str, Any]] | None = None,
    **environment: str,
) -> Iterator[Served]:
    """Start it behind HAProxy, where there is one, and wait until it serves.

    Args:
        folder: for its files.
        args: of `build_app`.
        deployments: what the file says instead of `build_app`.
        environment: of Ray's processes.
    """
    (port,), binary = free_ports(1), find_haproxy()
    app = {
        "name": APP,
        "import_path": "rllib_arpo.serving:build_app",
        "args": dict(args),
        "deployments": deployments or [],
    }
    file = folder / "config.yaml"
    options = {"host": "127.0.0.1", "port": port}
    file.write_text(
        yaml.safe_dump(
            {"http_options": options, "applications": [app]}, sort_keys=False
        )
    )
    # HAProxy's sockets lie below it, and a socket's path has at most 107 bytes.
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="haproxy-") as short:
        sockets = (
            {} if binary is None else haproxy_settings(binary, Path(short), PATIENCE_S)
        )
        with serve_run(file, port, **sockets, **environment) as served:
            yield served


@contextmanager
def serve_run(file: Path, port: int, **environment: str) -> Iterator[Served]:
    """`serve run` of a configuration, which has no other applications.

    Args:
        file: the configuration; a log is written beside it.
        port: that it names.
        environment: of Ray's processes.
    """
    log = file.with_suffix(".log")
    # Not the Ray that another test has started.
    words = ["serve", "run", "--address", "local", str(file)]
    with log.open("w") as written:
        process = subprocess.Popen(
            [str(Path(sys.executable).with_name(words[0])), *words[1:]],
            cwd=ROOT,
            stdout=written,
            stderr=written,
            env=os.environ
            | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
            | {ADMIN_KEY_VARIABLE: ADMIN_KEY, API_KEYS_VARIABLE: KEY}
            | environment,
        )
    headers = {"Authorization": f"Bearer {KEY}"}
    url = f"http://127.0.0.1:{port}"
    client = httpx2.Client(base_url=url, headers=headers, timeout=PATIENCE_S)
    with client, process:
        try:
            until(lambda: process.poll() is not None or is_up(client))
            assert process.poll() is None, log.read_text()
            yield Served(pid=process.pid, url=url, client=client)
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(timeout=PATIENCE_S)
            finally:
                process.kill()  # unless it has ended
