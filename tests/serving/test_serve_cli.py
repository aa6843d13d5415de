"""`rllib-arpo serve` and `ServeArgs`: what is refused before anything starts."""

import json
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError
from ray._common.utils import import_attr
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
from ray.serve.schema import ServeDeploySchema

import rllib_arpo.serving
from rllib_arpo.agent_weights import find_weights
from rllib_arpo.cli import main
from rllib_arpo.cli_serving import is_loopback, name_and_source, serve_args
from rllib_arpo.errors import ConfigError
from rllib_arpo.serving.access import API_KEYS_VARIABLE, hash_key
from rllib_arpo.serving.app import build_app
from rllib_arpo.serving.front import free_ports
from rllib_arpo.serving.serve_args import ServeArgs
from tests.scripts import ROOT
from tests.serving.file_server import serve_run
from tests.serving.served import PATIENCE_S, make_endless

WITHOUT = """
import sys
sys.modules[sys.argv.pop(1)] = None
from rllib_arpo.cli import main
main()
"""
EXAMPLES = ROOT / "tuned_examples" / "serving"


def error_of(words: list[str], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(sys, "argv", ["rllib-arpo", "--debug", "serve", *words])
    with pytest.raises(ConfigError) as caught:
        main()
    return str(caught.value)


def test_other_machines_are_not_served_without_keys(
    almanac_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(API_KEYS_VARIABLE, raising=False)
    words = [almanac_model, "--host", "0.0.0.0"]
    assert API_KEYS_VARIABLE in error_of(words, monkeypatch)


def test_a_port_in_use_is_named(
    almanac_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        words = [almanac_model, "--port", str(port)]
        assert f"127.0.0.1:{port}" in error_of(words, monkeypatch)


def test_a_checkpoint_that_is_not_there_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = ["runs/nowhere", "--port", str(*free_ports(1))]
    assert "runs/nowhere" in error_of(words, monkeypatch)


# The one is imported for the flags, the other for the application.
@pytest.mark.slow
@pytest.mark.parametrize("package", ["starlette", "msgpack"])
def test_the_extra_to_install_is_named(package: str) -> None:
    words = ["serve", "runs/nowhere", "--port", str(*free_ports(1))]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, package, *words],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 2
    assert done.stderr == (
        f"Error: `rllib-arpo serve` needs the package {package}: "
        'pip install "rllib_arpo[serve]"\n'
    )


@pytest.mark.parametrize(
    ("host", "own"),
    [
        *[("127.0.0.1", True), ("localhost", True), ("::1", True)],
        *[("0.0.0.0", False), ("::", False), ("10.0.0.1", False), ("a.b", False)],
    ],
)
def test_hosts_of_this_machine_alone(host: str, own: bool) -> None:
    assert is_loopback(host) is own


@pytest.mark.parametrize(
    ("word", "parts"),
    [
        ("runs/a", (None, "runs/a")),
        ("a=runs/a", ("a", "runs/a")),
        ("runs/lr=1/a", (None, "runs/lr=1/a")),
        ("a=models:/m@champion", ("a", "models:/m@champion")),
    ],
)
def test_a_checkpoint_may_have_a_name(word: str, parts: tuple[str | None, str]) -> None:
    assert name_and_source(word) == parts


def test_several_checkpoints_need_names() -> None:
    with pytest.raises(ConfigError, match="NAME=CHECKPOINT"):
        serve_args(["a", "b=b"], (), None, {})


def test_keys_are_hashed_before_they_go_anywhere() -> None:
    args = serve_args(["a"], ("secret",), "admin", {})
    assert args.http().api_key_hashes == (hash_key("secret"),)
    assert args.http().admin_key_hash == hash_key("admin")
    assert "secret" not in repr(args)


@pytest.mark.parametrize("key", ["", " "])
def test_a_key_that_is_empty_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match="--api-key is empty"):
        serve_args(["a"], (key,), None, {})
    with pytest.raises(ConfigError, match="--admin-key is empty"):
        serve_args(["a"], (), key, {})


def test_spaces_around_a_key_are_not_part_of_it() -> None:
    args = serve_args(["a"], (" secret ",), None, {})
    assert args.http().api_key_hashes == (hash_key("secret"),)


def test_texts_of_serve_run_become_values() -> None:
    args = ServeArgs.model_validate(
        {
            "models": json.dumps([{"name": "a", "checkpoint": "b"}]),
            "max_engines": "3",
            "engine_kwargs": '{"max_batch": 2}',
            "num_gpus": "0.5",
        }
    )
    assert args.models[0].checkpoint == "b"
    assert (args.max_engines, args.num_gpus) == (3, 0.5)
    assert args.engine_kwargs == {"max_batch": 2}


def test_limits_and_delays_reach_what_keeps_them(almanac_model: str) -> None:
    args = ServeArgs(
        checkpoint=almanac_model,
        max_in_all=7,
        max_agents=2,
        upscale_delay_s=1.5,
        downscale_delay_s=2.5,
    )
    assert args.http().max_in_all == 7
    app: Any = build_app(args)
    scaling = app._bound_deployment._deployment_config.autoscaling_config
    assert (scaling.upscale_delay_s, scaling.downscale_delay_s) == (1.5, 2.5)
    assert (scaling.min_replicas, scaling.max_replicas) == (1, 2)


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"checkpoint": "a", "models": [{"name": "a", "checkpoint": "a"}]},
        {"checkpoint": "a", "nonsense": 1},
        {"checkpoint": "a", "min_engines": 3, "max_engines": 2},
        {"checkpoint": "a", "max_in_all": 1024},  # of which Serve lets none be refused
        {"checkpoint": "a", "engine_kwargs": "{"},
        {"models": 2 * [{"name": "a", "checkpoint": "a"}]},
    ],
)
def test_arguments_that_cannot_work_are_refused(wrong: dict) -> None:
    with pytest.raises(ValidationError):
        ServeArgs.model_validate(wrong)


@pytest.mark.parametrize("file", ["quickstart.yaml", "rayservice.yaml"])
def test_the_examples_are_configurations_of_serve(file: str) -> None:
    config = yaml.safe_load((EXAMPLES / file).read_text())
    if file == "rayservice.yaml":
        assert (config["apiVersion"], config["kind"]) == ("ray.io/v1", "RayService")
        config = yaml.safe_load(config["spec"]["serveConfigV2"])
    (app,) = ServeDeploySchema.model_validate(config).applications
    module, name = app.import_path.split(":")
    assert module == rllib_arpo.serving.__name__
    assert name in rllib_arpo.serving.__all__
    assert ServeArgs.model_validate(app.args).models


def test_kuberay_s_workers_have_room_for_all_replicas() -> None:
    spec = yaml.safe_load((EXAMPLES / "rayservice.yaml").read_text())["spec"]
    (app,) = yaml.safe_load(spec["serveConfigV2"])["applications"]
    cluster, args = spec["rayClusterConfig"], ServeArgs.model_validate(app["args"])
    assert cluster["enableInTreeAutoscaling"]
    room: Counter[str] = Counter()
    for group in cluster["workerGroupSpecs"]:
        (container,) = group["template"]["spec"]["containers"]
        limits = container["resources"]["limits"]
        for _ in range(group["maxReplicas"]):
            room["cpu"] += int(limits["cpu"])
            room["gpu"] += int(limits.get("nvidia.com/gpu", 0))
    num_engines = args.max_engines * len(args.models)
    assert room["gpu"] == num_engines * args.num_gpus
    assert room["cpu"] >= num_engines + args.max_agents


def test_the_package_does_not_import_serve() -> None:
    code = "import sys, rllib_arpo.serving; print('ray.serve' in sys.modules)"
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == "False"


def test_serve_run_can_build_the_application(almanac_model: str) -> None:
    builder = import_attr("rllib_arpo.serving:build_app")
    app = call_user_app_builder_with_args_if_necessary(
        builder, {"checkpoint": almanac_model, "max_agents": "2"}
    )
    assert app._bound_deployment.name == "agent"


@pytest.mark.slow
def test_an_application_of_a_file_takes_other_weights_too(
    almanac_model: str, tmp_path: Path
) -> None:
    (port,) = free_ports(1)
    config = yaml.safe_load((EXAMPLES / "quickstart.yaml").read_text())
    config["http_options"]["port"] = port
    (app,) = config["applications"]
    app["args"]["models"] = [{"name": "almanac", "checkpoint": almanac_model}]
    no_cpus = {"ray_actor_options": {"num_cpus": 0}}
    app["deployments"] = [{"name": name, **no_cpus} for name in ("agent", "engine-0")]
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    other = make_endless(almanac_model, tmp_path / "endless")
    with serve_run(file, port) as server:
        (engine,) = server.replicas("engine-0")
        reply = server.reload(checkpoint=str(other))
        assert reply.json() == {"models": {"almanac": find_weights(str(other)).version}}
        assert server.replicas("engine-0") == {engine}
