"""tuned_examples/cluster: its configs, its jobs, and the manifest for Kubernetes."""

import importlib.util
import json
import os
import runpy
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

from rllib_arpo import ARPOConfig
from rllib_arpo.cli_runs import num_actors
from tests.scripts import ROOT, run_script

EXAMPLES = ROOT / "tuned_examples" / "cluster"
# What ray.io/v1 knows: apis/ray/v1/rayjob_types.go and raycluster_types.go of KubeRay
# 1.4. The API server drops a field that it does not know without a word.
JOB_FIELDS = {
    *("activeDeadlineSeconds", "backoffLimit", "clusterSelector", "deletionStrategy"),
    *("entrypoint", "entrypointNumCpus", "entrypointNumGpus", "entrypointResources"),
    *("jobId", "managedBy", "metadata", "rayClusterSpec", "runtimeEnvYAML"),
    *("shutdownAfterJobFinishes", "submissionMode", "submitterConfig"),
    *("submitterPodTemplate", "suspend", "ttlSecondsAfterFinished"),
}
CLUSTER_FIELDS = {
    *("autoscalerOptions", "enableInTreeAutoscaling", "gcsFaultToleranceOptions"),
    *("headGroupSpec", "headServiceAnnotations", "managedBy", "rayVersion", "suspend"),
    "workerGroupSpecs",
}
HEAD_FIELDS = {"enableIngress", "headService", "rayStartParams", "serviceType"}
WORKER_FIELDS = {
    *("groupName", "idleTimeoutSeconds", "maxReplicas", "minReplicas", "numOfHosts"),
    *("rayStartParams", "replicas", "scaleStrategy", "suspend"),
}


def config_of(name: str) -> ARPOConfig:
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["config"]


@pytest.fixture(scope="module")
def manifest() -> dict[str, Any]:
    return yaml.safe_load((EXAMPLES / "rayjob.yaml").read_text())


def container(group: dict[str, Any]) -> dict[str, Any]:
    (only,) = group["template"]["spec"]["containers"]
    return only


@pytest.mark.parametrize("name", ["almanac_cpu", "qwen_3b_arpo"])
def test_every_config_is_valid(name) -> None:
    config_of(name).validate()


def test_every_file_is_in_the_table() -> None:
    text = (EXAMPLES / "README.md").read_text()
    for file in EXAMPLES.iterdir():
        if file.name not in ("README.md", "__pycache__"):
            assert f"`{file.name}`" in text


def test_the_manifest_is_a_rayjob_and_has_only_fields_that_exist(manifest) -> None:
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayJob")
    assert set(manifest) == {"apiVersion", "kind", "metadata", "spec"}
    spec = manifest["spec"]
    cluster = spec["rayClusterSpec"]
    assert set(spec) <= JOB_FIELDS
    assert set(cluster) <= CLUSTER_FIELDS
    assert set(cluster["headGroupSpec"]) <= HEAD_FIELDS | {"template"}
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        # Values of `ray start` options are text.
        assert all(isinstance(v, str) for v in group["rayStartParams"].values())
        pod = group["template"]["spec"]
        mounted = {mount["name"] for mount in container(group)["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}
        assert container(group)["resources"].keys() == {"requests", "limits"}
    for group in cluster["workerGroupSpecs"]:
        assert set(group) <= WORKER_FIELDS | {"template"}
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_all_nodes_of_the_manifest_run_one_version(manifest) -> None:
    cluster = manifest["spec"]["rayClusterSpec"]
    assert cluster["rayVersion"] == ray.__version__
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    assert len({container(group)["image"] for group in groups}) == 1


def test_the_manifest_starts_what_is_there(manifest) -> None:
    spec = manifest["spec"]
    program, config, run, iterations = shlex.split(spec["entrypoint"])
    for path in (program, config):
        # As README's Dockerfile copies them.
        assert (EXAMPLES / Path(path).relative_to("/opt/arpo")).is_file()
    assert run.startswith("/shared/")
    assert int(iterations) > 0
    variables = yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]
    assert all(isinstance(value, str) for value in variables.values())
    assert variables["ARPO_DATA"] == "/shared"


def test_the_manifests_nodes_hold_the_configs_actors(manifest) -> None:
    config = config_of("qwen_3b_arpo")
    (group,) = manifest["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    limits = container(group)["resources"]["limits"]
    gpus = group["replicas"] * int(limits["nvidia.com/gpu"])
    # One GPU each.
    assert gpus == num_actors(vars(config)) == 8
    # Any four of them fit on a node.
    largest = max(config.num_cpus_per_env_runner, config.num_cpus_per_learner)
    assert int(limits["nvidia.com/gpu"]) * largest <= int(limits["cpu"])


def run_train_sh(folder: Path) -> list[str]:
    """The words that it calls `rllib-arpo` with."""
    programs = folder.parent / "programs"
    programs.mkdir(exist_ok=True)
    program = programs / "rllib-arpo"
    program.write_text('#!/bin/sh\necho "$@"\n')
    program.chmod(0o755)
    command = [
        str(EXAMPLES / "train.sh"),
        "config.py",
        str(folder),
        "5",
        "--model",
        "m",
    ]
    path = os.pathsep.join([str(programs), os.environ["PATH"]])
    said = subprocess.run(
        command, env={"PATH": path}, capture_output=True, text=True, check=True
    )
    return said.stdout.split()


def test_a_job_that_is_started_again_goes_on(tmp_path) -> None:
    run = tmp_path / "run"
    start = ["train", "config.py", "--out", str(run), "--iterations", "5"]
    assert run_train_sh(run) == [*start, "--model", "m"]
    # Lost before its first checkpoint: `train` would refuse the folder.
    run.mkdir()
    (run / "metrics.jsonl").touch()
    assert run_train_sh(run) == [*start, "--model", "m"]
    assert not (run / "metrics.jsonl").exists()
    (run / "checkpoints" / "iteration_000002").mkdir(parents=True)
    (run / "metrics.jsonl").touch()
    assert run_train_sh(run) == ["train", "--resume", str(run), "--iterations", "5"]
    assert (run / "metrics.jsonl").exists()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(
    importlib.util.find_spec("aiohttp_cors") is None,
    reason="the job server is not installed: the extra `cluster`",
)
def test_a_submitted_job_trains(almanac_model, tmp_path) -> None:
    assert run_script("job", almanac_model, tmp_path) == "SUCCEEDED"
    (line,) = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["iteration"] == 1
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()
