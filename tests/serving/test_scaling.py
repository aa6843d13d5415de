"""The number of agent replicas follows the load."""

import itertools
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.serving.calling_agent import Call, held_by, make_calling_agent
from tests.serving.file_server import serving_file
from tests.serving.served import CHAT, Served, asked, make_endless, until

pytestmark = pytest.mark.slow
# Twice what one replica is to have at once.
NUM_HELD = 4
# Without the half minute and the ten that Serve waits before it scales.
AT_ONCE = {
    "min_replicas": 1,
    "max_replicas": 2,
    "target_ongoing_requests": NUM_HELD / 2,
    "upscale_delay_s": 0.0,
    "downscale_delay_s": 0.0,
    "look_back_period_s": 1.0,
}
NO_CPUS = {"num_cpus": 0}


@contextmanager
def scaling(folder: Path, name: str, **args: Any) -> Iterator[Served]:
    """A server of which one deployment scales."""
    with serving_file(
        folder,
        args=args,
        deployments=[
            {"name": one, "ray_actor_options": NO_CPUS}
            | ({"autoscaling_config": AT_ONCE} if one == name else {})
            for one in ("agent", "engine-0")
        ],
        RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S="0.2",
        RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S="0.2",
    ) as running:
        yield running


@pytest.fixture
def scaled(tmp_path: Path) -> Iterator[Served]:
    model = make_calling_agent(tmp_path / "almanac")
    with scaling(tmp_path, "agent", checkpoint=str(model), max_agents=2) as running:
        yield running


def content(served: Served, **fields: object) -> str:
    reply = served.post(**fields).raise_for_status().json()
    return reply["choices"][0]["message"]["content"]


def test_agents_become_more_under_load_and_fewer_after_it_without_a_failure(
    scaled: Served,
) -> None:
    def answered_by() -> int:
        """Process of the replica that writes one more answer."""
        asked = pool.submit(content, scaled, metadata=held_by(listener))
        call = Call.next(listener)
        call.end()
        assert asked.result() == "44"
        return call.pid

    def scaled_down() -> bool:
        assert content(scaled) == "44"
        return len(scaled.replicas("agent")) == 1

    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        ThreadPoolExecutor(NUM_HELD + 1) as pool,
    ):
        held = [
            pool.submit(content, scaled, metadata=held_by(listener))
            for _ in range(NUM_HELD)
        ]
        calls = [Call.next(listener) for _ in held]
        (first,) = {call.pid for call in calls}
        until(lambda: answered_by() != first)
        assert len(scaled.replicas("agent")) == 2
        for call in calls:
            call.end()
        assert [one.result() for one in held] == NUM_HELD * ["44"]
        until(scaled_down)


def cpu_s(pid: int) -> float:
    return psutil.Process(pid).cpu_times().user


def is_at_rest(pid: int) -> bool:
    before = cpu_s(pid)
    time.sleep(1.0)
    return cpu_s(pid) < before + 0.2


def test_engines_become_more_under_load_and_fewer_after_it_without_a_failure(
    almanac_model: str, tmp_path: Path
) -> None:
    endless = make_endless(almanac_model, tmp_path / "almanac")
    seeds = itertools.count()

    def ends() -> bool:
        """Whether one more answer, a short one, is whole."""
        reply = served.post(seed=next(seeds), max_tokens=4)
        reply.raise_for_status()
        return reply.json()["usage"]["completion_tokens"] == 4

    def has_replicas(number: int) -> bool:
        assert ends()
        return len(served.replicas("engine-0")) == number

    with (
        scaling(tmp_path, "engine-0", checkpoint=str(endless), max_engines=2) as served,
        ExitStack() as held,
    ):
        (first,) = served.replicas("engine-0")
        for _ in range(NUM_HELD):
            fields = asked(stream=True, temperature=0, seed=next(seeds))
            reply = held.enter_context(served.client.stream("POST", CHAT, json=fields))
            assert reply.status_code == 200
        until(lambda: has_replicas(2))
        (second,) = served.replicas("engine-0") - {first}
        until(lambda: is_at_rest(second))  # it has started
        started = cpu_s(second)
        # A short answer takes some milliseconds of one of them.
        until(lambda: ends() and cpu_s(second) > started + 1)
        held.close()  # all clients hang up
        until(lambda: has_replicas(1))
