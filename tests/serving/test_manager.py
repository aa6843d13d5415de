import asyncio
from collections.abc import Sequence
from contextvars import ContextVar
from types import SimpleNamespace

import pytest
from ray import serve

from rllib_arpo.serving import manager
from rllib_arpo.serving.manager import MAX_DELAY_S, ManagedModel, Manager, Tries

MODEL = ManagedModel(source="runs/one", version="1", deployment="engine-0")
REQUEST: ContextVar[str] = ContextVar("REQUEST", default="none")


def test_a_reload_goes_on_outside_of_its_request_when_who_asked_hangs_up(
    monkeypatch: pytest.MonkeyPatch,
):
    context = SimpleNamespace(app_name="rllib_arpo")
    monkeypatch.setattr(serve, "get_replica_context", lambda: context)
    monkeypatch.setattr(manager, "user_configs", lambda app: {})

    async def hang_up() -> str:
        begun, may_end = asyncio.Event(), asyncio.Event()
        ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()

        async def reload(names: Sequence[str], checkpoint: str | None):
            begun.set()
            await may_end.wait()
            ended.set_result(REQUEST.get())
            return {names[0]: "2"}

        body = Manager({"almanac": MODEL}, {}, poll_s=60)
        monkeypatch.setattr(body, "_reload", reload)
        REQUEST.set("that of the client")
        asked = asyncio.create_task(body.reload("almanac", "runs/two"))
        await begun.wait()
        # As Serve does; it cancels what was asked in the request's context, too.
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        may_end.set()
        return await ended

    async def within_a_minute() -> str:
        async with asyncio.timeout(60):
            return await hang_up()

    assert asyncio.run(within_a_minute()) == "none"


def test_weights_that_cannot_be_loaded_are_tried_ever_more_rarely():
    tries = Tries(first_s=10.0)
    assert tries.may_try("3", 0.0)
    tries.failed("3", 0.0)
    assert not tries.may_try("3", 9.0)
    assert tries.may_try("3", 10.0)
    tries.failed("3", 10.0)
    assert not tries.may_try("3", 29.0)
    assert tries.may_try("3", 30.0)
    for _ in range(20):
        tries.failed("3", 30.0)
    assert not tries.may_try("3", 30.0 + MAX_DELAY_S - 1)
    assert tries.may_try("3", 30.0 + MAX_DELAY_S)


def test_another_version_is_tried_at_once():
    tries = Tries(first_s=10.0)
    tries.failed("3", 0.0)
    tries.failed("3", 10.0)
    assert tries.may_try("4", 11.0)
    tries.failed("4", 11.0)
    assert not tries.may_try("4", 20.0)
    assert tries.may_try("4", 21.0)
