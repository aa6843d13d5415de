"""What the tools cost: Python, search over a million documents, a cached answer.

python benchmarks/tools.py --json tools.json

Calls are warm and one at a time; the p50 of 200 (Python, search) and of 1,000 (cache).
The index of the search is built by one process and opened by another.
"""

import argparse
import asyncio
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from report import print_table_and_write
from tools_python import python_figures
from tools_search import search_figures

from rllib_arpo.tools.cache import ToolCache

NUM_CACHED = 10_000
NUM_HITS = 1_000
ANSWER = "The height of vifel is 44. " * 40


async def _answer() -> str:
    return ANSWER


async def _hits_ms(cache: ToolCache) -> list[float]:
    async def fetch(number: int) -> str:
        arguments: Mapping[str, object] = {"query": f"query {number}", "top_k": 3}
        return await cache.fetch(
            backend="bench", version="1", arguments=arguments, call=_answer
        )

    for number in range(NUM_CACHED):
        await fetch(number)
    drawn = np.random.default_rng(0).integers(NUM_CACHED, size=NUM_HITS)
    times: list[float] = []
    for number in drawn.tolist():
        start = time.perf_counter()
        assert await fetch(number) == ANSWER
        times.append((time.perf_counter() - start) * 1000)
    return times


def cache_figures() -> dict[str, float]:
    """p50 and p95 of an answer of a kilobyte out of 10,000."""
    with tempfile.TemporaryDirectory() as folder:
        cache = ToolCache(str(Path(folder) / "cache.sqlite"))
        times = asyncio.run(_hits_ms(cache))
        assert cache.stats.hits == NUM_HITS
        cache.close()
    p50, p95 = np.percentile(times, [50, 95]).tolist()
    return {"cache_hit_p50_ms": p50, "cache_hit_p95_ms": p95}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--documents", type=int, default=1_000_000)
    args = parser.parse_args()
    figures = python_figures() | cache_figures() | search_figures(args.documents)
    rows = [{"figure": name, "value": value} for name, value in figures.items()]
    print_table_and_write(rows, figures, args.json)


if __name__ == "__main__":
    main()
