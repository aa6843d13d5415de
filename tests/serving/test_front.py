"""HAProxy before the agents: where it is used, what it says and where it listens."""

import json
import os
import socket
import subprocess
from pathlib import Path

import psutil
import pytest

from rllib_arpo.errors import ConfigError
from rllib_arpo.serving import front
from rllib_arpo.serving.access import API_KEYS_VARIABLE
from rllib_arpo.serving.app import refuse_unknown_clients
from rllib_arpo.serving.front import (
    BINARY,
    CHOICE,
    agent_lost,
    find_haproxy,
    free_ports,
    haproxy_settings,
    haproxy_where_possible,
)
from rllib_arpo.serving.http_settings import HttpSettings
from tests.serving.served import Served

PORTS_OF_CLIENTS = Path("/proc/sys/net/ipv4/ip_local_port_range")
HAS_HAPROXY = find_haproxy() is not None
needs_haproxy = pytest.mark.skipif(
    not HAS_HAPROXY, reason="Ray Serve has no HAProxy for this machine"
)

# As Serve writes it, and one that a user asked for.
CONFIG = """\
defaults
    errorfile 502 /serve/500.http
frontend prometheus
    bind :9101
listen stats
  bind *:8404
frontend http_frontend
    bind {host}:8000
"""


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "::1", "::"])
def test_statistics_stay_on_this_machine_and_the_server_where_it_was_put(
    host: str, tmp_path: Path
) -> None:
    settings = haproxy_settings("/bin/cat", tmp_path, 600.0)
    file = tmp_path / "haproxy.cfg"
    file.write_text(CONFIG.format(host=host))
    done = subprocess.run(
        [settings[BINARY], str(file)], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [
        *("defaults", f"    errorfile 502 {tmp_path / 'lost.http'}"),
        *("frontend prometheus", "    bind 127.0.0.1:9101"),
        *("listen stats", "  bind 127.0.0.1:8404"),
        *("frontend http_frontend", f"    bind {host}:8000"),
    ]


def test_a_lost_agent_is_an_error_object_that_asks_to_ask_again() -> None:
    head, _, body = agent_lost().partition(b"\r\n\r\n")
    status, *headers = head.decode().split("\r\n")
    assert status.split()[1] == "503"
    assert f"Content-Length: {len(body)}" in headers
    assert "Retry-After: 1" in headers
    assert json.loads(body)["error"]["code"] == "agent_lost"


@pytest.mark.parametrize("name", [CHOICE, "RAY_ADDRESS"])
def test_what_an_operator_decided_is_kept(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "0")
    monkeypatch.delenv(BINARY, raising=False)
    with haproxy_where_possible(600.0):
        assert os.environ[name] == "0"
        assert BINARY not in os.environ


def test_ports_are_free_and_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(set(free_ports(4))) == 4
    (taken,) = free_ports(1)
    monkeypatch.setattr(front, "PORTS", range(taken, taken + 2))
    with socket.create_server(("127.0.0.1", taken)):
        assert taken not in free_ports(2)


@pytest.mark.skipif(not PORTS_OF_CLIENTS.exists(), reason="not Linux")
def test_a_port_is_not_one_that_a_client_may_be_given_before_its_server_listens() -> (
    None
):
    first = int(PORTS_OF_CLIENTS.read_text().split()[0])
    assert max(free_ports(4)) < first


def test_strangers_are_not_taken_for_clients_of_this_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    open_to_all, with_keys = HttpSettings(), HttpSettings(api_key_hashes=("0" * 64,))
    monkeypatch.setenv(CHOICE, "1")
    with pytest.raises(ConfigError, match=API_KEYS_VARIABLE):
        refuse_unknown_clients(open_to_all, is_local=False)
    refuse_unknown_clients(open_to_all, is_local=True)
    refuse_unknown_clients(with_keys, is_local=False)
    # Serve's own proxy tells who asks.
    monkeypatch.delenv(CHOICE)
    refuse_unknown_clients(open_to_all, is_local=False)


def name_of(process: psutil.Process) -> str | None:
    """None of one that has ended: Ray's workers come and go."""
    try:
        return process.name()
    except psutil.NoSuchProcess:
        return None


@needs_haproxy
def test_the_server_listens_at_its_port_of_this_machine_alone(served: Served) -> None:
    processes = psutil.Process(served.pid).children(recursive=True)
    (haproxy,) = (one for one in processes if name_of(one) == "haproxy")
    addresses = {
        connection.laddr
        for connection in haproxy.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }
    assert {address.ip for address in addresses} == {"127.0.0.1"}
    assert int(served.url.rpartition(":")[2]) in {one.port for one in addresses}
