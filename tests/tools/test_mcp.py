import asyncio
import os
import pickle
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest

import rllib_arpo
from rllib_arpo.envs.tool_use_env import ToolUseEnv
from rllib_arpo.errors import ConfigError, ToolError, ToolTimeoutError
from rllib_arpo.serving.front import free_ports
from rllib_arpo.tools.mcp import (
    MCPServer,
    close_sessions,
    mcp_tools,
    mcp_tools_async,
)
from rllib_arpo.tools.tool import Tool
from rllib_arpo.tree import Message, Task
from tests.tokenizers import qwen25_with_tools, qwen_like

PROGRAM = [sys.executable, str(Path(__file__).with_name("mcp_server.py"))]
PACKAGE = str(Path(rllib_arpo.__file__).parent)
TASK = Task(
    task_id="t",
    messages=(Message(role="user", content="What is 1 + 2?"),),
    answers=("3",),
)


@pytest.fixture(scope="module", autouse=True)
def _sessions():
    yield
    close_sessions()


@pytest.fixture(scope="module")
def pids(tmp_path_factory):
    """The file with the process ids of the server's starts."""
    return tmp_path_factory.mktemp("mcp") / "pids"


@pytest.fixture(scope="module")
def server(pids):
    return MCPServer(command=PROGRAM, env={"MCP_TEST_PIDS": str(pids)})


@pytest.fixture(scope="module")
def tools(server):
    return {tool.name: tool for tool in mcp_tools(server)}


def call(tool, arguments: str = "") -> str:
    return asyncio.run(tool.call(arguments))


def starts(pids: Path) -> list[int]:
    return [int(line) for line in pids.read_text().split()]


# Tools


def test_a_servers_tools_are_tools_with_its_names_descriptions_and_schemas(tools):
    add = tools["math_add"]  # a tag holds no dot
    assert isinstance(add, Tool)
    assert (add.remote_name, add.description) == ("math.add", "Adds two numbers.")
    assert add.parameters["required"] == ["a", "b"]
    assert add.parameters["properties"]["note"]["default"] == ""
    assert add.fork() is add


def test_a_prefix_keeps_two_servers_apart(server):
    named = asyncio.run(mcp_tools_async(server, prefix="one:"))
    assert "one_echo" in {tool.name for tool in named}
    assert call(next(tool for tool in named if tool.name == "one_echo"), "x") == "x"


def test_a_single_text_parameter_is_given_as_it_is(tools):
    assert call(tools["echo"], '{"text": 1} é\n') == '{"text": 1} é\n'


def test_several_parameters_are_given_as_json(tools):
    assert call(tools["math_add"], '{"a": 1, "b": 2.5}') == "3.5"
    assert call(tools["math_add"], '{"a": 1, "b": 2, "note": "!"}') == "3!"


def test_a_tool_without_parameters_needs_no_arguments(tools):
    assert call(tools["count"]) == "1"
    assert call(tools["count"], "{}") == "2"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("1 + 2", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[1, 2]", "must be a JSON object"),
        ('{"a": 1}', "lack b"),
        ('{"a": 1, "b": "two"}', "valid number"),  # the server's own check
    ],
)
def test_wrong_arguments_are_the_calls_own_fault(tools, arguments, message):
    with pytest.raises(ToolError, match=message) as caught:
        call(tools["math_add"], arguments)
    assert not caught.value.retryable


def test_a_tool_that_fails_says_why(tools):
    with pytest.raises(ToolError, match="cannot do it") as caught:
        call(tools["fail"], "it")
    assert not caught.value.retryable


def test_an_unknown_tool_is_the_calls_own_fault(tools):
    unknown = pickle.loads(pickle.dumps(tools["echo"]))
    unknown.remote_name = "nothing"
    with pytest.raises(ToolError, match="nothing") as caught:
        call(unknown, "x")
    assert not caught.value.retryable


def test_a_part_that_is_no_text_is_named(tools):
    assert call(tools["picture"]) == "look:\n[image]"


def test_a_long_result_is_cut_and_says_so(server):
    tools = {tool.name: tool for tool in mcp_tools(server, max_output_chars=1000)}
    assert call(tools["flood"], '{"size": 1000}') == "x" * 1000
    assert call(tools["flood"], '{"size": 3000000}') == (
        "x" * 1000 + "\n[cut: 2999000 more characters]"
    )


# Sessions


def test_calls_run_side_by_side_in_one_session_from_any_loop(tools, pids):
    number = 6
    results = []

    async def two() -> list[str]:
        return await asyncio.gather(
            *(tools["meet"].call(f'{{"number": {number}}}') for _ in range(2))
        )

    threads = [
        threading.Thread(target=lambda: results.extend(asyncio.run(two())))
        for _ in range(number // 2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results == ["met"] * number
    assert len(starts(pids)) == 1


def test_a_tool_survives_pickle_and_uses_the_session_of_its_process(tools, pids):
    restored = pickle.loads(pickle.dumps(tools["echo"]))
    assert call(restored, "x") == "x"
    assert len(starts(pids)) == 1


def test_a_slow_call_times_out_and_leaves_the_session_whole(server, tools, pids):
    impatient = MCPServer(command=PROGRAM, env=server.env, call_timeout_s=0.2)
    (hang,) = (tool for tool in mcp_tools(impatient) if tool.name == "hang")
    with pytest.raises(ToolTimeoutError, match="did not answer in time"):
        call(hang)
    assert call(tools["echo"], "x") == "x"
    assert len(starts(pids)) == 1


def test_a_failure_inside_the_server_may_be_retried_in_the_same_session(tools, pids):
    with pytest.raises(ToolError, match="out of order") as caught:
        call(tools["broken"])
    assert caught.value.retryable
    assert call(tools["echo"], "x") == "x"
    assert len(starts(pids)) == 1


def test_a_cancelled_call_leaves_the_session_whole(tools, pids):
    async def cancelled() -> str:
        task = asyncio.ensure_future(tools["hang"].call(""))
        await tools["echo"].call("first")
        task.cancel()
        await asyncio.wait({task})
        return await tools["echo"].call("x")

    assert asyncio.run(cancelled()) == "x"
    assert len(starts(pids)) == 1


def test_a_server_that_was_killed_is_started_again(tools, pids):
    assert call(tools["echo"], "x") == "x"
    before = starts(pids)
    os.kill(before[-1], signal.SIGKILL)
    assert call(tools["echo"], "y") == "y"
    assert len(starts(pids)) == len(before) + 1


def test_a_call_in_which_the_server_dies_is_made_once_more(tools, pids):
    pids.with_suffix(".die").write_text("1")
    before = starts(pids)
    assert call(tools["die"]) == "survived"
    assert len(starts(pids)) == len(before) + 1


def test_a_call_that_kills_every_server_is_given_up_and_may_be_retried(tools, pids):
    pids.with_suffix(".die").write_text("2")
    with pytest.raises(ToolError, match="Connection closed") as caught:
        call(tools["die"])
    assert caught.value.retryable
    assert call(tools["echo"], "x") == "x"


def test_calls_that_lose_a_session_together_open_one_new_one(tools, pids):
    async def lose() -> list[str]:
        meeting = [
            asyncio.ensure_future(tools["meet"].call('{"number": 3}')) for _ in range(2)
        ]
        await tools["echo"].call("they wait")
        os.kill(starts(pids)[-1], signal.SIGKILL)
        return await asyncio.gather(*meeting, tools["meet"].call('{"number": 3}'))

    call(tools["echo"], "x")
    before = starts(pids)
    assert asyncio.run(lose()) == ["met"] * 3
    assert len(starts(pids)) == len(before) + 1


@pytest.mark.parametrize(
    "command",
    [["/no/such/program"], [sys.executable, "-c", ""], [sys.executable, "-c", "1 / 0"]],
)
def test_a_server_that_cannot_be_started_is_refused(command):
    with pytest.raises(ConfigError, match="cannot be reached"):
        mcp_tools(MCPServer(command=command))


def test_a_server_that_says_nothing_is_given_up():
    silent = [sys.executable, "-c", "import sys; sys.stdin.read()"]
    with pytest.raises(ConfigError, match="no answer in time"):
        mcp_tools(MCPServer(command=silent, connect_timeout_s=0.2))


def test_sessions_are_closed_when_the_process_ends(tmp_path):
    pids = tmp_path / "pids"
    env = {"MCP_TEST_PIDS": str(pids), "MCP_TEST_STUBBORN": "1"}
    program = (
        # The package without its __init__, which takes ten seconds and is not at stake.
        "import sys, types\n"
        "package = sys.modules['rllib_arpo'] = types.ModuleType('rllib_arpo')\n"
        f"package.__path__ = [{PACKAGE!r}]\n"
        "from rllib_arpo.tools.mcp import MCPServer, mcp_tools\n"
        f"print(len(mcp_tools(MCPServer(command={PROGRAM!r}, env={env!r}))))"
    )
    ended = subprocess.run([sys.executable, "-c", program], check=True, timeout=240)
    assert ended.returncode == 0
    (pid,) = starts(pids)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


# Secrets


def test_a_program_sees_the_variables_that_are_named_and_no_others(monkeypatch, server):
    monkeypatch.setenv("MCP_TEST_KEY", "s3cret")
    monkeypatch.setenv("MCP_TEST_OTHER", "hidden")
    keyed = MCPServer(command=PROGRAM, env_from=["MCP_TEST_KEY"])
    tools = {tool.name: tool for tool in mcp_tools(keyed)}
    assert call(tools["variable"], "MCP_TEST_KEY") == "s3cret"
    assert call(tools["variable"], "MCP_TEST_OTHER") == "(not set)"
    assert b"s3cret" not in pickle.dumps(tools["variable"])
    assert "s3cret" not in repr(keyed)


def test_a_variable_that_is_not_set_is_named(monkeypatch):
    monkeypatch.delenv("MCP_TEST_UNSET", raising=False)
    url = "http://127.0.0.1:1/mcp"
    for server in (
        MCPServer(command=PROGRAM, env_from=["MCP_TEST_UNSET"]),
        MCPServer(url=url, headers_from_env={"Authorization": "MCP_TEST_UNSET"}),
    ):
        with pytest.raises(ConfigError, match="MCP_TEST_UNSET"):
            mcp_tools(server)


def test_without_the_package_the_extra_is_named(monkeypatch, server):
    monkeypatch.setitem(sys.modules, "mcp", None)
    with pytest.raises(ConfigError, match=r"rllib_arpo\[mcp\]"):
        mcp_tools(server)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"command": ["x"], "url": "http://localhost/mcp"},
        {"command": "npx server"},
        {"url": "localhost/mcp"},
        {"command": ["x"], "call_timeout_s": 0},
    ],
)
def test_settings_that_cannot_work_are_refused(settings):
    with pytest.raises(ConfigError):
        MCPServer(**settings)


# Over HTTP


@contextmanager
def http_server(port: int = 0):
    """A server on loopback; its port."""
    with subprocess.Popen(
        [*PROGRAM, "http", str(port)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        try:
            yield int(process.stdout.readline())
        finally:
            process.kill()


def test_streamable_http_lists_calls_and_sends_the_headers(monkeypatch):
    monkeypatch.setenv("MCP_TEST_AUTHORIZATION", "Bearer t0ken")
    with http_server() as port:
        server = MCPServer(
            url=f"http://127.0.0.1:{port}/mcp",
            headers_from_env={"Authorization": "MCP_TEST_AUTHORIZATION"},
            call_timeout_s=5,
        )
        tools = {tool.name: tool for tool in mcp_tools(server)}
        assert call(tools["math_add"], '{"a": 1, "b": 2}') == "3"
        assert call(tools["authorization"]) == "Bearer t0ken"
        with pytest.raises(ToolError, match="cannot do it"):
            call(tools["fail"], "it")
        close_sessions()


def test_a_server_on_http_may_go_and_come_back():
    (port,) = free_ports(1)  # nobody is lent it meanwhile
    with http_server(port):
        server = MCPServer(url=f"http://127.0.0.1:{port}/mcp")
        tools = {tool.name: tool for tool in mcp_tools(server)}
        assert call(tools["echo"], "x") == "x"
    with pytest.raises(ToolError, match=r"127\.0\.0\.1 cannot be reached") as caught:
        call(tools["echo"], "x")
    assert caught.value.retryable
    with http_server(port):
        assert call(tools["echo"], "y") == "y"
        close_sessions()


def test_a_server_on_http_that_was_started_anew_is_greeted_again():
    (port,) = free_ports(1)
    with http_server(port):
        server = MCPServer(url=f"http://127.0.0.1:{port}/mcp")
        tools = {tool.name: tool for tool in mcp_tools(server)}
        assert call(tools["count"]) == "1"
    with http_server(port):
        assert call(tools["count"]) == "1"
        close_sessions()


# Through the environment


@pytest.mark.parametrize(
    ("dialogue", "tokenizer", "turn"),
    [
        (
            "tags",
            qwen_like(),
            '<think>t</think><math_add>{"a": 1, "b": 2}</math_add>',
        ),
        (
            "chat_template",
            qwen25_with_tools(),
            '<think>t</think><tool_call>{"name": "math_add", "arguments": '
            '{"a": 1, "b": 2}}</tool_call>',
        ),
    ],
)
def test_an_episode_calls_a_servers_tool(tools, dialogue, tokenizer, turn):
    env = ToolUseEnv(
        {"tokenizer": tokenizer, "tools": list(tools.values()), "dialogue": dialogue}
    )
    prompt, _ = env.reset(options={"task": TASK})
    assert ("math_add" in tokenizer.decode(prompt)) == (dialogue == "chat_template")
    *_, info = env.step(env.dialogue.model_ids(turn))
    assert info["turn"].tool_result == "3"
    answer = "<think>t</think><answer>\\boxed{3}</answer>"
    *_, info = env.step(env.dialogue.model_ids(answer))
    assert info["trajectory"].answer == "3"
    assert info["trajectory"].format_errors == ()
