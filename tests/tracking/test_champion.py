"""Which version of a registered model the alias `champion` is of."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from rllib_arpo.tracking.mlflow import BEST_FILE, BUFFER_FOLDER, MLflowCallback
from rllib_arpo.tracking.registry import CHAMPION, move_alias_to_better, register_model
from tests.mlflow_server import MLFLOWS_WARNINGS
from tests.models import save_tiny_model
from tests.synced import Disk
from tests.tiny_runs import arpo_config

LIMIT_S = 120
NAME = "tiny"
BY_ACCURACY = (("eval_accuracy", "max"),)
BY_EITHER = (*BY_ACCURACY, ("loss", "min"))
pytestmark = MLFLOWS_WARNINGS


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> MlflowClient:
    folder = tmp_path_factory.mktemp("registry")
    return MlflowClient(f"sqlite:///{folder / 'mlruns.db'}")


@pytest.fixture
def client(registry: MlflowClient) -> Iterator[MlflowClient]:
    registry.create_registered_model(NAME)
    yield registry
    registry.delete_registered_model(NAME)


def version_with(client: MlflowClient, tags: dict[str, str]) -> str:
    return str(client.create_model_version(NAME, "file:///x", tags=tags).version)


def champion(client: MlflowClient) -> str:
    return str(client.get_model_version_by_alias(NAME, CHAMPION).version)


@pytest.mark.parametrize(
    ("before", "after", "measures", "moves"),
    [
        ({"eval_accuracy": "0.8"}, {"eval_accuracy": "0.02"}, BY_ACCURACY, False),
        ({"eval_accuracy": "0.8"}, {"eval_accuracy": "0.8"}, BY_ACCURACY, False),
        ({"eval_accuracy": "0.8"}, {"eval_accuracy": "0.9"}, BY_ACCURACY, True),
        ({"eval_accuracy": "0.8"}, {}, BY_ACCURACY, False),
        ({"eval_accuracy": "0.8"}, {"eval_accuracy": "nan"}, BY_ACCURACY, False),
        ({"eval_accuracy": "good"}, {"eval_accuracy": "0.1"}, BY_ACCURACY, True),
        ({"eval_accuracy": "nan"}, {"eval_accuracy": "0.1"}, BY_ACCURACY, True),
        ({}, {"eval_accuracy": "0.1"}, BY_ACCURACY, True),
        ({"loss": "2"}, {"loss": "3"}, BY_EITHER, False),
        ({"loss": "2"}, {"loss": "1"}, BY_EITHER, True),
        # The first that the champion has decides.
        ({"eval_accuracy": "0.8", "loss": "2"}, {"loss": "1"}, BY_EITHER, False),
        ({"eval_accuracy": "0.8"}, {"eval_accuracy": "0.1"}, (), True),
    ],
)
def test_only_what_measures_better_takes_the_alias(
    client, before, after, measures, moves
) -> None:
    first = version_with(client, before)
    client.set_registered_model_alias(NAME, CHAMPION, first)
    second = version_with(client, after)
    move_alias_to_better(client, NAME, CHAMPION, second, measures)
    assert champion(client) == (second if moves else first)


def test_the_first_version_takes_the_alias(client) -> None:
    version = version_with(client, {"eval_accuracy": "0.02"})
    move_alias_to_better(client, NAME, CHAMPION, version, BY_ACCURACY)
    assert champion(client) == version


class Interrupted(MlflowClient):
    """Somebody else does something before it sets an alias, or after that."""

    def __init__(self, uri: str, meanwhile: Callable[[], None], *, first: bool) -> None:
        super().__init__(uri)
        self._meanwhile = meanwhile
        self._first = first

    def set_registered_model_alias(self, name: str, alias: str, version: str) -> None:
        meanwhile, self._meanwhile = self._meanwhile, lambda: None
        if self._first:
            meanwhile()
        super().set_registered_model_alias(name, alias, version)
        if not self._first:
            meanwhile()


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("own", ["0.8", "0.95"])
def test_the_best_of_those_that_take_the_alias_at_once_has_it(
    client, own, first
) -> None:
    before = version_with(client, {"eval_accuracy": "0.5"})
    client.set_registered_model_alias(NAME, CHAMPION, before)
    version = {
        accuracy: version_with(client, {"eval_accuracy": accuracy})
        for accuracy in (own, "0.7", "0.9")
    }

    def take(accuracy: str) -> None:
        move_alias_to_better(client, NAME, CHAMPION, version[accuracy], BY_ACCURACY)

    def meanwhile() -> None:
        take("0.7")
        take("0.9")

    slow = Interrupted(client.tracking_uri, meanwhile, first=first)
    move_alias_to_better(slow, NAME, CHAMPION, version[own], BY_ACCURACY)
    assert champion(client) == version[max(own, "0.9")]


def test_who_took_the_alias_long_before_has_no_part_in_it(client) -> None:
    """Somebody may have had a reason to move it away from a better one."""
    before = version_with(client, {"eval_accuracy": "0.5"})
    client.set_registered_model_alias(NAME, CHAMPION, before)
    took = f"rllib_arpo.took.{CHAMPION}"
    version_with(client, {"eval_accuracy": "0.9", took: "1700000000000"})
    version = version_with(client, {"eval_accuracy": "0.7"})
    move_alias_to_better(client, NAME, CHAMPION, version, BY_ACCURACY)
    assert champion(client) == version


class Trained:
    """An algorithm as the callback sees it after an evaluation."""

    def __init__(self, model: str) -> None:
        self.config = arpo_config(model)

    def save_pretrained(self, folder: Path) -> None:
        save_tiny_model(folder)


def evaluate(model: str, folder: Path, uri: str, *accuracies: float) -> None:
    """A run whose iterations are evaluated as given."""
    callback = MLflowCallback(
        folder=folder, uri=uri, registered_model=NAME, system_metrics=False
    )
    for iteration, accuracy in enumerate(accuracies, start=1):
        result: dict[str, Any] = {
            "training_iteration": iteration,
            "evaluation": {"env_runners": {"accuracy": accuracy}},
        }
        callback.on_train_result(algorithm=Trained(model), result=result)
        assert callback.buffer is not None and callback.buffer.flush(LIMIT_S)
    assert callback.close(LIMIT_S)


def test_a_new_run_takes_the_alias_only_from_a_worse_champion(
    almanac_model, tmp_path
) -> None:
    uri = f"sqlite:///{tmp_path / 'mlruns.db'}"
    client = MlflowClient(uri)
    evaluate(almanac_model, tmp_path / "good", uri, 0.6, 0.8)
    assert champion(client) == "2"
    evaluate(almanac_model, tmp_path / "new", uri, 0.02, 0.9)
    versions = client.search_model_versions(f"name='{NAME}'")
    assert {str(one.version): one.tags["eval_accuracy"] for one in versions} == {
        "1": "0.6000",
        "2": "0.8000",
        "3": "0.0200",
        "4": "0.9000",
    }
    assert champion(client) == "4"
    evaluate(almanac_model, tmp_path / "newer", uri, 0.02)
    assert champion(client) == "4"
    # Whoever registers one by hand means it.
    model = save_tiny_model(tmp_path / "model")
    assert register_model(model, NAME, tags={"eval_accuracy": "0.1"}, uri=uri) == "6"
    assert champion(client) == "6"


def test_the_line_of_a_best_model_is_on_the_disk_before_it_counts_as_best(
    almanac_model, tmp_path, monkeypatch
) -> None:
    disk = Disk(monkeypatch)
    folder = tmp_path / "run" / BUFFER_FOLDER
    evaluate(almanac_model, tmp_path / "run", f"sqlite:///{tmp_path / 'x.db'}", 0.6)
    (outbox,) = (folder / "outbox").iterdir()
    assert disk.held(outbox, before=folder / BEST_FILE)
