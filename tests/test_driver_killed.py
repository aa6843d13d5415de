"""A driver killed by SIGKILL at any moment, also in the middle of a save."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from rllib_arpo.checkpoints import newest_checkpoint
from tests.scripts import run_script
from tests.scripts.killed_driver import NUM_ITERATIONS
from tests.tiny_runs import same

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

LEARNER = Path("learner_group", "learner")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("killed")


@pytest.fixture(scope="module")
def seen(almanac_model: str, place: Path) -> dict[str, Any]:
    """What `tests/scripts/killed_driver.py` saw; it checks after every kill."""
    return json.loads(run_script("killed_driver", almanac_model, place, 3))


def records(run: Path) -> list[dict[str, Any]]:
    """The lines of a run but for times."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [
        {name: v for name, v in json.loads(line).items() if not is_time(name)}
        for line in lines
    ]


def learned_state(run: Path) -> dict[str, Any]:
    """Weights, optimizers, counters: all that learning goes on from."""
    checkpoint = newest_checkpoint(run)
    assert checkpoint is not None
    state = pickle.loads((checkpoint / LEARNER / "state.pkl").read_bytes())
    assert state.keys() >= {"optimizer", "schedule", "weights_seq_no"}
    del state["metrics_logger"]  # holds times
    weights = LEARNER / "rl_module" / "default_policy" / "module_state.pkl"
    return state | {"weights": pickle.loads((checkpoint / weights).read_bytes())}


def is_time(name: str) -> bool:
    return name.startswith("time_") or "per_s" in name or "latency" in name


def test_a_save_killed_at_any_of_its_calls_leaves_a_whole_checkpoint(seen) -> None:
    assert seen["calls"] > 10


def test_a_run_killed_again_and_again_ends_as_one_that_never_was(seen, place) -> None:
    assert seen["kills"]["while_saving"] >= 2
    assert seen["kills"]["at_any_time"] >= 1
    straight, killed = place / "straight", place / "killed"
    told = records(killed)
    assert [record["iteration"] for record in told] == [*range(1, NUM_ITERATIONS + 1)]
    assert told == records(straight)
    assert same(learned_state(straight), learned_state(killed))
    # Nothing is left of the saves that were killed.
    names = {entry.name for entry in (killed / "checkpoints").iterdir()}
    assert names == {
        f"iteration_{NUM_ITERATIONS - 1:06d}",
        f"iteration_{NUM_ITERATIONS:06d}",
    }


def test_ray_dies_with_its_driver_and_the_command_goes_on(seen, place) -> None:
    # GCS, raylet and its agents, the EnvRunner.
    assert seen["processes"] >= 3
    assert seen["alive"] == []
    told = records(place / "with_ray")
    assert [record["iteration"] for record in told] == [*range(1, NUM_ITERATIONS + 1)]
    assert (place / "with_ray" / "model" / "model.safetensors").exists()
