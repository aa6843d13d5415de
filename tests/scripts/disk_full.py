"""Saves on a disk that is full: a small one, or a limit on the size of files.

    python -m tests.scripts.disk_full MODEL FOLDER

FOLDER/disk is the disk, small where the machine allowed one to be mounted. Prints what
happened as one line of JSON.
"""

import json
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray

from rllib_arpo import ARPO
from rllib_arpo.errors import CheckpointError
from rllib_arpo.runs import Run
from tests.tiny_runs import arpo_config, learner_weights, running, same


def main(model: str, disk: Path) -> dict[str, Any]:
    mounted = disk.is_mount()
    ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    seen = {
        "disk": "a small one" if mounted else "no mount allowed: a limit on files",
        "local": save_all(model, disk / "local", num_learners=0, mounted=mounted),
        "remote": save_all(model, disk / "remote", num_learners=1, mounted=mounted),
    }
    ray.shutdown()
    return seen


def save_all(
    model: str, folder: Path, *, num_learners: int, mounted: bool
) -> dict[str, Any]:
    run = Run(folder)
    config = arpo_config(model).learners(num_learners=num_learners)
    with running(config) as algorithm:
        first = run.save_checkpoint(algorithm)
        weights = learner_weights(algorithm)
        run.write_json("summary.json", {"rows": 0})
        algorithm.train()
        fill = fill_disk if mounted else limit_files
        empty = fill(algorithm, folder)
        seen: dict[str, Any] = {
            "checkpoint": refusal(lambda: run.save_checkpoint(algorithm)),
            "model": refusal(lambda: algorithm.save_pretrained(folder / "model")),
            "summary": refusal(
                lambda: run.write_json("summary.json", {"rows": list(range(10**6))})
            ),
        }
        empty()
        seen["left_over"] = [
            str(path) for path in folder.rglob("*.part") if path.exists()
        ] + [str(path) for path in folder.glob("model")]
        assert run.checkpoint == first, run.checkpoint
        algorithm.restore_from_path(str(first))
        seen["before_is_whole_and_loads"] = same(weights, learner_weights(algorithm))
        algorithm.train()
        seen["saved_again"] = run.save_checkpoint(algorithm) == run.checkpoint != first
    return seen


def refusal(save: Callable[[], Any]) -> str:
    try:
        save()
    except CheckpointError as error:
        return str(error)
    return "it was written"


def fill_disk(algorithm: ARPO, folder: Path) -> Callable[[], None]:
    """Leave a third of what a model takes."""
    weights = size_of_weights(folder)
    filler = folder.parent / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            file.truncate(file.tell() - weights // 3)
    return filler.unlink


def size_of_weights(folder: Path) -> int:
    return max(file.stat().st_size for file in folder.rglob("module_state.pkl"))


def limit_files(algorithm: ARPO, folder: Path) -> Callable[[], None]:
    """No process may write a file longer than a third of the model."""
    everywhere(algorithm, size_of_weights(folder) // 3)
    return lambda: everywhere(algorithm, resource.RLIM_INFINITY)


def everywhere(algorithm: ARPO, limit: int) -> None:
    def apply(*_: Any) -> None:
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))

    apply()
    algorithm.learner_group.foreach_learner(apply)


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], Path(sys.argv[2]) / "disk")))
