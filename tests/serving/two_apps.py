"""What `rllib-arpo serve` does on a Ray where Serve has an application already.

Run as a process of its own: Serve starts threads where it is imported.
"""

import sys
from functools import partial

import httpx2
import ray
from ray import serve

from rllib_arpo.errors import ConfigError
from rllib_arpo.serving.front import free_ports
from rllib_arpo.serving.running import running_app, serve_runs

LIMIT_S = 600


@serve.deployment(ray_actor_options={"num_cpus": 0})
class Named:
    def __init__(self, name: str) -> None:
        self.name = name

    async def __call__(self, request: object) -> str:
        return self.name


def main() -> None:
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    port, other_port = free_ports(2)
    assert not serve_runs()
    mine = Named.bind("mine")
    with running_app(mine, name="mine", host="127.0.0.1", port=port):
        assert serve_runs()
    assert not serve_runs()

    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(Named.bind("other"), name="other", route_prefix="/other")
    url, get = f"http://127.0.0.1:{port}", partial(httpx2.get, timeout=LIMIT_S)
    try:
        with running_app(mine, name="mine", host="127.0.0.1", port=other_port):
            raise AssertionError("it was started")
    except ConfigError as error:
        assert f"--port {port}" in str(error), error
    # Both refusals leave an application of that name alone, too.
    for at in (port, other_port):
        try:
            with running_app(mine, name="other", host="127.0.0.1", port=at):
                raise AssertionError("it was started")
        except ConfigError as error:
            assert "other" in str(error) or f"--port {port}" in str(error), error
        assert get(f"{url}/other").text == "other"
    with running_app(mine, name="mine", host="127.0.0.1", port=port):
        assert get(url).text == "mine"
        assert get(f"{url}/other").text == "other"
    assert list(serve.status().applications) == ["other"]
    assert get(f"{url}/other").text == "other"
    serve.shutdown()


if __name__ == "__main__":
    sys.exit(main())
