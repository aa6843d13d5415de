"""A cluster of three nodes on one machine, and losing one of them."""

import json
from typing import Any

import pytest

from tests.scripts import run_script
from tests.scripts.cluster import NUM_TREES

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def seen(almanac_model: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What `tests/scripts/cluster.py` saw; in a process, beside the session's Ray."""
    folder = tmp_path_factory.mktemp("cluster")
    return json.loads(run_script("cluster", almanac_model, folder))


def test_runners_and_learners_are_where_their_resources_are(seen) -> None:
    assert set(seen["learners"]) == {seen["driver"]}
    assert len({*seen["runners"], seen["driver"]}) == 3


def test_training_goes_on_without_a_node_and_no_task_is_lost(seen) -> None:
    # Every iteration is whole: the two trees of the lost runner were grown again.
    assert seen["episodes"] == [NUM_TREES] * 4
    assert seen["requeued"] == NUM_TREES // 2
    # Two iterations' tasks were taken: none twice.
    assert seen["started"] == 2 * NUM_TREES
    assert seen["runners_after"] == seen["runners"][1:]
    assert seen["current_after"]


def test_a_new_node_is_put_to_use_with_the_current_weights(seen) -> None:
    assert len(set(seen["runners_at_the_end"])) == 2
    assert seen["runners"][0] not in seen["runners_at_the_end"]
    assert seen["current_at_the_end"]
