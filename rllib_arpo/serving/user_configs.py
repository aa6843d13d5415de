"""What Serve's controller holds as `user_config` of an application's deployments."""

from collections.abc import Mapping
from typing import Any

import ray


def user_configs(app: str) -> dict[str, Mapping[str, str]]:
    """Deployment -> `user_config`, as Serve's controller holds them."""
    from ray.serve.context import _get_global_client

    client: Any = _get_global_client()
    held: Any = ray.get(client._controller.list_deployments_internal.remote())
    return {
        identity.name: info.deployment_config.user_config or {}
        for identity, (info, _) in held.items()
        if identity.app_name == app
    }


def set_user_config(app: str, configs: Mapping[str, Any]) -> None:
    """Change `user_config` of deployments, and nothing else of an application.

    Serve offers it for applications from a configuration file only, and only with the
    whole file; so the controller is given back what it holds.

    Args:
        app: name of the application.
        configs: deployment -> its new `user_config`.
    """
    from ray.serve._private.deploy_utils import get_deploy_args
    from ray.serve.context import _get_global_client
    from ray.serve.generated import serve_pb2

    # Messages that protobuf makes at run time.
    messages: Any = serve_pb2
    client: Any = _get_global_client()
    controller = client._controller
    held: Any = ray.get(controller.list_deployments_internal.remote())
    deployments = []
    for identity, (info, _) in held.items():
        if identity.app_name != app:
            continue
        config = info.deployment_config
        if identity.name in configs:
            config = config.model_copy(update={"user_config": configs[identity.name]})
        wanted = get_deploy_args(
            identity.name,
            replica_config=info.replica_config,
            ingress=info.ingress,
            deployment_config=config,
            version=info.version,
            route_prefix=info.route_prefix,
        )
        deployments.append(
            messages.DeploymentArgs(
                deployment_name=identity.name,
                deployment_config=wanted["deployment_config_proto_bytes"],
                replica_config=wanted["replica_config_proto_bytes"],
                deployer_job_id=info.deployer_job_id,
                ingress=info.ingress,
                **({"route_prefix": info.route_prefix} if info.route_prefix else {}),
            ).SerializeToString()
        )
    ray.get(
        controller.deploy_applications.remote(
            {app: deployments}, {app: messages.ApplicationArgs().SerializeToString()}
        )
    )
