"""An application at an address, for as long as a command runs."""

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import ray
from ray import serve
from ray.serve import Application
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE
from ray.serve.context import _get_global_client

from rllib_arpo.errors import ConfigError


@contextmanager
def running_app(app: Application, *, name: str, host: str, port: int) -> Iterator[None]:
    """Serve an application on the Ray that runs; it is ready inside.

    Other applications that Serve has there stay as they are.

    Args:
        app: of `build_app` or `bind_app`.
        name: under which Serve knows it.
        host: address to listen at.
        port: of TCP.

    Raises:
        ConfigError: Serve runs there already, and listens elsewhere or has an
            application of that name.
    """
    # Importing Serve configures its logger.
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    had_serve = serve_runs()
    with ExitStack() as started:
        if not had_serve:
            started.callback(serve.shutdown)
        serve.start(http_options={"host": host, "port": port})
        _refuse_other_address(host, port)
        _refuse_taken(name)
        if had_serve:
            started.callback(serve.delete, name)
        serve.run(app, name=name, route_prefix="/")
        yield


def serve_runs() -> bool:
    """Whether the Ray that runs has a Serve."""
    try:
        ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
    except ValueError:
        return False
    return True


def _refuse_taken(name: str) -> None:
    # Serve would replace it, and it would go when the command ends.
    if name in serve.status().applications:
        raise ConfigError(
            f"Serve on this Ray has an application {name!r} already: give it other "
            "weights by POST /admin/reload, or end it first, with `serve delete "
            f"{name}` or where it was started"
        )


def _refuse_other_address(host: str, port: int) -> None:
    # Serve that runs keeps its own, whatever it is started with.
    client = _get_global_client()
    assert client is not None  # it was started
    kept = client.http_config
    if (kept.host, kept.port) != (host, port):
        raise ConfigError(
            f"Serve on this Ray listens at {kept.host}:{kept.port} already: give "
            f"--host {kept.host} --port {kept.port}"
        )
