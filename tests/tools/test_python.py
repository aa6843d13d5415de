import asyncio
import multiprocessing
import os
import pickle
import signal
from dataclasses import replace

import pytest

from rllib_arpo.errors import ToolError, ToolTimeoutError
from rllib_arpo.tools.python import PythonLimits, PythonTool
from rllib_arpo.tools.tool import Tool
from tests.children import children_running

LIMITS = PythonLimits(time_s=60, memory_mb=16, recursion_depth=50, output_bytes=1000)
QUICK = replace(LIMITS, time_s=0.1)  # for code that would never end


def run(tool: PythonTool, *codes: str) -> str:
    """Output of the last of some calls."""

    async def calls() -> str:
        return [await tool.call(code) for code in codes][-1]

    return asyncio.run(calls())


@pytest.mark.parametrize(
    ("code", "output"),
    [
        ("1 + 1", "2"),
        ("print(3)", "3"),
        ("print('a')\n'b'", "a\n'b'"),
        ("x = 5", ""),
        ("None", ""),
        ("", ""),
        ("import math\nmath.sqrt(16)", "4.0"),
        ("10 ** 5000", "(a value too large to show)"),
    ],
)
def test_prints_and_the_last_expression_are_returned(code, output):
    assert run(PythonTool(), code) == output


def test_it_is_a_tool():
    assert isinstance(PythonTool(), Tool)


def test_variables_and_functions_are_kept():
    tool = PythonTool()
    assert run(tool, "def double(n):\n  return 2 * n\nx = 4", "double(x)") == "8"


def test_a_fork_shares_nothing_with_its_origin():
    tool = PythonTool()
    run(tool, "x = [1]")
    branch = tool.fork()
    run(tool, "x.append(2)")
    assert run(branch, "x") == "[1]"
    run(branch, "x.append(3)")
    assert run(tool, "x") == "[1, 2]"


def test_an_exception_is_its_last_line_and_keeps_what_ran_before():
    tool = PythonTool()
    with pytest.raises(ToolError, match="ZeroDivisionError: division by zero"):
        run(tool, "y = 5\n1 / 0")
    assert run(tool, "y") == "5"


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def f(:", "SyntaxError"),
        ("import numpy", "No module named 'numpy'"),
        ("open('/etc/passwd').read()", "PermissionError"),
        ("import os\nos.listdir('/')", "PermissionError"),
        ("x = 2\nx = [0] * 10 ** 8", "MemoryError"),
        ("x = 2\ndef f(n): return f(n + 1)\nf(0)", "RecursionError"),
        ("x = 2\nfor _ in range(10000): print('spam')", "MemoryError"),
    ],
)
def test_what_is_not_allowed_is_an_error_and_leaves_the_variables(code, message):
    tool = PythonTool(limits=LIMITS)
    run(tool, "x = 1")
    with pytest.raises(ToolError, match=message):
        run(tool, code)
    assert run(tool, "x") == "1"


def test_a_loop_without_end_is_a_timeout_and_leaves_the_variables():
    tool = PythonTool(limits=LIMITS)
    run(tool, "x = 1")
    tool.limits = QUICK
    with pytest.raises(ToolTimeoutError, match=r"ran longer than 0\.1 s"):
        run(tool, "x = 2\nwhile True: pass")
    tool.limits = LIMITS
    assert run(tool, "x") == "1"


def test_sleep_takes_no_time_and_random_is_seeded():
    assert run(PythonTool(limits=LIMITS), "import time\ntime.sleep(1000)\n1") == "1"
    draw = "import random\nrandom.random()"
    assert run(PythonTool(seed=1), draw) == run(PythonTool(seed=1), draw)
    assert run(PythonTool(seed=1), draw) != run(PythonTool(seed=2), draw)


def test_killed_workers_are_replaced():
    tool = PythonTool()
    run(tool, "x = 6")
    workers = children_running("monty")
    assert workers
    for worker in workers:
        os.kill(worker.pid, signal.SIGKILL)
        worker.wait()
    for _ in workers:
        try:
            run(tool, "x")
        except ToolError as error:
            assert error.retryable  # a session met a dead worker
    assert run(tool, "x + 1") == "7"


def test_many_event_loops_and_concurrent_calls_share_the_workers():
    async def calls() -> list[str]:
        tools = [PythonTool() for _ in range(20)]
        return await asyncio.gather(*(t.call(f"{i} + 1") for i, t in enumerate(tools)))

    for _ in range(2):
        assert asyncio.run(calls()) == [str(i + 1) for i in range(20)]


def test_an_abandoned_call_changes_nothing_later():
    tool = PythonTool()
    run(tool, "x = 1")

    async def abandon() -> None:
        call = asyncio.ensure_future(tool.call("x = 2"))
        await asyncio.sleep(0)
        call.cancel()
        await asyncio.wait({call})

    asyncio.run(abandon())
    assert run(tool, "x") == "1"


def test_state_survives_pickle():
    tool = PythonTool()
    run(tool, "x = 9")
    assert run(pickle.loads(pickle.dumps(tool)), "x") == "9"


def refuses() -> None:
    try:
        run(PythonTool(), "1")
    except ToolError as error:
        raise SystemExit(7 if "forked" in str(error) else 1) from None


def test_a_process_forked_after_the_first_call_refuses_instead_of_hanging():
    run(PythonTool(), "1")
    child = multiprocessing.get_context("fork").Process(target=refuses)
    child.start()
    child.join(60)
    assert child.exitcode == 7
    assert run(PythonTool(), "1") == "1"
