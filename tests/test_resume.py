"""Two iterations, a checkpoint, a new process and two more equal four, bit for bit."""

import pickle
from pathlib import Path
from typing import Any

import pytest

from rllib_arpo.runs import Run
from tests.scripts import run_script
from tests.scripts.resume import NUM_MORE, VARIANTS, config_of, more, seed_all
from tests.tiny_runs import running, same

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.usefixtures("ray_session"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resume")


@pytest.fixture(scope="module")
def straight(cold_start, place: Path) -> dict[str, Any]:
    """What each variant does from iteration 3 on, with a save before but no stop."""
    seen = {}
    for variant in VARIANTS:
        seed_all(1)
        with running(config_of(variant, cold_start.model)) as algorithm:
            for _ in range(NUM_MORE):
                algorithm.train()
            algorithm.save_to_path(place / variant / "checkpoint")
            seen[variant] = more(algorithm, Run(place / variant / "straight"))
    return seen


@pytest.fixture(scope="module")
def resumed(straight: dict[str, Any], place: Path) -> dict[str, Any]:
    """The same from the checkpoints, in another process and with other generators."""
    assert run_script("resume", place, 2) == "done"
    return {
        variant: pickle.loads((place / variant / "resumed.pkl").read_bytes())
        for variant in VARIANTS
    }


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_resumed_run_equals_one_that_never_stopped(
    straight, resumed, variant
) -> None:
    for left, right in zip(
        straight[variant]["records"], resumed[variant]["records"], strict=True
    ):
        assert left == right
    left, right = straight[variant]["state"], resumed[variant]["state"]
    assert left.keys() == right.keys()
    for name in left:
        assert same(left[name], right[name]), name


def test_what_is_compared_can_differ(straight) -> None:
    first, second = straight["local"]["records"]
    assert first["iteration"] == NUM_MORE + 1
    assert first["checksum"] != second["checksum"]
    assert first["learning_rate"] != second["learning_rate"]
    state = straight["local"]["state"]
    learner = state["learner_group"]["learner"]
    assert set(learner["optimizer"]) == {"default_policy_adamw", "default_policy_muon"}
    # Two epochs over 5 trees, two a step: 3 steps each, four iterations.
    assert learner["schedule"]["num_optimizer_steps"] == 24
    assert state["task_cursor"]["epoch"] > 0
    assert state["num_trees_started"] >= 20
    # SFT evaluates every second iteration.
    assert "eval_reward_mean" in straight["sft"]["records"][1]
