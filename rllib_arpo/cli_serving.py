"""`rllib-arpo serve`: agents on a local Ray, or on the cluster at RAY_ADDRESS.

All that can be wrong is found before Ray starts.
"""

import importlib.util
import os
import signal
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from ipaddress import ip_address
from typing import Any

import typer
from pydantic import ValidationError

from rllib_arpo.cli_runs import started_ray
from rllib_arpo.errors import ConfigError
from rllib_arpo.imports import from_extra
from rllib_arpo.serving.access import (
    ADMIN_KEY_VARIABLE,
    API_KEYS_VARIABLE,
    hash_key,
    keys_from_environment,
)
from rllib_arpo.serving.front import haproxy_where_possible
from rllib_arpo.serving.serve_args import ServeArgs
from rllib_arpo.tracking.mlflow_store import USUAL_STORE, tracking_uri

APP = "rllib_arpo"


def serve_command(
    checkpoints: Sequence[str],
    *,
    host: str,
    port: int,
    api_keys: Sequence[str],
    admin_key: str | None,
    settings: Mapping[str, Any],
) -> None:
    """Serve until SIGINT or SIGTERM.

    Args:
        checkpoints: one, or several as NAME=CHECKPOINT.
        host: address to listen at.
        port: of TCP.
        api_keys: those of `RLLIB_ARPO_API_KEYS` if there are none.
        admin_key: that of `RLLIB_ARPO_ADMIN_KEY` if it is None.
        settings: further ones of `ServeArgs`.

    Raises:
        ConfigError: a flag, key or checkpoint cannot work, the port is in use, or a
            package of the extra `serve` is not installed.
        CheckpointError: a checkpoint is not whole.
        DataError: a corpus cannot be read.
    """
    args = serve_args(checkpoints, api_keys, admin_key, settings)
    refuse_open_host(host, args)
    refuse_used_port(host, port)

    with haproxy_where_possible(args.max_request_s):
        with from_extra("serve", what="`rllib-arpo serve`"):
            from rllib_arpo.serving.app import bind_app, find_agents, open_agent
            from rllib_arpo.serving.running import running_app

        agents = find_agents(args)
        for source in agents.values():
            open_agent(source, args)
        num_replicas = args.max_agents + args.max_engines * len(agents)
        # Where Serve of another's cluster listens is not for this command to say.
        is_local = is_loopback(host) and "RAY_ADDRESS" not in os.environ
        with started_ray(num_replicas), stop_signal() as stopped:
            app = bind_app(args, agents, is_local=is_local)
            with running_app(app, name=APP, host=host, port=port):
                typer.echo(greeting(host, port, list(agents), args))
                stopped.wait()


def serve_args(
    checkpoints: Sequence[str],
    api_keys: Sequence[str],
    admin_key: str | None,
    settings: Mapping[str, Any],
) -> ServeArgs:
    """The application's arguments, with the keys of this process's environment.

    Raises:
        ConfigError: they cannot work.
    """
    own_keys, own_admin_key = keys_from_environment()
    keys = tuple(_hash_of(one, "--api-key") for one in api_keys)
    admin = None if admin_key is None else _hash_of(admin_key, "--admin-key")
    given = [name_and_source(one) for one in checkpoints]
    if len(given) > 1 and any(name is None for name, _ in given):
        raise ConfigError(
            "several checkpoints need names: give each as NAME=CHECKPOINT"
        )
    (name, source), *_ = given
    what: dict[str, Any] = (
        {"checkpoint": source}
        if name is None
        else {"models": [{"name": n, "checkpoint": s} for n, s in given]}
    )
    try:
        return ServeArgs(
            **what,
            api_key_hashes=keys or own_keys,
            admin_key_hash=own_admin_key if admin is None else admin,
            **settings,
        )
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{place}: {first['msg']}".removeprefix(": ")) from error


def _hash_of(key: str, flag: str) -> str:
    if not key.strip():
        raise ConfigError(f"{flag} is empty: is a variable unset?")
    return hash_key(key.strip())


def traced_store(store: str | None, share: float) -> str | None:
    """The MLflow store of a flag, else that of this process's environment.

    Args:
        store: its URI; "default": as in `mlflow_store.tracking_uri`.
        share: of the answers that are to be traced.

    Raises:
        ConfigError: there is one, and MLflow is not installed.
    """
    if store == USUAL_STORE:
        store = tracking_uri()
    uri = store or os.environ.get("MLFLOW_TRACKING_URI") or None
    if uri is None or not share:
        return None
    if importlib.util.find_spec("mlflow") is None:
        raise ConfigError(
            'MLflow is not installed: pip install "rllib_arpo[mlflow]", or give '
            "--trace-share 0"
        )
    return uri


def name_and_source(word: str) -> tuple[str | None, str]:
    """NAME=CHECKPOINT in its parts; a name holds no slash, a path before "=" does."""
    name, separator, source = word.partition("=")
    if not separator or "/" in name or not name:
        return None, word
    return name, source


def refuse_open_host(host: str, args: ServeArgs) -> None:
    """Others may not ask without keys: an agent runs tools.

    Raises:
        ConfigError: `host` is not this machine's alone, and there are no keys.
    """
    if not args.api_key_hashes and not is_loopback(host):
        raise ConfigError(
            f"--host {host} lets other machines ask, but there are no keys: set "
            f"{API_KEYS_VARIABLE}, or leave --host out"
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches that address."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def refuse_used_port(host: str, port: int) -> None:
    """Raise if nobody could listen there.

    Raises:
        ConfigError: the port is in use, or the host is not of this machine.
    """
    try:
        family, kind, *_, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM
        )[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise ConfigError(
            f"cannot listen at {host}:{port} ({error.strerror}): give another --port "
            "or --host"
        ) from error


@contextmanager
def stop_signal() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set; a second one interrupts.

    It is to be entered when Ray runs, which sets handlers of its own.
    """
    stopped = threading.Event()

    def stop(*_: object) -> None:
        if stopped.is_set():
            raise KeyboardInterrupt
        stopped.set()

    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(one, stop) for one in signals]
    try:
        yield stopped
    finally:
        for one, handler in zip(signals, before, strict=True):
            signal.signal(one, signal.SIG_DFL if handler is None else handler)


def greeting(host: str, port: int, models: Sequence[str], args: ServeArgs) -> str:
    """Where to ask, and how."""
    name = "127.0.0.1" if host in ("0.0.0.0", "::") else host
    url = f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}"
    key = ' -H "Authorization: Bearer $KEY"' if args.api_key_hashes else ""
    lines = [
        f"Serving {', '.join(models)} at {url} (a page to try it), API at {url}/v1",
        f"  curl {url}/v1/chat/completions -H 'Content-Type: application/json'{key} "
        f'-d \'{{"model": "{models[0]}", "messages": [{{"role": "user", "content": '
        '"Who are you?"}]}\'',
    ]
    if args.admin_key_hash is None:
        lines.append(f"  POST /admin/reload is off: set {ADMIN_KEY_VARIABLE}")
    return "\n".join(lines)
