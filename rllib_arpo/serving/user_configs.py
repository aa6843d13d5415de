"""What Serve's controller holds as `user_config` of an application's deployments."""

from collections.abc import Mapping
from typing import Any

import ray


def user_configs(app: str) -> dict[str, Mapping[str, str]]:
    """Deployment -> `user_config`, as Serve's controller holds them."""
    held: Any = ray.get(_controller().list_deployments_internal.remote())
    return {
        identity.name: info.deployment_config.user_config or {}
        for identity, (info, _) in held.items()
        if identity.app_name == app
    }


def set_user_config(app: str, configs: Mapping[str, Any]) -> None:
    """Change `user_config` of deployments, and nothing else of an application.

    1. One that a file declared is declared again, with the changes. So it remains what
       `serve deploy` and KubeRay know.
    2. For one of `serve.run` Serve offers nothing of the kind; the controller is given
       back what it holds.

    Args:
        app: name of the application.
        configs: deployment -> its new `user_config`.
    """
    from ray.serve.schema import APIType

    details: Any = ray.get(
        _controller().get_serve_instance_details.remote(source=APIType.DECLARATIVE)
    )
    if app in details["applications"]:
        _declare_again(app, configs, details)
    else:
        _deploy_again(app, configs)


def _controller() -> Any:
    from ray.serve.context import _get_global_client

    client: Any = _get_global_client()
    return client._controller


def _declare_again(app: str, configs: Mapping[str, Any], details: Any) -> None:
    from ray.serve.schema import ServeDeploySchema

    controller = _controller()
    declared: Any = ray.get(controller.get_app_configs.remote())
    # One that the file leaves out would be deleted.
    applications = [
        declared[name].model_dump(exclude_unset=True)
        for name in details["applications"]
        if name in declared
    ]
    for one in applications:
        if one["name"] == app:
            one["deployments"] = _with_configs(one.get("deployments", []), configs)
    file = {
        "applications": applications,
        "target_capacity": details.get("target_capacity"),
    }
    ray.get(controller.apply_config.remote(ServeDeploySchema.model_validate(file)))


def _with_configs(
    deployments: list[dict[str, Any]], configs: Mapping[str, Any]
) -> list[dict[str, Any]]:
    named = {one["name"]: one for one in deployments}
    for name, config in configs.items():
        named[name] = {**named.get(name, {"name": name}), "user_config": config}
    return list(named.values())


def _deploy_again(app: str, configs: Mapping[str, Any]) -> None:
    from ray.serve._private.deploy_utils import get_deploy_args
    from ray.serve.generated import serve_pb2

    # Messages that protobuf makes at run time.
    messages: Any = serve_pb2
    controller = _controller()
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
