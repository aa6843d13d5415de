from collections.abc import Iterator

import pytest
import ray

from rllib_arpo.envs.almanac import AlmanacWorld
from rllib_arpo.envs.almanac_model import build_model, build_tokenizer
from tests.tiny_runs import ColdStart, learned, running, sft_config


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One Ray for all tests that need one."""
    # Logical CPUs: two runners, two learners and a driver wait for each other.
    ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def almanac_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model of the embedded world, as drawn."""
    folder = tmp_path_factory.mktemp("almanac_model")
    build_model(build_tokenizer(AlmanacWorld(), folder), folder)
    return str(folder)


@pytest.fixture(scope="session")
def cold_start(
    almanac_model: str, ray_session: None, tmp_path_factory: pytest.TempPathFactory
) -> ColdStart:
    """The same model after 80 steps of imitation: it calls tools, and often errs."""
    folder = tmp_path_factory.mktemp("cold_start")
    with running(sft_config(almanac_model)) as algorithm:
        losses = [
            float(learned(algorithm.train())["negative_log_likelihood"])
            for _ in range(8)
        ]
        return ColdStart(
            losses=losses,
            model=str(algorithm.save_pretrained(folder / "model")),
            checkpoint=algorithm.save_to_path(str(folder / "checkpoint")),
        )
