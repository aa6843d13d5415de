import asyncio
import json
import subprocess
import sys
from contextlib import aclosing
from pathlib import Path
from typing import Any, cast

import pytest

from rllib_arpo.engines.torch_engine import TorchEngine
from rllib_arpo.errors import EngineError
from rllib_arpo.serving.engine_client import (
    EngineLostError,
    InProcessEngine,
    VersionGoneError,
)
from tests.serving.engine_turns import collect, request, token_ids

# The call ends long before; it is there so that a hang is no hang of the suite.
LIMIT_S = 600


@pytest.fixture
def engine(almanac_model: str) -> TorchEngine:
    return TorchEngine.from_pretrained(almanac_model)


def test_a_turn_comes_in_chunks_of_the_interval_with_the_version(
    engine: TorchEngine,
) -> None:
    client = InProcessEngine(engine, version="v1")

    async def turns() -> None:
        single = await collect(client, request("a"), "v1")
        five = await collect(client, request("b", stream_interval=5))
        whole = await collect(client, request("c", stream_interval=12))
        assert [len(c.tokens.token_ids) for c in five] == [5, 5, 2]
        assert (len(single), len(whole)) == (12, 1)
        assert token_ids(single) == token_ids(five) == token_ids(whole)
        assert {chunk.version for chunk in single} == {"v1"}
        assert five[-1].tokens.finish_reason == "length"

    asyncio.run(turns())


def test_closing_the_iterator_cancels_the_request(engine: TorchEngine) -> None:
    client = InProcessEngine(engine)

    async def leave() -> None:
        # Its type does not say that it is a generator.
        chunks = cast(Any, client.generate(request(max_tokens=500)))
        async with aclosing(chunks):
            await anext(chunks)
            assert engine.metrics()["num_running"] == 1
        assert engine.metrics()["num_running"] == 0

    asyncio.run(leave())


def test_another_version_is_gone(engine: TorchEngine) -> None:
    client = InProcessEngine(engine, version="v2")
    with pytest.raises(VersionGoneError, match=r"'v1'.*only v2"):
        asyncio.run(collect(client, request(), "v1"))


def test_a_wrong_request_is_no_loss_and_need_not_be_asked_again(
    engine: TorchEngine,
) -> None:
    with pytest.raises(EngineError, match="max_tokens") as caught:
        asyncio.run(collect(InProcessEngine(engine), request(max_tokens=0)))
    assert not isinstance(caught.value, EngineLostError)


def test_an_engine_that_is_closed_in_mid_turn_is_lost(engine: TorchEngine) -> None:
    client = InProcessEngine(engine)

    async def lose() -> None:
        chunks = client.generate(request(max_tokens=500))
        await anext(chunks)
        engine.close()
        async for _ in chunks:
            pass

    with pytest.raises(EngineLostError, match="was closed"):
        asyncio.run(lose())
    with pytest.raises(EngineLostError):
        asyncio.run(collect(client, request()))


@pytest.mark.slow
def test_replicas_of_ray_serve_do_the_same(almanac_model: str, tmp_path: Path) -> None:
    endless = tmp_path / "endless"
    script = Path(__file__).with_name("engine_on_serve.py")
    done = subprocess.run(
        [sys.executable, str(script), almanac_model, str(endless)],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    local = InProcessEngine(TorchEngine.from_pretrained(almanac_model))
    assert seen["tokens"] == token_ids(asyncio.run(collect(local, request())))
    assert seen["chunks"] == [12, 1]
    assert seen["cancelled"] == [1, 0]
    assert seen["version_gone"].startswith("VersionGoneError: version 'old' of")
    assert seen["wrong_request"].startswith("EngineError: cannot generate for")
    assert seen["cannot_prepare"].startswith("ConfigError: there is no folder")
    assert seen["reloaded"] == {"first": "b", "later": "a", "versions": ["b", "a"]}
    assert seen["kept"] == {"newest": "b", "failure": True, "serves": "b"}
    assert seen["busy"].startswith("EngineBusyError: too many turns wait")
    assert seen["killed"].startswith("EngineLostError: the engine's replica is gone")
