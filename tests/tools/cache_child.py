"""A process of its own that uses a tool cache, for `test_cache.py`.

    python tests/tools/cache_child.py JSON

JSON: {"file", "url", "calls", "fork", "max_file_bytes"}. It says "asking" when its
calls are under way, and at the end what they gave, as a line of JSON.
"""

import asyncio
import json
import os
import resource
import sys
import types
from dataclasses import asdict
from pathlib import Path
from typing import Any

# The package itself imports Ray and torch, which takes seconds.
PACKAGE = types.ModuleType("rllib_arpo")
PACKAGE.__path__ = [str(Path(__file__).parents[2] / "rllib_arpo")]
sys.modules["rllib_arpo"] = PACKAGE

import httpx2  # noqa: E402

from rllib_arpo.tools.cache import ToolCache  # noqa: E402


async def ask(cache: ToolCache, url: str, query: str) -> str:
    async def call() -> str:
        async with httpx2.AsyncClient(trust_env=False, timeout=60) as client:
            return (await client.get(url, params={"q": query})).text

    return await cache.fetch(
        backend="web", version="1", arguments={"query": query}, call=call
    )


async def ask_at_once(cache: ToolCache, url: str, calls: int) -> list[str]:
    asked = [asyncio.create_task(ask(cache, url, "same")) for _ in range(calls)]
    await asyncio.sleep(0)
    print("asking", flush=True)
    return await asyncio.gather(*asked)


def forked(cache: ToolCache, url: str) -> list[str]:
    """What a child of this process gets: a hit, and a result that it makes."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        texts = [asyncio.run(ask(cache, url, query)) for query in ("same", "child's")]
        os.write(writing, json.dumps([texts, asdict(cache.stats)]).encode())
        os._exit(0)
    os.waitpid(pid, 0)
    return json.loads(os.read(reading, 100_000))


def main(settings: dict[str, Any]) -> None:
    if settings.get("max_file_bytes"):
        limit = settings["max_file_bytes"]
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    cache = ToolCache(settings["file"])
    url = settings["url"]
    seen: dict[str, Any] = {
        "texts": asyncio.run(ask_at_once(cache, url, settings.get("calls", 1)))
    }
    if settings.get("fork"):
        seen["fork"] = forked(cache, url)
        seen["after"] = asyncio.run(ask(cache, url, "child's"))
    print(json.dumps({**seen, "stats": asdict(cache.stats)}), flush=True)
    cache.close()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
