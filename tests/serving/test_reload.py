"""Other weights while clients ask."""

from pathlib import Path

import pytest

from tests.serving.served import Crowd, Served, until
from tests.serving.test_vocabulary import swapped

pytestmark = pytest.mark.slow

NUM_CLIENTS = 32


def test_weights_change_under_load_without_a_failure(
    served: Served, weights: dict[str, str], versions: dict[str, str]
) -> None:
    old, new = versions["almanac"], versions["other"]
    with Crowd(served, NUM_CLIENTS) as crowd:
        until(lambda: crowd.has(NUM_CLIENTS, round=0))
        answer = served.reload(model="almanac", checkpoint=weights["other"])
        crowd.round = 1
        until(lambda: crowd.has(2 * NUM_CLIENTS, round=1))
    assert answer.json() == {"models": {"almanac": new}}
    assert {reply.status for reply in crowd.replies} == {200}
    assert {reply.error for reply in crowd.replies} == {None}
    assert {reply.version for reply in crowd.replies} == {old, new}
    assert {reply.version for reply in crowd.replies if reply.round == 1} == {new}
    # Without a checkpoint the model's own source is looked at again.
    assert served.reload(model="almanac").json() == {"models": {"almanac": old}}


def version_of(served: Served) -> str:
    message = served.post(seed=1).raise_for_status().json()["choices"][0]["message"]
    return message["agent"]["version"]


def is_reloaded(served: Served, **fields: str) -> bool:
    """503 says to ask again: a replica that was killed has yet to come back."""
    reply = served.reload(**fields)
    assert reply.status_code in (200, 503), reply.text
    return reply.status_code == 200


def test_an_engine_that_starts_later_has_the_new_weights(
    served: Served, weights: dict[str, str], versions: dict[str, str]
) -> None:
    until(lambda: is_reloaded(served, model="almanac", checkpoint=weights["other"]))
    before = served.replicas("engine-0")
    served.kill("engine-0")
    until(lambda: bool(served.replicas("engine-0") - before))
    until(lambda: served.client.get("/health").status_code == 200)
    assert version_of(served) == versions["other"]
    until(lambda: is_reloaded(served, model="almanac"))


def test_weights_that_are_not_there_change_nothing(
    served: Served, versions: dict[str, str]
) -> None:
    refused = served.reload(model="almanac", checkpoint="nowhere")
    assert refused.status_code == 400
    assert "nowhere" in refused.json()["error"]["message"]
    assert version_of(served) == versions["almanac"]


def test_weights_of_another_tokenizer_are_refused(
    served: Served,
    versions: dict[str, str],
    weights: dict[str, str],
    tmp_path: Path,
) -> None:
    other = swapped(weights["other"], tmp_path / "other")
    refused = served.reload(model="almanac", checkpoint=str(other))
    assert refused.status_code == 400
    error = refused.json()["error"]
    assert error["param"] == "checkpoint"
    assert "another vocabulary" in error["message"]
    assert version_of(served) == versions["almanac"]
