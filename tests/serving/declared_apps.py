"""`user_config` that changes, of applications from a file and of `serve.run`.

Run as a process of its own: Serve starts threads where it is imported.
"""

import sys
from collections.abc import Callable
from typing import Any

import httpx2
import ray
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import APIType, ServeDeploySchema

from rllib_arpo.serving.front import free_ports
from rllib_arpo.serving.user_configs import set_user_config, user_configs
from tests.serving.says_app import Says
from tests.serving.served import PATIENCE_S, is_up, until


def declared(*names: str) -> ServeDeploySchema:
    """A file with applications; the deployment of the first has options of its own."""
    applications: list[dict[str, Any]] = [
        {
            "name": name,
            "route_prefix": f"/{name}",
            "import_path": "tests.serving.says_app:build",
        }
        for name in names
    ]
    options = {"name": "Says", "max_ongoing_requests": 7, "user_config": {"says": "a"}}
    applications[0]["deployments"] = [options]
    return ServeDeploySchema.model_validate({"applications": applications})


def sources() -> dict[str, APIType]:
    controller = _get_global_client()._controller
    held: Any = ray.get(controller.get_serve_instance_details.remote())
    return {name: one["source"] for name, one in held["applications"].items()}


def main() -> None:
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    (port,) = free_ports(1)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    client = _get_global_client()
    client.deploy_apps(declared("first", "second"))
    serve.run(Says.bind(), name="third", route_prefix="/third")
    names = ("first", "second", "third")
    http = httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE_S)
    until(lambda: all(is_up(http, f"/{name}") for name in names))

    def said(name: str) -> list[Any]:
        return http.get(f"/{name}").json()

    def says(name: str, *wanted: object) -> Callable[[], bool]:
        return lambda: said(name) == list(wanted)

    pids = {name: said(name)[1] for name in names}
    assert said("first") == ["a", pids["first"]]
    for name in pids:
        set_user_config(name, {"Says": {"says": "b"}})
        until(says(name, "b", pids[name]))
        assert user_configs(name) == {"Says": {"says": "b"}}
    assert sources() == {
        "first": APIType.DECLARATIVE,
        "second": APIType.DECLARATIVE,
        "third": APIType.IMPERATIVE,
    }
    held: Any = ray.get(client._controller.get_app_configs.remote())
    (kept,) = held["first"].deployments
    assert kept.max_ongoing_requests == 7

    # Those that a file had are known as such: a later file without one ends it.
    client.deploy_apps(declared("first"))
    until(lambda: set(sources()) == {"first", "third"})
    until(says("first", "a", pids["first"]))
    assert said("third") == ["b", pids["third"]]
    serve.shutdown()


if __name__ == "__main__":
    sys.exit(main())
