"""The whole server with vLLM as its engine."""

import json
from collections.abc import Iterator
from pathlib import Path

import openai
import psutil
import pytest

from rllib_arpo.agent_weights import find_weights
from tests.serving.calling_agent import ANSWER, FOUND, SEARCH, make_calling_agent
from tests.serving.served import KEY, QUESTION, Served, serving
from tests.vllm_session import SMALL

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_calling_agent(tmp_path_factory.mktemp("agents") / "almanac")


@pytest.fixture(scope="module")
def by_vllm(model: Path) -> Iterator[Served]:
    settings = json.dumps({**SMALL, "max_model_len": 1024})
    words = ("--api-key", KEY, "--engine", "vllm", "--engine-kwargs", settings)
    with serving(f"almanac={model}", *words) as running:
        yield running


def test_vllm_writes_the_turns_of_answers_whole_and_streamed(
    by_vllm: Served, model: Path
) -> None:
    (engine,) = by_vllm.replicas("engine-0")
    of_engine = psutil.Process(engine).children(recursive=True)
    assert any("spawn_main" in " ".join(one.cmdline()) for one in of_engine)
    with openai.OpenAI(base_url=f"{by_vllm.url}/v1", api_key=KEY) as client:
        messages = [{"role": "user", "content": QUESTION}]
        whole = client.chat.completions.create(
            model="almanac",
            messages=messages,  # type: ignore[arg-type]
        )
        stream = client.chat.completions.create(
            model="almanac",
            messages=messages,  # type: ignore[arg-type]
            stream=True,
        )
        chunks = [chunk.choices[0] for chunk in stream]
    (choice,) = whole.choices
    assert (choice.message.content, choice.finish_reason) == ("44", "stop")
    agent = choice.message.agent  # type: ignore[attr-defined]
    assert agent["version"] == find_weights(str(model)).version
    assert [turn["text"] for turn in agent["turns"]] == [SEARCH, ANSWER]
    assert agent["turns"][0]["tool_call"]["result"] == FOUND
    assert "".join(chunk.delta.content or "" for chunk in chunks) == "44"
    assert chunks[-1].finish_reason == "stop"
