import pytest
import torch

WITHOUT_GPU = "needs a CUDA device, and there is none"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.path.parts:
                item.add_marker(pytest.mark.skip(reason=WITHOUT_GPU))
