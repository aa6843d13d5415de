import asyncio
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from rllib_arpo.agent_weights import find_weights
from rllib_arpo.engines.engine import Engine
from rllib_arpo.engines.scripted_engine import ScriptedEngine, ScriptedReply
from rllib_arpo.errors import ConfigError, EngineError
from rllib_arpo.serving.engine_client import EngineLostError, VersionGoneError
from rllib_arpo.serving.engine_deployment import (
    MAX_LOST_TURNS,
    EngineReplica,
    EngineSettings,
    ReplicaState,
    open_engine,
)
from tests.serving.engine_turns import collect, request, token_ids
from tests.tiny_runs import ColdStart
from tests.virtual_time import run_virtual

LONGEST_ANSWER_S = 600.0


@asynccontextmanager
async def running(**settings: object) -> AsyncIterator[EngineReplica]:
    replica = EngineReplica(**settings)  # type: ignore[arg-type]
    try:
        yield replica
    finally:
        replica.close()


class Scripted:
    """Opens engines that play one token, and keeps them."""

    def __init__(self, *, delay_s: float = 0.0) -> None:
        self.engines: list[ScriptedEngine] = []
        self.folders: list[Path] = []
        self.had_weights: list[bool] = []
        self.delay_s = delay_s

    async def __call__(self, settings: EngineSettings, folder: Path) -> Engine:
        token = len(self.engines)
        reply = ScriptedReply(token_ids=[token] * 4, delay_s=self.delay_s)
        self.engines.append(ScriptedEngine(lambda _: reply))
        self.folders.append(folder)
        self.had_weights.append((folder / "model.safetensors").is_file())
        return self.engines[-1]


def is_closed(engine: ScriptedEngine) -> bool:
    async def first() -> None:
        await anext(engine.generate(request()))

    try:
        asyncio.run(first())
    except EngineError:
        return True
    return False


def config(source: object, version: str | None = None) -> dict[str, object]:
    return {"source": str(source), "version": version}


def test_a_checkpoint_and_the_model_saved_of_it_write_the_same(
    cold_start: ColdStart,
) -> None:
    async def turns() -> None:
        async with running() as replica:
            await replica.reconfigure(config(cold_start.model, "model"))
            of_model = await collect(replica, request("a"))
            await replica.reconfigure(config(cold_start.checkpoint))
            of_checkpoint = await collect(replica, request("b"))
            assert token_ids(of_model) == token_ids(of_checkpoint)
            fingerprint = find_weights(cold_start.checkpoint).version
            assert {c.version for c in of_checkpoint} == {fingerprint}

    asyncio.run(turns())


def test_a_replica_takes_its_runs_newest_checkpoint_if_its_own_was_tidied_away(
    cold_start: ColdStart, tmp_path: Path
) -> None:
    checkpoints = tmp_path / "run" / "checkpoints"
    newest = checkpoints / "iteration_000003"
    shutil.copytree(cold_start.checkpoint, newest)
    gone = config(checkpoints / "iteration_000001", "1")
    opened = Scripted()

    async def start() -> None:
        async with running(open_engine=opened) as replica:
            await replica.reconfigure(gone)
            assert (await replica.state()).newest == find_weights(str(newest)).version
            # It has weights, and asks for none in place of others.
            with pytest.raises(ConfigError, match="iteration_000001"):
                await replica.prepare(gone)

    asyncio.run(start())
    # What was written for the engine is gone, too.
    assert not opened.folders[0].exists()


def test_without_its_run_a_tidied_checkpoint_is_missing(tmp_path: Path) -> None:
    gone = tmp_path / "run" / "checkpoints" / "iteration_000001"

    async def start() -> None:
        async with running(open_engine=Scripted()) as replica:
            with pytest.raises(ConfigError, match="there is no folder"):
                await replica.reconfigure(config(gone))

    asyncio.run(start())


def test_an_answer_goes_on_with_the_weights_that_began_it(
    almanac_model: str, cold_start: ColdStart
) -> None:
    async def turns() -> None:
        async with running() as replica:
            await replica.reconfigure(config(almanac_model, "old"))
            untouched = token_ids(await collect(replica, request("a")))
            turn = replica.generate(request("b"))
            written = [await anext(turn)]
            await replica.reconfigure(config(cold_start.model, "new"))
            written += [chunk async for chunk in turn]
            assert token_ids(written) == untouched
            later = await collect(replica, request("c"), written[0].version)
            assert token_ids(later) == untouched
            first = await collect(replica, request("d"))
            assert first[0].version == "new"
            assert token_ids(first) != untouched
            assert (await replica.metrics())["num_versions"] == 2

    asyncio.run(turns())


def test_turns_go_on_while_weights_load(almanac_model: str, tmp_path: Path) -> None:
    other = shutil.copytree(almanac_model, tmp_path / "other")
    loading, may_load = asyncio.Event(), asyncio.Event()

    async def slow(settings: EngineSettings, folder: Path) -> Engine:
        if folder == other:
            loading.set()
            await may_load.wait()
        return await open_engine(settings, folder)

    async def turns() -> None:
        async with running(open_engine=slow) as replica:
            await replica.reconfigure(config(almanac_model, "old"))
            load = asyncio.ensure_future(replica.reconfigure(config(other, "new")))
            await loading.wait()
            assert (await collect(replica, request("a")))[0].version == "old"
            may_load.set()
            await load
            assert (await collect(replica, request("b")))[0].version == "new"

    asyncio.run(turns())


def test_the_event_loop_goes_on_while_the_torch_engine_loads(
    almanac_model: str,
) -> None:
    async def turns_of_the_loop() -> int:
        load = asyncio.ensure_future(open_engine(EngineSettings(), Path(almanac_model)))
        count = 0
        while not load.done():
            count += 1
            await asyncio.sleep(0)
        load.result().close()
        return count

    assert asyncio.run(turns_of_the_loop()) > 10


@pytest.mark.vllm
@pytest.mark.slow
def test_vllm_holds_two_versions_and_generates_while_one_loads(
    almanac_model: str, tmp_path: Path
) -> None:
    other = shutil.copytree(almanac_model, tmp_path / "other")
    settings = EngineSettings(
        engine="vllm",
        engine_kwargs={"max_model_len": 128, "kv_cache_memory_bytes": 1 << 26},
    )

    async def turns() -> None:
        async with running(settings=settings) as replica:
            await replica.reconfigure(config(almanac_model, "old"))
            load = asyncio.ensure_future(replica.reconfigure(config(other, "new")))
            await asyncio.sleep(0)
            before = await collect(replica, request("a"))
            assert not load.done()
            await load
            new = await collect(replica, request("b"))
            old = await collect(replica, request("c"), "old")
            versions = [chunks[0].version for chunks in (before, new, old)]
            assert versions == ["old", "new", "old"]
            assert token_ids(before) == token_ids(new) == token_ids(old)

    asyncio.run(turns())


def test_prepared_weights_wait_for_their_turn(almanac_model: str) -> None:
    async def turns() -> None:
        async with running(open_engine=Scripted()) as replica:
            await replica.reconfigure(config(almanac_model, "old"))
            assert await replica.prepare(config(almanac_model, "new")) == "new"
            # Another replica may have begun an answer with them.
            assert token_ids(await collect(replica, request(), "new")) == [1] * 4
            assert token_ids(await collect(replica, request())) == [0] * 4
            await replica.reconfigure(config(almanac_model, "new"))
            assert token_ids(await collect(replica, request())) == [1] * 4
            assert await replica.state() == ReplicaState(
                newest="new", versions=("new", "old"), failure=None
            )

    asyncio.run(turns())


def test_weights_that_cannot_be_loaded_change_nothing(
    almanac_model: str, tmp_path: Path
) -> None:
    broken = shutil.copytree(almanac_model, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"no weights")

    async def turns() -> None:
        async with running() as replica:
            with pytest.raises(ConfigError, match="there is no folder"):
                await replica.reconfigure(config(tmp_path / "nowhere"))
            await replica.reconfigure(config(almanac_model, "old"))
            with pytest.raises(EngineError, match=f"cannot load {broken}"):
                await replica.prepare(config(broken, "new"))
            with pytest.raises(ConfigError, match="user_config"):
                await replica.prepare({})
            # Serve would stop a replica that raises.
            await replica.reconfigure(config(broken, "new"))
            state = await replica.state()
            assert (state.newest, state.versions) == ("old", ("old",))
            assert str(broken) in str(state.failure)
            assert (await collect(replica, request()))[0].version == "old"

    asyncio.run(turns())


def virtual_replica(
    work: Callable[[EngineReplica, Scripted], Awaitable[None]], *, delay_s: float = 0.0
) -> None:
    """On a clock that jumps."""
    opened = Scripted(delay_s=delay_s)

    async def turns() -> None:
        async with running(
            open_engine=opened, max_request_s=LONGEST_ANSWER_S
        ) as replica:
            await work(replica, opened)

    run_virtual(turns())


def test_old_weights_leave_when_no_answer_can_need_them(almanac_model: str) -> None:
    async def work(replica: EngineReplica, opened: Scripted) -> None:
        await replica.reconfigure(config(almanac_model, "old"))
        await replica.reconfigure(config(almanac_model, "new"))
        await asyncio.sleep(LONGEST_ANSWER_S - 1)
        assert (await collect(replica, request(), "old"))[0].version == "old"
        await asyncio.sleep(LONGEST_ANSWER_S - 1)
        assert (await replica.state()).versions == ("new", "old")
        await asyncio.sleep(2)
        with pytest.raises(VersionGoneError, match="only new"):
            await collect(replica, request(), "old")
        await collect(replica, request())

    virtual_replica(work)


def test_a_turn_that_runs_keeps_its_weights(almanac_model: str) -> None:
    async def work(replica: EngineReplica, opened: Scripted) -> None:
        await replica.reconfigure(config(almanac_model, "old"))
        turn = replica.generate(request())
        await anext(turn)
        await replica.reconfigure(config(almanac_model, "new"))
        rest = [chunk async for chunk in turn]
        assert len(rest) == 3
        assert asyncio.get_running_loop().time() > 2 * LONGEST_ANSWER_S
        await asyncio.sleep(LONGEST_ANSWER_S - 1)
        assert len(await collect(replica, request(), "old")) == 4
        assert (await replica.state()).versions == ("new", "old")

    virtual_replica(work, delay_s=LONGEST_ANSWER_S)


def test_weights_that_come_back_stay(almanac_model: str) -> None:
    async def work(replica: EngineReplica, opened: Scripted) -> None:
        await replica.reconfigure(config(almanac_model, "a"))
        await replica.reconfigure(config(almanac_model, "b"))
        await replica.reconfigure(config(almanac_model, "a"))
        await asyncio.sleep(2 * LONGEST_ANSWER_S)
        assert (await replica.state()).versions == ("a",)
        assert len(opened.engines) == 2
        await collect(replica, request())

    virtual_replica(work)


def test_weights_that_were_prepared_in_vain_leave(almanac_model: str) -> None:
    async def work(replica: EngineReplica, opened: Scripted) -> None:
        await replica.reconfigure(config(almanac_model, "old"))
        await replica.prepare(config(almanac_model, "new"))
        await asyncio.sleep(LONGEST_ANSWER_S + 1)
        assert (await replica.state()).versions == ("old",)

    virtual_replica(work)


def test_closing_ends_engines_and_leaves_no_file_of_ours(cold_start: ColdStart) -> None:
    opened = Scripted()

    async def turns() -> None:
        async with running(open_engine=opened) as replica:
            await replica.reconfigure(config(cold_start.checkpoint, "a"))
            await replica.reconfigure(config(cold_start.model, "b"))

    asyncio.run(turns())
    assert [is_closed(engine) for engine in opened.engines] == [True, True]
    assert opened.had_weights == [True, True]
    assert not opened.folders[0].exists()
    assert opened.folders[1] == Path(cold_start.model)
    assert (opened.folders[1] / "model.safetensors").is_file()


def test_a_replica_whose_turns_are_all_lost_is_unhealthy(almanac_model: str) -> None:
    opened = Scripted()

    async def turns() -> None:
        async with running(open_engine=opened) as replica:
            await replica.reconfigure(config(almanac_model))
            opened.engines[0].close()
            for _ in range(MAX_LOST_TURNS):
                await replica.check_health()
                with pytest.raises(EngineLostError):
                    await collect(replica, request())
            with pytest.raises(EngineLostError, match="turns were lost"):
                await replica.check_health()

    asyncio.run(turns())


def test_an_unknown_engine_is_refused() -> None:
    with pytest.raises(ConfigError, match="'jax'"):
        EngineReplica(EngineSettings(engine="jax"))
