"""Warm simple calls of the two Python tools, in milliseconds.

p50, p95        a call after a pause, as between two turns of a model
back_to_back    the next call is made at once and waits for its worker, which
                clears up and forks anew
"""

import asyncio
import time

import numpy as np

from rllib_arpo.tools.python import PythonTool
from rllib_arpo.tools.python_subprocess import SubprocessPythonTool
from rllib_arpo.tools.tool import Tool

CODE = "x = 1 + 1; x"
NUM_WARM_UP = 5
PAUSE_S = 0.03


async def call_ms(tool: Tool, num_calls: int, pause_s: float) -> list[float]:
    """Milliseconds of each call, after the first ones that start the workers."""
    times: list[float] = []
    for _ in range(NUM_WARM_UP + num_calls):
        await asyncio.sleep(pause_s)
        start = time.perf_counter()
        assert await tool.call(CODE) == "2"
        times.append((time.perf_counter() - start) * 1000)
    return times[NUM_WARM_UP:]


def python_figures(num_calls: int = 200) -> dict[str, float]:
    """Percentiles of calls that have variables to load and to keep."""
    tools: dict[str, Tool] = {
        "embedded": PythonTool(),
        "subprocess": SubprocessPythonTool(max_workers=1),
    }
    figures: dict[str, float] = {}
    for name, tool in tools.items():
        times = asyncio.run(call_ms(tool, num_calls, PAUSE_S))
        for percent in (50, 95):
            figures[f"python_{name}_p{percent}_ms"] = float(
                np.percentile(times, percent)
            )
        at_once = asyncio.run(call_ms(tool, num_calls, 0))
        figures[f"python_{name}_back_to_back_p50_ms"] = float(np.median(at_once))
    return figures
