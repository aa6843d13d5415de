"""Warm simple calls of the two Python tools, in milliseconds.

python benchmarks/tools_python.py --json python.json
"""

import argparse
import asyncio
import time
from pathlib import Path

import numpy as np
from report import print_table_and_write

from rllib_arpo.tools.python import PythonTool
from rllib_arpo.tools.python_subprocess import SubprocessPythonTool
from rllib_arpo.tools.tool import Tool

CODE = "x = 1 + 1; x"


async def call_ms(tool: Tool, calls: int) -> list[float]:
    """Milliseconds of each call, after the first ones that start the workers."""
    times: list[float] = []
    for _ in range(calls + 5):
        start = time.perf_counter()
        assert await tool.call(CODE) == "2"
        times.append((time.perf_counter() - start) * 1000)
    return times[5:]


def python_figures(calls: int = 200) -> dict[str, float]:
    """p50 and p95 of a call that has variables to load and to keep."""
    figures: dict[str, float] = {}
    tools: dict[str, Tool] = {
        "embedded": PythonTool(),
        "subprocess": SubprocessPythonTool(max_workers=1),
    }
    for name, tool in tools.items():
        times = asyncio.run(call_ms(tool, calls))
        for percent in (50, 95):
            figures[f"python_{name}_p{percent}_ms"] = float(
                np.percentile(times, percent)
            )
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the figures here")
    figures = python_figures()
    rows = [{"figure": name, "ms": value} for name, value in figures.items()]
    print_table_and_write(rows, figures, parser.parse_args().json)


if __name__ == "__main__":
    main()
