"""Three nodes on this machine, of which one is lost while its runner samples.

    python -m tests.scripts.cluster MODEL FOLDER

Learners are on the head, one EnvRunner on each of the others. Prints what was seen as
one line of JSON.
"""

import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster

from rllib_arpo import ARPO, ARPOConfig
from rllib_arpo.envs.almanac import AlmanacEnv
from rllib_arpo.metrics import NUM_TREES_REQUEUED
from tests.tiny_runs import arpo_config, engine_weights, learner_weights, running, same

LIMIT_S = 300
NUM_TREES = 4


class StuckEnv(AlmanacEnv):
    """On the node that the file `trap` names, rollouts start and never go on."""

    def __init__(self, config: Any = None) -> None:
        settings = dict(config or {})
        self.trap = Path(settings.pop("trap"))
        super().__init__(settings)

    def reset(self, *, seed=None, options=None):
        if self.trap.exists() and self.trap.read_text() == node_id():
            self.trap.with_name("stuck").touch()
            time.sleep(10 * LIMIT_S)  # the node is gone long before
        return super().reset(seed=seed, options=options)


def node_id(*_: Any) -> str:
    return ray.get_runtime_context().get_node_id()


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.1)


def nodes_of_runners(algorithm: ARPO) -> list[str]:
    return algorithm.env_runner_group.foreach_env_runner(
        node_id, local_env_runner=False
    )


def all_current(algorithm: ARPO) -> bool:
    weights = learner_weights(algorithm)
    runners = algorithm.env_runner_group.foreach_env_runner(
        engine_weights, local_env_runner=False
    )
    return all(same(held[name], weights[name]) for held in runners for name in weights)


def main(model: str, folder: Path) -> dict[str, Any]:
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 4, "resources": {"learner": 2}},
    )
    try:
        workers = [
            cluster.add_node(num_cpus=2, resources={"runner": 1}) for _ in range(2)
        ]
        ray.init(address=cluster.address, log_to_driver=False)
        with running(config_of(model, folder / "trap")) as algorithm:
            return lose_a_node(algorithm, cluster, workers, folder / "trap")
    finally:
        ray.shutdown()
        cluster.shutdown()


def config_of(model: str, trap: Path) -> ARPOConfig:
    """Two runners on the workers, two learners on the head."""
    return (
        arpo_config(model, trap=str(trap))
        .environment(env=StuckEnv)
        .training(train_batch_size_per_learner=NUM_TREES // 2, minibatch_size=1)
        .env_runners(num_env_runners=2, custom_resources_per_env_runner={"runner": 1})
        .learners(num_learners=2, custom_resources_per_learner={"learner": 1})
        .fault_tolerance(
            delay_between_env_runner_restarts_s=0.1,
            env_runner_health_probe_timeout_s=5,
        )
    )


def lose_a_node(
    algorithm: ARPO, cluster: Cluster, workers: list[Any], trap: Path
) -> dict[str, Any]:
    learners = [a.get() for a in algorithm.learner_group.foreach_learner(node_id)]
    runners = nodes_of_runners(algorithm)
    seen: dict[str, Any] = {
        "driver": node_id(),
        "learners": learners,
        "runners": runners,
        "episodes": [algorithm.train()["env_runners"]["num_episodes"]],
    }
    (lost,) = [worker for worker in workers if worker.node_id == runners[0]]
    before = algorithm.get_state()["num_trees_started"]

    def remove() -> None:
        wait_for(trap.with_name("stuck").exists)
        cluster.remove_node(lost, allow_graceful=False)

    trap.write_text(runners[0])
    remover = threading.Thread(target=remove)
    remover.start()
    sampled = algorithm.train()["env_runners"]
    remover.join()
    seen["episodes"].append(sampled["num_episodes"])
    seen["requeued"] = sampled[NUM_TREES_REQUEUED]
    seen["episodes"].append(algorithm.train()["env_runners"]["num_episodes"])
    seen["started"] = algorithm.get_state()["num_trees_started"] - before
    seen["runners_after"] = nodes_of_runners(algorithm)
    seen["current_after"] = all_current(algorithm)
    cluster.add_node(num_cpus=2, resources={"runner": 1})

    def two_are_back() -> bool:
        algorithm.restore_env_runners(algorithm.env_runner_group)
        return algorithm.env_runner_group.num_healthy_remote_env_runners() == 2

    wait_for(two_are_back)
    seen["episodes"].append(algorithm.train()["env_runners"]["num_episodes"])
    seen["runners_at_the_end"] = nodes_of_runners(algorithm)
    seen["current_at_the_end"] = all_current(algorithm)
    return seen


if __name__ == "__main__":
    # Counts are NumPy's.
    print(json.dumps(main(sys.argv[1], Path(sys.argv[2])), default=int))
