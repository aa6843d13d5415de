"""The whole server, Ray Serve included, as clients see it."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.serving.held_env import HOLD
from tests.serving.served import (
    CHAT,
    KEY,
    PATIENCE_S,
    QUESTION,
    Served,
    asked,
    until,
)
from tests.test_readme import PROGRAMS

pytestmark = pytest.mark.slow


@pytest.fixture
def official(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key=KEY) as client:
        yield client


def test_the_official_client_gets_the_same_answer_in_one_piece_and_streamed(
    official: openai.OpenAI, versions: dict[str, str]
) -> None:
    messages = [{"role": "user", "content": QUESTION}]
    whole = official.chat.completions.create(
        model="almanac",
        messages=messages,  # type: ignore[arg-type]
        seed=3,
    )
    agent = whole.choices[0].message.agent  # type: ignore[attr-defined]
    assert agent["version"] == versions["almanac"]
    assert agent["turns"]
    stream = official.chat.completions.create(
        model="almanac",
        messages=messages,  # type: ignore[arg-type]
        seed=3,
        stream=True,
    )
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream]
    assert "".join(pieces) == whole.choices[0].message.content


def test_the_client_in_the_readme_runs_as_printed(served: Served) -> None:
    program = PROGRAMS[1]
    for printed, here in (
        ("http://127.0.0.1:8000", served.url),
        ('api_key="none"', f"api_key={KEY!r}"),
        ('model="quickstart"', 'model="almanac"'),
    ):
        assert printed in program
        program = program.replace(printed, here)
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("\n")


def test_every_model_answers_by_its_name(official: openai.OpenAI) -> None:
    names = [model.id for model in official.models.list()]
    assert names == ["almanac", "endless"]
    with pytest.raises(openai.NotFoundError, match="no model"):
        official.chat.completions.create(
            model="gpt", messages=[{"role": "user", "content": QUESTION}]
        )


def test_a_wrong_key_is_refused_and_health_tells_of_all_engines(
    served: Served,
) -> None:
    wrong = {"Authorization": "Bearer wrong"}
    assert served.client.post(CHAT, json=asked(), headers=wrong).status_code == 401
    assert served.client.post("/admin/reload", json={}).status_code == 401
    health = served.client.get("/health").json()
    assert health["ready"] is True
    assert [one["id"] for one in health["models"]] == ["almanac", "endless"]


def test_when_a_client_hangs_up_the_engine_stops(served: Served) -> None:
    fields = asked(model="endless", temperature=0, stream=True)

    def running() -> list[float]:
        return served.numbers("rllib_arpo_engine_num_running", model="endless")

    with served.client.stream("POST", CHAT, json=fields) as response:
        # Whoever drops the iterator hangs up.
        lines = response.iter_lines()
        assert any('"text"' in line for line in lines)
        assert running() == [1.0]
    until(lambda: running() == [0.0])


def test_when_a_client_hangs_up_its_tool_is_cancelled(
    served: Served, tmp_path: Path
) -> None:
    for seed in range(100):
        fields = asked(seed=seed, stream=True, metadata={HOLD: str(tmp_path)})
        with served.client.stream("POST", CHAT, json=fields) as response:
            for line in response.iter_lines():
                if '"tool_started"' in line and '"search"' in line:
                    until((tmp_path / "started").exists)
                    break
        if (tmp_path / "started").exists():
            break
    until((tmp_path / "cancelled").exists)


def test_numbers_are_those_of_agents_and_engines(served: Served) -> None:
    def answered() -> float:
        name = "rllib_arpo_requests_total"
        return sum(served.numbers(name, route=CHAT, status="200"))

    # A request is counted after its last byte: those of the tests before, too. The one
    # in flight is the question itself.
    until(lambda: served.numbers("rllib_arpo_requests_in_flight") == [1.0])
    before = answered()
    served.post(seed=1).raise_for_status()
    until(lambda: answered() > before)
    assert answered() == before + 1
    assert served.numbers("rllib_arpo_engine_num_versions", model="almanac")[0] >= 1
    assert json.loads(served.client.get("/openapi.json").text)["paths"]
