"""An `EngineReplica` on a Ray Serve of its own; prints what was seen as JSON.

Usage: engine_on_serve.py MODEL ENDLESS, ENDLESS a folder to write a second model to.
"""

import asyncio
import json
import logging
import sys
from contextlib import aclosing
from pathlib import Path
from typing import Any, cast

import ray
from ray import serve

sys.path.insert(0, str(Path(__file__).parents[2]))

from rllib_arpo.engines.engine import GenerationRequest
from rllib_arpo.errors import ARPOError
from rllib_arpo.serving.engine_deployment import EngineReplica, EngineSettings
from rllib_arpo.serving.serve_engine import ServeEngine
from tests.serving.engine_turns import collect, request, token_ids
from tests.serving.served import make_endless

APP = "engine_on_serve"


def deploy(source: str, version: str) -> Any:
    """Deploy, or change `user_config` of the replica that is there."""
    deployment = cast(Any, serve.deployment(EngineReplica)).options(
        name="engine",
        user_config={"source": source, "version": version},
        graceful_shutdown_timeout_s=1,
    )
    # Code that stays the same: else Serve starts other replicas.
    deployment._version = "same"
    app = deployment.bind(EngineSettings(), max_request_s=60.0)
    return serve.run(app, name=APP, route_prefix=None)


def long_turn(request_id: str) -> GenerationRequest:
    """Takes minutes, of `endless`."""
    return request(request_id, max_tokens=50_000, temperature=0.0)


async def error_of(work: Any) -> str:
    try:
        await work
    except ARPOError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


async def look(handle: Any, endless: str) -> dict[str, Any]:
    engine = ServeEngine(handle)
    chunks = await collect(engine, request("a"))
    whole = await collect(engine, request("b", stream_interval=12))
    assert token_ids(chunks) == token_ids(whole)
    seen: dict[str, Any] = {
        "tokens": token_ids(chunks),
        "chunks": [len(chunks), len(whole)],
        "version_gone": await error_of(collect(engine, request("c"), "old")),
        "wrong_request": await error_of(collect(engine, request("d", max_tokens=0))),
    }
    assert await engine.prepare(endless, "b") == "b"
    seen["cannot_prepare"] = await error_of(engine.prepare("/nowhere"))
    await asyncio.to_thread(deploy, endless, "b")
    seen["reloaded"] = {
        "first": (await collect(engine, request("e")))[0].version,
        "later": (await collect(engine, request("f"), "a"))[0].version,
        "versions": list((await handle.state.remote()).versions),
    }
    seen["cancelled"] = await cancelled(handle, engine)
    await asyncio.to_thread(deploy, "/nowhere", "c")
    state = await handle.state.remote()
    seen["kept"] = {
        "newest": state.newest,
        "failure": "/nowhere" in state.failure,
        "serves": (await collect(engine, request("g")))[0].version,
    }
    seen["busy"] = await busy(endless)
    seen["killed"] = await error_of(killed(engine))
    return seen


async def busy(endless: str) -> str:
    """What the third turn gets where one runs and one may wait."""
    deployment = cast(Any, serve.deployment(EngineReplica)).options(
        name="small",
        user_config={"source": endless, "version": "a"},
        max_ongoing_requests=1,
        max_queued_requests=1,
        graceful_shutdown_timeout_s=1,
    )
    app = deployment.bind(EngineSettings(), max_request_s=60.0)
    handle = await asyncio.to_thread(serve.run, app, name="busy", route_prefix=None)
    engine = ServeEngine(handle)
    running = cast(Any, engine.generate(long_turn("running")))
    async with aclosing(running):
        await anext(running)
        turns = [
            asyncio.create_task(collect(engine, request(f"{n}"))) for n in range(2)
        ]
        done, waiting = await asyncio.wait(turns, return_when="FIRST_COMPLETED")
    for task in waiting:
        task.cancel()
    return await error_of(done.pop())


async def cancelled(handle: Any, engine: ServeEngine) -> list[float]:
    """Turns that run before and after one was left."""
    chunks = cast(Any, engine.generate(long_turn("left")))
    async with aclosing(chunks):
        await anext(chunks)
        before = await handle.metrics.remote()
    after = await handle.metrics.remote()
    while after["num_running"]:
        after = await handle.metrics.remote()
    return [before["num_running"], after["num_running"]]


async def killed(engine: ServeEngine) -> None:
    chunks = engine.generate(long_turn("killed"))
    await anext(chunks)
    for actor in cast(Any, ray.util.list_named_actors(all_namespaces=True)):
        if f"{APP}#engine" in actor["name"]:
            ray.kill(ray.get_actor(actor["name"], namespace=actor["namespace"]))
    async for _ in chunks:
        pass


def main(model: str, endless: str) -> None:
    make_endless(model, Path(endless))
    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    serve.start(http_options={"location": "NoServer"})
    try:
        seen = asyncio.run(look(deploy(model, "a"), endless))
    finally:
        serve.shutdown()
        ray.shutdown()
    print(json.dumps(seen))


if __name__ == "__main__":
    main(*sys.argv[1:])
