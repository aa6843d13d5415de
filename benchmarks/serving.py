"""The served agent under load, against its engine driven directly.

    direct    64 answers at a time in one process: environment, tools and engine, and
              nothing between them
    served    `rllib-arpo serve`, 64 clients that stream, each asks again at once

Both answer the same questions of the embedded world, sampled at temperature 1 with the
same seeds, and are measured in tokens of the model per second. Direct runs before and
after the server, half as long each. The server, the clients and Ray share the cores
that the direct run has for itself.

Then the server answers `--requests` more, and the memory of its processes (the
proportional share of all pages, from the kernel) is compared with that after a tenth
of them.
"""

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

# Read by libraries when they are imported, here and in the server.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import aiohttp
import numpy as np
import psutil
from report import print_table_and_write

from rllib_arpo.agents import AgentSettings, find_agent, serving_env
from rllib_arpo.engines.engine import GenerationRequest, join
from rllib_arpo.engines.torch_engine import TorchEngine
from rllib_arpo.envs.almanac import AlmanacWorld
from rllib_arpo.envs.tool_use_env import ToolUseEnv
from rllib_arpo.serving.front import free_ports
from rllib_arpo.tree import Task

NUM_QUESTIONS = 2_000
WARM_UP_S = 5.0
START_S = 120.0
END = b"data: [DONE]"


@dataclass(slots=True)
class Load:
    """What a number of clients saw.

    Attributes:
        tokens: that the model wrote in whole answers.
        first_s: seconds to the first token of each answer.
        answer_s: seconds to the end of each.
        errors: what went wrong, an entry for each failed request.
        seconds: how long they asked.
    """

    tokens: int = 0
    first_s: list[float] = field(default_factory=list)
    answer_s: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds


async def drive(
    clients: int, go_on: Callable[[Load], bool], ask: Callable[[int, Load], Any]
) -> Load:
    """`clients` coroutines that ask one question after the other while `go_on`."""
    load, numbers, start = Load(), count(), time.monotonic()

    async def client() -> None:
        while go_on(load):
            await ask(next(numbers), load)

    async with asyncio.TaskGroup() as group:
        for _ in range(clients):
            group.create_task(client())
    load.seconds = time.monotonic() - start
    return load


def until(seconds: float) -> Callable[[Load], bool]:
    end = time.monotonic() + seconds
    return lambda load: time.monotonic() < end


async def direct(
    env: ToolUseEnv, engine: TorchEngine, tasks: Sequence[Task], args: Any
) -> Load:
    """Answers straight from the engine."""

    async def ask(number: int, load: Load) -> None:
        start = time.monotonic()
        path = env.fork()
        ids, _ = path.reset(options={"task": tasks[number % len(tasks)]})
        ended, turn, tokens = False, 0, 0
        while not ended:
            request = GenerationRequest(
                request_id=f"{number}/{turn}",
                prompt_token_ids=ids,
                max_tokens=max(path.remaining_tokens, 1),
                seed=number * 1000 + turn,
                sampling=args.sampling_with_stop,
                stream_interval=1_000_000,
            )
            chunk = join([chunk async for chunk in engine.generate(request)])
            result, _, terminated, truncated, _ = await path.step_async(chunk.token_ids)
            ids = np.concatenate([ids, chunk.token_ids, result])
            ended, turn, tokens = (
                terminated or truncated,
                turn + 1,
                tokens + len(chunk.token_ids),
            )
        load.tokens += tokens
        load.answer_s.append(time.monotonic() - start)

    return await drive(args.clients, until(args.seconds / 2), ask)


@asynccontextmanager
async def server(args: Any) -> AsyncIterator[tuple[str, psutil.Process]]:
    """`rllib-arpo serve` on a free port, ready."""
    (port,) = free_ports(1)
    words = ["serve", str(args.checkpoint), "--port", str(port)]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "rllib_arpo.cli", *words], stdout=log, stderr=log
        )
        try:
            url = f"http://127.0.0.1:{port}"
            await wait_until_ready(url, process)
            yield url, psutil.Process(process.pid)
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(60)
            log.seek(0)
            if process.returncode not in (0, 130):
                sys.stderr.write(log.read().decode(errors="replace"))


async def wait_until_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + START_S
    async with aiohttp.ClientSession() as session:
        while time.monotonic() < end and process.poll() is None:
            try:
                async with session.get(f"{url}/health") as reply:
                    if reply.status == 200:
                        return
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(0.5)
    raise SystemExit(f"the server was not ready within {START_S:.0f} s")


async def served(
    url: str, model: str, tasks: Sequence[Task], clients: int, go_on: Any
) -> Load:
    """Answers from the server, all of them streamed."""
    connector = aiohttp.TCPConnector(limit=clients)
    async with aiohttp.ClientSession(connector=connector) as session:

        async def ask(number: int, load: Load) -> None:
            task = tasks[number % len(tasks)]
            body = {
                "model": model,
                "messages": [
                    {"role": message.role, "content": message.content}
                    for message in task.messages
                ],
                "metadata": {"world_id": str(task.metadata["world_id"])},
                "seed": number,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
            try:
                await stream(session, f"{url}/v1/chat/completions", body, load)
            except (aiohttp.ClientError, OSError, ValueError) as error:
                load.errors.append(f"{type(error).__name__}: {error}")

        return await drive(clients, go_on, ask)


async def stream(
    session: aiohttp.ClientSession, url: str, body: Any, load: Load
) -> None:
    """Read one stream to its end.

    Raises:
        ValueError: it was refused, or broke off.
    """
    start, first, received = time.monotonic(), 0.0, []
    async with session.post(url, json=body) as reply:
        if reply.status != 200:
            raise ValueError(f"{reply.status} {await reply.text()}")
        async for data in reply.content.iter_any():
            received.append(data)
            # The first chunk only names the role.
            if not first and (b'"agent"' in data or b'"reasoning_content"' in data):
                first = time.monotonic() - start
    events = b"".join(received).split(b"\n\n")
    if END not in events:
        raise ValueError(f"the stream broke off after {events[-2:]}")
    if any(event.startswith(b'data: {"error"') for event in events):
        raise ValueError(f"an error in the stream: {events[-3:]}")
    usage = json.loads(events[events.index(END) - 1].removeprefix(b"data: "))["usage"]
    load.tokens += usage["completion_tokens"]
    load.first_s.append(first)
    load.answer_s.append(time.monotonic() - start)


def memory_mb(process: psutil.Process) -> float:
    """Of the server and all that it started; shared pages count once."""
    total = 0
    for one in (process, *process.children(recursive=True)):
        try:
            total += one.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return total / 2**20


async def measure(args: Any) -> tuple[list[dict[str, Any]], dict[str, float]]:
    agent = find_agent(str(args.checkpoint))
    settings: AgentSettings = agent.settings
    model_folder = str(args.checkpoint / "model")
    env = serving_env(settings, model_folder)
    args.sampling_with_stop = type(settings.sampling)(
        temperature=settings.sampling.temperature,
        top_p=settings.sampling.top_p,
        top_k=settings.sampling.top_k,
        stop=env.stop,
    )
    tasks = AlmanacWorld().tasks("test", NUM_QUESTIONS)
    engine = TorchEngine.from_pretrained(model_folder)
    await direct(env, engine, tasks, argparse.Namespace(**vars(args) | {"seconds": 4}))
    before = await direct(env, engine, tasks, args)
    async with server(args) as (url, process):
        ask = (url, agent.name, tasks, args.clients)
        await served(*ask, until(WARM_UP_S))
        under_load = await served(*ask, until(args.seconds))
        done: list[Load] = []
        memory: list[float] = []
        for goal in (args.requests // 10, args.requests - args.requests // 10):
            done.append(await served(*ask, fewer_than(goal, args.clients)))
            memory.append(memory_mb(process))
    after = await direct(env, engine, tasks, args)
    direct_rate = (before.tokens + after.tokens) / (before.seconds + after.seconds)
    errors = [e for load in (under_load, *done) for e in load.errors]
    for error in errors[:5]:
        print(error, file=sys.stderr)
    rows = [
        row("direct, before", before),
        row(f"served, {args.clients} clients", under_load),
        row("direct, after", after),
    ]
    return rows, {
        "errors": len(errors),
        "throughput_ratio": under_load.tokens_per_s / direct_rate,
        "ttft_p50_s": percentile(under_load.first_s, 50),
        "ttft_p95_s": percentile(under_load.first_s, 95),
        "answer_p50_s": percentile(under_load.answer_s, 50),
        "answer_p95_s": percentile(under_load.answer_s, 95),
        "memory_mb": memory[-1],
        "memory_growth_percent": 100 * (memory[-1] / memory[0] - 1),
    }


def fewer_than(goal: int, clients: int) -> Callable[[Load], bool]:
    """Until about `goal` answers are there."""
    return lambda load: len(load.answer_s) + len(load.errors) <= goal - clients


def row(name: str, load: Load) -> dict[str, Any]:
    return {
        "": name,
        "answers": len(load.answer_s),
        "tokens/s": load.tokens_per_s,
        "answers/s": len(load.answer_s) / load.seconds,
        "p95 s": percentile(load.answer_s, 95),
        "errors": len(load.errors),
    }


def percentile(values: Sequence[float], percent: float) -> float:
    return float(np.percentile(values, percent)) if values else float("nan")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    if not (arguments.checkpoint / "model").is_dir():
        parser.error(f"{arguments.checkpoint} has no model/: run `make quickstart`")
    table, figures = asyncio.run(measure(arguments))
    print_table_and_write(table, figures, arguments.json)
