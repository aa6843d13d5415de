from pathlib import Path

import pytest

# Of a test with the servers that it starts: MLflow alone takes minutes to import where
# the cores are busy with others.
LIMIT_S = 900


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.timeout(LIMIT_S))
