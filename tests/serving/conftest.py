from collections.abc import Iterator
from pathlib import Path

import pytest

from rllib_arpo.agent_weights import find_weights
from tests.serving.served import (
    ADMIN_KEY,
    KEY,
    Served,
    make_agent,
    make_endless,
    serving,
)
from tests.tiny_runs import ColdStart

# Of a test with the servers that its fixtures start: each takes minutes where the cores
# are busy with others.
LIMIT_S = 900


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.timeout(LIMIT_S))


@pytest.fixture(scope="package")
def weights(
    cold_start: ColdStart, almanac_model: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """Sources: "almanac" calls tools, "other" has its shape, "endless" never stops."""
    folder = tmp_path_factory.mktemp("weights")
    return {
        "almanac": str(make_agent(cold_start.model, folder / "almanac")),
        "other": almanac_model,
        "endless": str(make_endless(almanac_model, folder / "endless")),
    }


@pytest.fixture(scope="package")
def versions(weights: dict[str, str]) -> dict[str, str]:
    return {name: find_weights(source).version for name, source in weights.items()}


@pytest.fixture(scope="package")
def served(weights: dict[str, str]) -> Iterator[Served]:
    """`rllib-arpo serve` with two models and keys."""
    words = [f"{name}={weights[name]}" for name in ("almanac", "endless")]
    with serving(*words, "--api-key", KEY, "--admin-key", ADMIN_KEY) as running:
        yield running
