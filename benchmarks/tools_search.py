"""BM25 over a million short documents: building the index, and a query.

Documents of 30 to 70 words, drawn by Zipf's law from 200,000; queries of six words
drawn alike, so that most hold words that a large share of the documents hold. The
index is built by one process and opened by another.
"""

import json
import multiprocessing
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from rllib_arpo.tools.search_bm25 import DocumentIndex

NUM_WORDS = 200_000
LENGTHS = (30, 71)
WORDS_PER_QUERY = 6
TOP_K = 3


class Zipf:
    """Words of which the n-th is drawn with a chance proportional to 1/n."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        chances = 1 / np.arange(1, NUM_WORDS + 1)
        self.cumulated = np.cumsum(chances / chances.sum())
        self.words = np.array([f"w{i:x}" for i in range(NUM_WORDS)], object)

    def text(self, length: int) -> str:
        drawn = np.searchsorted(self.cumulated, self.rng.random(length))
        return " ".join(self.words[drawn])


def write_documents(folder: Path, count: int) -> None:
    zipf = Zipf(seed=0)
    with (folder / "documents.jsonl").open("w") as file:
        for length in zipf.rng.integers(*LENGTHS, count):
            file.write(json.dumps({"text": zipf.text(length)}) + "\n")


def build(folder: str) -> tuple[float, float]:
    """Seconds, and megabytes of this process at their peak."""
    start = time.perf_counter()
    DocumentIndex.from_folder(folder)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return seconds, peak / (1e6 if sys.platform == "darwin" else 1024)


def query_ms(index: DocumentIndex, queries: int) -> list[float]:
    zipf = Zipf(seed=1)
    times: list[float] = []
    for _ in range(queries + 5):
        query = zipf.text(WORDS_PER_QUERY)
        start = time.perf_counter()
        assert len(index.find(query, TOP_K)) == TOP_K
        times.append((time.perf_counter() - start) * 1000)
    return times[5:]


def search_figures(documents: int = 1_000_000, queries: int = 200) -> dict[str, float]:
    """Build, opening of the built index, and queries."""
    with tempfile.TemporaryDirectory() as folder:
        write_documents(Path(folder), documents)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            build_s, peak_mb = pool.apply(build, (folder,))
        start = time.perf_counter()
        index = DocumentIndex.from_folder(folder)
        open_ms = (time.perf_counter() - start) * 1000
        times = query_ms(index, queries)
    p50, p95 = np.percentile(times, [50, 95]).tolist()
    return {
        "search_build_s": build_s,
        "search_build_peak_mb": peak_mb,
        "search_open_ms": open_ms,
        "search_p50_ms": p50,
        "search_p95_ms": p95,
    }
