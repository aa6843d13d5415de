"""An application at an address, for as long as a command runs."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from ray import serve
from ray.serve import Application


@contextmanager
def running_app(app: Application, *, name: str, host: str, port: int) -> Iterator[None]:
    """Serve an application on the Ray that runs; it is ready inside.

    Args:
        app: of `build_app` or `bind_app`.
        name: under which Serve knows it.
        host: address to listen at.
        port: of TCP.
    """
    # Importing Serve configures its logger.
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    try:
        serve.start(http_options={"host": host, "port": port})
        serve.run(app, name=name, route_prefix="/")
        yield
    finally:
        serve.shutdown()
