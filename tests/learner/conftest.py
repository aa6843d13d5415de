from collections.abc import Iterator

import pytest

from tests.learner.pairs import LearnerPair
from tests.models import save_tiny_model


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def pair(tiny: str, ray_session: None) -> Iterator[LearnerPair]:
    """Two learners in actors for all tests of this folder."""
    pair = LearnerPair(tiny)
    yield pair
    pair.group.shutdown()
