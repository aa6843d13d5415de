import asyncio
import contextlib
import multiprocessing
import os
import pickle
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import cloudpickle
import psutil
import pytest

import rllib_arpo
from rllib_arpo.errors import ConfigError, ToolError, ToolTimeoutError
from rllib_arpo.tools import python_process
from rllib_arpo.tools.python_seccomp import refusal_program
from rllib_arpo.tools.python_subprocess import SandboxLimits, SubprocessPythonTool
from rllib_arpo.tools.python_worker.messages import pack, receive, send, unpack
from rllib_arpo.tools.tool import Tool, only_text_parameter
from tests.tools.bubblewrap import needs_bubblewrap

LIMITS = SandboxLimits(
    time_s=60, memory_mb=64, output_bytes=1000, file_mb=1, state_mb=1
)
QUICK = replace(LIMITS, time_s=0.5)  # for code that would not end

DEFAULT_LIMITS = SandboxLimits()
# Not by way of the package's __init__, which imports Ray and takes seconds.
IMPORT = f"""
import sys, types
sys.modules["rllib_arpo"] = package = types.ModuleType("rllib_arpo")
package.__path__ = [{str(Path(rllib_arpo.__file__).parent)!r}]
import asyncio
from rllib_arpo.errors import ConfigError, ToolError
from rllib_arpo.tools.python_subprocess import SubprocessPythonTool
"""


def make_tool(limits: SandboxLimits = DEFAULT_LIMITS) -> SubprocessPythonTool:
    return SubprocessPythonTool(limits=limits, max_workers=2)


def run(tool: SubprocessPythonTool, *codes: str) -> str:
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
        ("print('a', end='')\n'b'", "a'b'"),
        ("print('  indented')", "  indented"),
        ("x = 5", ""),
        ("None", ""),
        ("", ""),
        ("# only a comment", ""),
        ("x = 2; x", "2"),
        ("def f():\n  return 1", ""),
        ("10 ** 5000", "(a value too large to show)"),
        ("import sys\nprint('a')\nprint('b', file=sys.stderr)\nprint('c')", "a\nb\nc"),
        ("import warnings\nwarnings.warn('careful')", "UserWarning: careful"),
        ("print('before')\nexit()", "before"),
        ("print('é ∑')", "é ∑"),
        ("print('\\ud800')", "?"),
        ("import numpy as np\nnp.arange(3) * 2", "array([0, 2, 4])"),
        ("import sympy as sp\nx = sp.Symbol('x')\nsp.integrate(x**2, x)", "x**3/3"),
        (
            "from scipy import optimize\nround(optimize.brentq(lambda x: x - 2, 0, 9))",
            "2",
        ),
    ],
)
def test_prints_and_the_last_expression_are_returned(code, output):
    assert run(make_tool(), code) == output


def test_it_is_a_tool_like_the_embedded_one():
    tool = make_tool()
    assert isinstance(tool, Tool)
    assert tool.name == "python"
    assert only_text_parameter(tool.parameters) == "code"
    assert all(name in tool.description for name in ("numpy", "sympy", "scipy"))


@pytest.mark.parametrize(
    ("first", "second", "output"),
    [
        ("def double(n):\n  return 2 * n\nx = 4", "double(x)", "8"),
        ("x = 1\ndef f(): return x", "x = 2\nf()", "2"),
        ("def f(): return g()", "def g(): return 7\nf()", "7"),
        ("def f(n): return n and n * f(n - 1) or 1", "f(5)", "120"),
        ("a = b = []", "a.append(1)\nb", "[1]"),
        ("class A:\n  x = 3\na = A()", "isinstance(a, A), a.x", "(True, 3)"),
        ("import math", "math.floor(2.5)", "2"),
        ("import numpy as np\nx = np.ones(2)", "x + 1", "array([2., 2.])"),
        ("f = lambda x: x + 1", "f(1)", "2"),
        ("import sympy\nx = sympy.Symbol('x')", "x == sympy.Symbol('x')", "True"),
        ("x = 1", "del x\n'x' in globals()", "False"),
        (
            "import dataclasses as d\n@d.dataclass\nclass P:\n  x: int\np = P(1)",
            "p == P(1)",
            "True",
        ),
    ],
)
def test_variables_functions_and_classes_are_kept(first, second, output):
    assert run(make_tool(), first, second) == output


def test_what_cannot_be_pickled_is_dropped_by_name_and_the_rest_is_kept():
    tool = make_tool()
    code = "g = (i for i in 'ab')\nx = 1\ndef f(): return x\ndef h(): return g\nx"
    assert run(tool, code) == "1\n(not kept for the next call: g)"
    assert run(tool, "f(), 'g' in globals(), 'h' in globals()") == ("(1, False, True)")


def test_variables_over_the_cap_are_dropped_by_name():
    tool = make_tool(LIMITS)
    code = "x = 1\nbig = bytes(2 << 20)\ny = 2"
    assert run(tool, code) == "(not kept for the next call: big)"
    assert run(tool, "x + y") == "3"


def test_a_fork_shares_nothing_with_its_origin():
    tool = make_tool()
    run(tool, "x = [1]")
    branch = tool.fork()
    run(tool, "x.append(2)")
    assert run(branch, "x") == "[1]"
    run(branch, "x.append(3)")
    assert run(tool, "x") == "[1, 2]"


def test_an_exception_is_its_last_line_and_keeps_what_ran_before():
    tool = make_tool()
    with pytest.raises(ToolError, match=r"^ZeroDivisionError: division by zero$"):
        run(tool, "y = 5\n1 / 0")
    assert run(tool, "y") == "5"


@needs_bubblewrap
def test_packages_below_tmp_are_in_the_sandbox_too(tmp_path):
    assert tmp_path.is_relative_to(tempfile.gettempdir())
    shutil.copytree(Path(cloudpickle.__file__).parent, tmp_path / "cloudpickle")
    program = (
        IMPORT
        + """
import cloudpickle
tool = SubprocessPythonTool(max_workers=1)
print(tool.sandboxed, cloudpickle.__file__, asyncio.run(tool.call("x = 6; x * 7")))
"""
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    place = tmp_path / "cloudpickle" / "__init__.py"
    assert done.stdout == f"True {place} 42\n", done.stderr


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def f(:", "SyntaxError"),
        ("import torch", "No module named 'torch'"),
        ("from numpy import nothing", "cannot import name 'nothing' from 'numpy'$"),
        ("input()", "EOFError"),
        ("import sys\nsys.exit(3)", "SystemExit: 3"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
    ],
)
@needs_bubblewrap
def test_errors_are_short_and_name_no_path_of_the_host(code, message):
    with pytest.raises(ToolError, match=message) as caught:
        run(make_tool(), code)
    assert "/" not in str(caught.value)
    assert not caught.value.retryable


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("x = 2\nx = [0] * 10 ** 8", "MemoryError"),
        ("x = 2\ndef f(n): return f(n + 1)\nf(0)", "RecursionError"),
        ("x = 2\nwhile True: print('spam')", "printed more than 1000 bytes"),
        ("x = 2\nprint('spam' * 300)", "printed more than 1000 bytes"),
        ("x = 2\nimport os\nos._exit(3)", r"ended the interpreter \(exit code 3\)"),
        ("x = 2\nimport os\nos.abort()", r"ended the interpreter \(SIGABRT\)"),
    ],
)
def test_a_limit_is_an_error_and_leaves_the_variables(code, message):
    tool = make_tool(LIMITS)
    run(tool, "x = 1")
    with pytest.raises(ToolError, match=message) as caught:
        run(tool, code)
    assert not caught.value.retryable
    assert run(tool, "x") == "1"


@pytest.mark.parametrize("rest", ["while True: pass", "import time\ntime.sleep(600)"])
def test_code_that_does_not_end_is_a_timeout_and_leaves_the_variables(rest):
    tool = make_tool(LIMITS)
    run(tool, "x = 1")
    tool.limits = QUICK
    with pytest.raises(ToolTimeoutError, match=r"ran longer than 0\.5 s") as caught:
        run(tool, f"x = 2\n{rest}")
    assert not caught.value.retryable
    tool.limits = LIMITS
    assert run(tool, "x") == "1"


def test_a_file_over_its_limit_is_an_error():
    with pytest.raises(ToolError, match="File too large"):
        run(make_tool(LIMITS), "open('f', 'wb').write(bytes(2 << 20))")


def test_files_live_for_one_call():
    tool = make_tool()
    assert run(tool, "open('f', 'w').write('x')\nopen('f').read()") == "'x'"
    assert run(tool, "import os\nos.listdir()") == "[]"


@pytest.mark.parametrize(
    "draw",
    ["import random\nrandom.random()", "import numpy as np\nnp.random.rand()"],
)
def test_random_numbers_follow_the_seed_and_the_variables(draw):
    def drawn(seed: int, *before: str) -> str:
        return run(SubprocessPythonTool(seed=seed, max_workers=2), *before, draw)

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)
    assert drawn(1, draw) != drawn(1)


def test_calls_at_the_same_time_do_not_wait_for_each_other_or_hold_the_loop():
    async def calls() -> None:
        slow = asyncio.ensure_future(
            make_tool(SandboxLimits(time_s=600)).call("import time\ntime.sleep(600)")
        )
        await asyncio.sleep(0)  # it is first
        assert await make_tool().call("'quick'") == "'quick'"
        assert not slow.done()
        slow.cancel()
        await asyncio.wait([slow])

    asyncio.run(calls())


def test_many_event_loops_and_more_calls_than_workers():
    async def calls() -> list[str]:
        tools = [make_tool() for _ in range(20)]
        return await asyncio.gather(*(t.call(f"{i} + 1") for i, t in enumerate(tools)))

    for _ in range(2):
        assert asyncio.run(calls()) == [str(i + 1) for i in range(20)]


def test_a_cancelled_call_changes_nothing_and_frees_its_worker():
    tool = make_tool(SandboxLimits(time_s=600))
    run(tool, "x = 1")

    async def abandon() -> None:
        calls = [
            asyncio.ensure_future(tool.fork().call("import time\ntime.sleep(600)"))
            for _ in range(4)  # two run, two wait
        ]
        mine = asyncio.ensure_future(tool.call("x = 2"))
        await asyncio.sleep(0)
        for call in [*calls, mine]:
            call.cancel()
        await asyncio.wait([*calls, mine])

    asyncio.run(abandon())
    assert run(tool, "x") == "1"  # and not after the 600 s of the others


def test_state_survives_pickle():
    tool = make_tool()
    run(tool, "x = 9")
    assert run(pickle.loads(pickle.dumps(tool)), "x") == "9"


def warm_tool_and_worker(max_workers: int) -> tuple[SubprocessPythonTool, int]:
    """A tool with a pool of its own, and the process of its one worker."""
    others = psutil.Process().children()
    tool = SubprocessPythonTool(max_workers=max_workers)
    run(tool, "x = 6")
    (worker,) = (w for w in psutil.Process().children() if w not in others)
    return tool, worker.pid


def is_busy(worker: int) -> bool:
    """Whether a process that runs nothing but a call has used processor time."""
    below = psutil.Process(worker).children(recursive=True)
    with contextlib.suppress(psutil.NoSuchProcess):
        return any(not p.children() and p.cpu_times().user > 0.1 for p in below)
    return False


def test_a_worker_killed_while_idle_is_replaced():
    tool, worker = warm_tool_and_worker(max_workers=11)
    os.kill(worker, signal.SIGKILL)
    psutil.Process(worker).wait()
    assert run(tool, "x + 1") == "7"


def test_a_worker_killed_in_a_call_is_a_retryable_error():
    tool, worker = warm_tool_and_worker(max_workers=12)

    async def kill_while_it_runs() -> None:
        call = asyncio.ensure_future(tool.call("while True: pass"))
        while not is_busy(worker):
            await asyncio.sleep(0)
        os.kill(worker, signal.SIGKILL)
        await call

    with pytest.raises(ToolError, match="crashed") as caught:
        asyncio.run(kill_while_it_runs())
    assert caught.value.retryable
    assert run(tool, "x + 1") == "7"


def test_where_no_worker_starts_calls_fail_at_once_and_may_be_retried(tmp_path):
    broken = tmp_path / "bin"
    broken.mkdir()
    count = tmp_path / "count"
    bwrap = broken / "bwrap"
    # Passes the probe and then breaks.
    bwrap.write_text(
        f"#!/bin/sh\necho x >> {count}\n"
        f"[ $(/usr/bin/wc -l < {count}) = 1 ] && exit 0\n"
        "echo 'bwrap: out of namespaces' >&2; exit 1\n"
    )
    bwrap.chmod(0o755)
    code = """
tool = SubprocessPythonTool(require_sandbox=True)
for _ in range(50):
    try:
        asyncio.run(tool.call("1"))
    except ToolError as error:
        print(error.retryable, error)
"""
    ran = subprocess.run(
        [sys.executable, "-c", IMPORT + code],
        env={"PATH": str(broken)},
        capture_output=True,
        text=True,
        check=True,
    )
    message = "True Python is not available: bwrap: out of namespaces"
    assert ran.stdout.splitlines() == [message] * 50
    assert len(count.read_text().splitlines()) < 5


def test_a_required_sandbox_that_is_not_there_is_refused_with_the_cure():
    code = """
assert not SubprocessPythonTool().sandboxed
try:
    SubprocessPythonTool(require_sandbox=True)
except ConfigError as error:
    print(error)
"""
    ran = subprocess.run(
        [sys.executable, "-c", IMPORT + code],
        env={"PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "bubblewrap (bwrap) is not installed" in ran.stdout
    assert "apt install bubblewrap" in ran.stdout


@pytest.mark.parametrize("limits", [{"time_s": 0}, {"memory_mb": -1}])
def test_limits_must_be_above_0(limits):
    with pytest.raises(ConfigError, match=next(iter(limits))):
        SubprocessPythonTool(limits=SandboxLimits(**limits))


def refuses() -> None:
    try:
        run(make_tool(), "1")
    except ToolError as error:
        raise SystemExit(7 if "forked" in str(error) else 1) from None


def test_a_process_forked_after_the_first_call_refuses_instead_of_hanging():
    run(make_tool(), "1")
    child = multiprocessing.get_context("fork").Process(target=refuses)
    child.start()
    child.join(60)
    assert child.exitcode == 7
    assert run(make_tool(), "1") == "1"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\0\0\0",
        b"\0\0\0\5abc",
        pack(b"one"),
        pack(b"1", b"2", b"3"),
        pack(b"1", b"2") + b"x",
        b"\xff\xff\xff\xff" * 2,
    ],
)
def test_a_body_of_other_parts_is_refused(body):
    assert unpack(pack(b"a", b""), 2) == [b"a", b""]
    with pytest.raises(ValueError, match="not 2 parts"):
        unpack(body, 2)


def test_a_message_longer_than_allowed_is_not_read():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        send(theirs, b"abc")
        with pytest.raises(ValueError, match="over 6"):
            receive(ours, 6)


def test_the_end_of_the_other_side_is_not_a_message():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(b"\0\0")
        theirs.close()
        with pytest.raises(EOFError):
            receive(ours, 1 << 30)


def test_the_filter_is_whole_instructions_that_stay_inside_it():
    for machine in ("x86_64", "aarch64"):
        program = refusal_program(machine)
        operations = list(struct.iter_unpack("=HBBI", program))
        assert len(operations) < 4096  # BPF_MAXINSNS
        for index, (code, if_so, if_not, _) in enumerate(operations):
            if code & 7 == 5:  # a jump
                assert index + 1 + max(if_so, if_not) < len(operations)
        assert operations[-1][0] == 6  # a return
    assert refusal_program("vax") == b""


def test_a_forged_reply_is_bounded():
    huge = pack(b"e" * 10**6, b"n" * 10**6, b"set", b"s")
    error, note, state = python_process._parse_reply(huge, 1)
    assert (len(error), len(note), state) == (2000, 500, b"s")
    with pytest.raises(ValueError, match="over 0"):
        python_process._parse_reply(huge, 0)
