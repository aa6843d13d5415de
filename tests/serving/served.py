"""`rllib-arpo serve` as a process of its own, and clients of it."""

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import psutil
import torch
from prometheus_client.parser import text_string_to_metric_families
from transformers import AutoModelForCausalLM, AutoTokenizer

from rllib_arpo.agents import AgentSettings, save_agent
from rllib_arpo.serving.front import free_ports
from tests.commands import finish, start
from tests.scripts import ROOT
from tests.serving.held_env import HeldEnv

KEY, ADMIN_KEY = "client-key", "admin-key"
CHAT = "/v1/chat/completions"
# Above all that a start, an answer or an end takes, on a busy machine, too.
PATIENCE_S = 600
# Most that a look whether a server is up takes, and between two looks at something.
LOOK_S, PAUSE_S = 30, 0.1
QUESTION = "What is the height of vifel?"


def make_agent(model: str, folder: Path, **env_config: Any) -> Path:
    """A folder with a model and an agent that has it."""
    shutil.copytree(model, folder)
    settings = AgentSettings(env=HeldEnv, env_config=env_config)
    save_agent(settings, folder)
    return folder


def make_endless(model: str, folder: Path) -> Path:
    """An agent that writes the same token for minutes, if it is asked greedily."""
    make_agent(model, folder, max_response_tokens=100_000)
    word = AutoTokenizer.from_pretrained(folder).encode(" height")[-1]
    endless: Any = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for name, parameter in endless.named_parameters():
            parameter.fill_("norm" in name)
        # Every token then leads to the one whose row is longest.
        embeddings = endless.get_input_embeddings().weight.fill_(1)
        embeddings[word] = 2
    endless.config.max_position_embeddings = 100_000
    endless.save_pretrained(folder)
    return folder


@dataclass(frozen=True, kw_only=True)
class Served:
    """A server that runs."""

    pid: int
    url: str
    client: httpx2.Client

    def post(self, **fields: Any) -> httpx2.Response:
        return self.client.post(CHAT, json=asked(**fields))

    def reload(self, **fields: Any) -> httpx2.Response:
        headers = {"Authorization": f"Bearer {ADMIN_KEY}"}
        return self.client.post("/admin/reload", json=fields, headers=headers)

    def numbers(self, name: str, **labels: str) -> list[float]:
        """Values of all series of a metric with these labels."""
        text = self.client.get("/metrics").raise_for_status().text
        return [
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        ]

    def replicas(self, deployment: str) -> set[int]:
        """Process ids of a deployment's replicas."""
        title = f"ServeReplica:rllib_arpo:{deployment}"
        found = set()
        for child in psutil.Process(self.pid).children(recursive=True):
            try:
                if title in " ".join(child.cmdline()):
                    found.add(child.pid)
            except (psutil.NoSuchProcess, psutil.ZombieProcess):
                pass
        return found

    def kill(self, deployment: str) -> None:
        for pid in self.replicas(deployment):
            os.kill(pid, signal.SIGKILL)


def asked(**fields: Any) -> dict[str, Any]:
    message = {"role": "user", "content": QUESTION}
    return {"model": "almanac", "messages": [message], **fields}


@contextmanager
def serving(*words: object) -> Iterator[Served]:
    """Start the command and wait until it serves; end it as a user does."""
    (port,) = free_ports(1)
    process = start("serve", *words, "--port", port, folder=ROOT)
    headers = {"Authorization": f"Bearer {KEY}"}
    url = f"http://127.0.0.1:{port}"
    try:
        assert process.stdout is not None
        assert url in process.stdout.readline(), finish(process)
        with httpx2.Client(base_url=url, headers=headers, timeout=PATIENCE_S) as client:
            yield Served(pid=process.pid, url=url, client=client)
    finally:
        process.send_signal(signal.SIGTERM)
        code, _, errors = finish(process)
    assert code == 0, errors


def is_up(client: httpx2.Client, path: str = "/health") -> bool:
    try:
        return client.get(path, timeout=LOOK_S).status_code == 200
    except httpx2.TransportError:
        return False


def until(condition: Callable[[], bool]) -> None:
    """Return when it holds."""
    pause, deadline = threading.Event(), time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "it does not come true"
        pause.wait(PAUSE_S)


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What a client of a crowd got.

    Attributes:
        round: that of the crowd when the request was made.
        status: 0 if the connection was cut.
        version: of a whole answer.
        error: code of an error object; "" without one.
    """

    round: int
    status: int
    version: str | None = None
    error: str | None = None


class Crowd:
    """Clients that ask again and again, every second one for a stream."""

    def __init__(self, served: Served, size: int) -> None:
        self.round = 0
        self.replies: list[Reply] = []
        self._served = served
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(size)
        self._clients = [self._pool.submit(self._ask, i) for i in range(size)]

    def __enter__(self) -> "Crowd":
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._pool.shutdown()
        for client in self._clients:
            client.result()

    def has(self, number: int, **fields: Any) -> bool:
        """Whether so many replies look like that."""
        return number <= sum(
            all(getattr(reply, name) == value for name, value in fields.items())
            for reply in list(self.replies)
        )

    def _ask(self, number: int) -> None:
        seed = 0
        while not self._stop.is_set():
            seed += 1
            now = self.round
            fields = asked(seed=1000 * number + seed, stream=bool(number % 2))
            try:
                response = self._served.client.post(CHAT, json=fields)
                reply = read_reply(response, now)
            except httpx2.TransportError:
                reply = Reply(round=now, status=0)
            self.replies.append(reply)
            if reply.status != 200:
                self._stop.wait(PAUSE_S)


def read_reply(response: httpx2.Response, now: int) -> Reply:
    """A completion, a stream or an error object."""
    status = response.status_code
    kind = response.headers.get("content-type", "")
    if kind.startswith("text/event-stream"):
        return _read_stream(response.text, now)
    if not kind.startswith("application/json"):
        return Reply(round=now, status=status, error="")
    body = response.json()
    if "error" in body:
        return Reply(round=now, status=status, error=body["error"]["code"])
    version = body["choices"][0]["message"]["agent"]["version"]
    return Reply(round=now, status=status, version=version)


def _read_stream(text: str, now: int) -> Reply:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    if lines[-1] != "[DONE]":
        return Reply(round=now, status=0)
    chunks = [json.loads(line) for line in lines[:-1]]
    if "error" in chunks[-1]:
        return Reply(round=now, status=200, error=chunks[-1]["error"]["code"])
    events = [chunk["choices"][0]["delta"].get("agent") or {} for chunk in chunks]
    (version,) = [one["version"] for one in events if one.get("type") == "finished"]
    return Reply(round=now, status=200, version=version)
